"""Rollouts as graphs, on the stand-in for a CPU, against the same steps made one by one."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule

import fastprob as fp
from bench.envs import CartPole, Pendulum
from fastprob.graphs import RecordingBackend

STEPS = 7


@pytest.fixture(autouse=True)
def _no_argument_checks():
    """torch's checks of arguments look at values, which no graph can hold."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    yield
    torch.distributions.Distribution.set_default_validate_args(before)


def make_policy(env, device="cpu"):
    torch.manual_seed(1)
    if isinstance(env, Pendulum):
        net = torch.nn.Sequential(torch.nn.Linear(3, 2), NormalParamExtractor())
        keys, distribution = ["loc", "scale"], fp.distributions.IndependentNormal
    else:
        net, keys, distribution = torch.nn.Linear(4, 2), ["logits"], "OneHotCategorical"
    head = fp.ProbabilisticTensorDictModule(
        in_keys=keys,
        out_keys=["action"],
        distribution_class=distribution,
        default_interaction_type="random",
        return_log_prob=True,
    )
    module = TensorDictModule(net, in_keys=["observation"], out_keys=keys)
    return fp.ProbabilisticTensorDictSequential(module, head).to(device)


def by_hand(env, policy, root, steps):
    """The same rollout, eagerly and without any of the code under test."""
    data = []
    with torch.no_grad():
        for _ in range(steps):
            transition, root = env.step(policy(root.copy()))
            data.append(transition)
    return torch.stack(data, root.ndim), root


def assert_equal(a, b):
    assert set(a.keys(True, True)) == set(b.keys(True, True))
    assert a.batch_size == b.batch_size
    for key, value in b.items(True, True):
        assert torch.equal(a.get(key), value), key


@pytest.mark.parametrize("backend", [None, RecordingBackend], ids=["direct", "recorded"])
@pytest.mark.parametrize("make", [Pendulum, CartPole])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)], ids=str)
def test_steps_are_those_of_a_loop(make, batch, backend):
    env = make()
    policy = make_policy(env)
    collect = fp.rollout(env.step, policy, STEPS, backend=backend and backend())
    roots = env.reset(batch)
    for seed in (5, 6):
        torch.manual_seed(seed)
        expected, expected_root = by_hand(env, policy, roots, STEPS)
        before = roots.clone()
        torch.manual_seed(seed)
        data, root = collect(roots)
        assert_equal(data, expected)
        assert_equal(root, expected_root)
        # What was passed is left alone.
        assert_equal(roots, before)
        roots = root
    assert data.batch_size == (*batch, STEPS)
    assert [g.captured for g in collect.graphs] == [backend is not None]


@pytest.mark.parametrize("make", [Pendulum, CartPole])
def test_episodes_end_inside_a_graph(make):
    env = make()
    env.max_steps = 5
    policy = make_policy(env)
    collect = fp.rollout(env.step, policy, 23, backend=RecordingBackend())
    root = env.reset([3])
    torch.manual_seed(2)
    expected, _ = by_hand(env, policy, root, 23)
    torch.manual_seed(2)
    data, _ = collect(root)
    assert_equal(data, expected)
    assert data["next", "done"].sum() == 12
    # A new episode starts where no other does.
    starts = data["state"][data["step_count"][..., 0] == 0]
    assert len(starts.unique(dim=0)) == 15


def test_a_graph_for_each_interaction_type_and_batch():
    env = Pendulum()
    policy = make_policy(env)
    backend = RecordingBackend()
    collect = fp.rollout(env.step, policy, 5, backend=backend)
    for _ in range(3):
        for batch in (2, 4):
            for kind in ("mode", "random"):
                root = env.reset([batch])
                with fp.set_interaction_type(kind):
                    data, _ = collect(root)
                mean = data["loc"]
                assert torch.equal(data["action"], mean) is (kind == "mode")
    assert backend.captures == 4
    assert {(g.interaction_type.value, g.captured) for g in collect.graphs} == {
        ("mode", True),
        ("random", True),
    }


def test_a_generator_of_the_environment_is_part_of_the_graph():
    def run(backend):
        generator = torch.Generator().manual_seed(9)
        env = Pendulum(generator=generator)
        env.max_steps = 3
        policy = make_policy(env)
        collect = fp.rollout(env.step, policy, 10, generators=[generator], backend=backend)
        root = TensorDict(
            state=torch.zeros(2, 2),
            observation=env.observe(torch.zeros(2, 2)),
            step_count=torch.zeros(2, 1, dtype=torch.int64),
            batch_size=[2],
        )
        torch.manual_seed(0)
        data, _ = collect(root)
        return data, torch.rand(2, generator=generator)

    (data, after), (expected, expected_after) = run(RecordingBackend()), run(None)
    assert_equal(data, expected)
    assert torch.equal(after, expected_after)


def test_updates_of_the_policy_are_seen():
    env = Pendulum()
    policy = make_policy(env)
    backend = RecordingBackend()
    collect = fp.rollout(env.step, policy, 5, backend=backend)
    root = env.reset([2])
    with fp.set_interaction_type("mode"):
        collect(root)
        with torch.no_grad():
            policy[0].module[0].weight.add_(1.0)
        assert_equal(collect(root)[0], by_hand(env, policy, root, 5)[0])
        assert backend.captures == 1
        policy.load_state_dict({k: v + 1 for k, v in policy.state_dict().items()}, assign=True)
        assert_equal(collect(root)[0], by_hand(env, policy, root, 5)[0])
        assert backend.captures == 2


def test_buffers_handed_over_are_the_rollouts_own():
    env = Pendulum()
    policy = make_policy(env)
    collect = fp.rollout(env.step, policy, 4, clone_outputs=False, backend=RecordingBackend())
    root = env.reset([2])
    first, _ = collect(root)
    kept = first.clone()
    second, _ = collect(env.reset([2]))
    assert first["action"].data_ptr() == second["action"].data_ptr()
    assert torch.equal(first["action"], second["action"])
    assert not torch.equal(first["action"], kept["action"])


def test_entries_that_change_places_are_read_before_they_are_written():
    def swap(td):
        td["seen"] = td["a"]
        return td, TensorDict(a=td["b"], b=td["a"], batch_size=td.batch_size)

    collect = fp.rollout(swap, lambda td: td, 6, backend=RecordingBackend())
    root = TensorDict(a=torch.ones(2), b=torch.zeros(2), batch_size=[2])
    data, last = collect(root)
    assert data["seen"].tolist() == [[1.0, 0.0] * 3] * 2
    assert last["a"].tolist() == [1.0, 1.0]


def test_a_host_sync_in_the_environment_is_named_and_eager_steps_go_on():
    def step(td):
        if td["x"].sum() > 100:
            raise AssertionError
        return td, td.select("x")

    root = TensorDict(x=torch.ones(3), batch_size=[3])
    collect = fp.rollout(step, lambda td: td, 5, backend=RecordingBackend())
    with pytest.raises(fp.GraphError, match=r"_local_scalar_dense.*test_rollout\.py"):
        collect(root)
    collect = fp.rollout(step, lambda td: td, 5, backend=RecordingBackend(), enabled=False)
    assert collect(root)[0]["x"].shape == (3, 5)


def test_bad_arguments():
    env = Pendulum()
    with pytest.raises(TypeError, match="env_step and policy must be callable, got int"):
        fp.rollout(3, lambda td: td, 5)  # type: ignore[arg-type]
    for steps in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="steps must be an int of 1 or more"):
            fp.rollout(env.step, lambda td: td, steps)  # type: ignore[arg-type]
    root = env.reset([2])
    policy = make_policy(env)
    with pytest.raises(TypeError, match="must return two tensordicts"):
        fp.rollout(lambda td: td, policy, 2)(root)  # type: ignore[arg-type,return-value]
    with pytest.raises(KeyError, match="'step_count' for the next step"):
        fp.rollout(lambda td: (td, td.select("state", "observation")), policy, 2)(root)
    with pytest.raises(ValueError, match="at least one tensor"):
        fp.rollout(env.step, policy, 2)(TensorDict(batch_size=[2]))


def test_no_reference_cycle():
    env = Pendulum()
    policy = make_policy(env)
    collect = fp.rollout(env.step, policy, 5, backend=RecordingBackend())
    collect(env.reset([2]))
    gone = weakref.ref(collect)
    gc.disable()
    try:
        del collect
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [Pendulum, CartPole])
@pytest.mark.parametrize("count", [1, 1024, 65536])
def test_on_a_gpu(make, count):
    env = make(device="cuda")
    policy = make_policy(env, "cuda")
    collect = fp.rollout(env.step, policy, 20)
    root = env.reset([count])
    for seed in (5, 6):
        torch.manual_seed(seed)
        expected, _ = by_hand(env, policy, root, 20)
        torch.manual_seed(seed)
        data, last = collect(root)
        for key in ("action", "observation", "step_count"):
            torch.testing.assert_close(data[key].float(), expected[key].float())
        root = last
    assert [g.captured for g in collect.graphs] == [True]
