"""CudaGraphPolicy by its rules, on the stand-in for a CPU: keys, buffers, what is noticed."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from scipy import stats
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict, tensorclass
from tensordict.nn import (
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
    set_composite_lp_aggregate,
    set_skip_existing,
)

import fastprob as fp
from fastprob import backend as kernels
from fastprob.counter import CounterStream
from fastprob.graphs import RecordingBackend
from tests._graphs import assert_like_eager, assert_same, graphed, observations, policy_of

TYPES = list(fp.InteractionType.__members__.values())


@pytest.fixture(autouse=True)
def _rollout_like():
    """No gradients, and no argument checks: they look at values, which no graph can hold."""
    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    with torch.no_grad():
        yield
    torch.distributions.Distribution.set_default_validate_args(before)


# what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize("kind", [*TYPES, None], ids=str)
def test_calls_are_those_of_the_policy(kind, clone):
    policy = policy_of()
    graph, backend = graphed(policy, clone_outputs=clone)
    with fp.set_interaction_type(kind):
        for seed in range(5):
            assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert backend.captures == 1
    (held,) = graph.graphs
    assert (held.interaction_type, held.replays, held.captured) == (kind, 5, True)
    assert held.inputs == (("obs", (4, 3), torch.float32),)
    # Input, output of the first layer and of the activation at the least.
    assert held.memory >= 4 * (4 * 3 + 4 * 8 + 4 * 8)


def test_switching_the_interaction_type_never_repeats_the_wrong_branch():
    policy = policy_of(safe=False, spec=None)
    graph, backend = graphed(policy)
    given = observations(4)
    mode = policy(given.copy())["loc"]
    drawn = []
    for i in range(1000):
        kind = ("random", "mode", "mean", "deterministic")[torch.randint(4, ()).item() if i else 0]
        with fp.set_interaction_type(kind):
            action = graph(given.copy())["action"]
        assert torch.equal(action, mode) is (kind != "random")
        if kind == "random":
            drawn.append(action)
    assert backend.captures == 4
    assert len(drawn) > 100
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == len(drawn)


def test_replays_draw_from_the_distribution():
    policy = policy_of(safe=False, spec=None)
    graph, _ = graphed(policy)
    given = observations(4)
    parameters = policy(given.copy())
    draws = torch.stack([graph(given.copy())["action"] for _ in range(1000)])
    noise = (draws - parameters["loc"]) / parameters["scale"]
    assert stats.kstest(noise.flatten().numpy(), "norm").pvalue > 1e-3
    assert noise.unique().numel() > 0.99 * noise.numel()
    # Neither from one replay to the next, nor from one row to the next.
    assert abs(torch.corrcoef(noise[:-1].flatten()[None])).item() == pytest.approx(1)
    assert (
        abs(torch.corrcoef(torch.stack([noise[1:].flatten(), noise[:-1].flatten()]))[0, 1]) < 0.05
    )


SOURCES = {
    "seed": lambda: 5,
    "generator": lambda: torch.Generator().manual_seed(5),
    "counter": lambda: CounterStream(5),
}


@pytest.mark.parametrize("source", SOURCES)
def test_a_generator_draws_as_it_does_eagerly(source):
    def run(wrap):
        policy = policy_of(generator=SOURCES[source]())
        call = wrap(policy)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        out = [call(td.copy())["action"] for td in inputs]
        assert torch.equal(torch.get_rng_state(), state)
        return out

    inputs = [observations(2) for _ in range(4)]
    made = []

    def wrap(policy):
        made.append(graphed(policy))
        return made[0][0]

    for ours, theirs in zip(run(wrap), run(lambda policy: policy), strict=True):
        assert torch.equal(ours, theirs)
    assert made[0][1].captures == 1


def test_a_generator_in_the_tensordict_is_part_of_the_key():
    policy = policy_of(generator="rng")
    graph, backend = graphed(policy)
    generators = [torch.Generator(), torch.Generator()]

    def given(i, seed):
        return observations(2).set("rng", NonTensorData(generators[i].manual_seed(seed)))

    for i, seed in ((0, 1), (0, 2), (1, 1), (0, 3)):
        td = given(i, seed)
        theirs = policy(td.copy())["action"]
        generators[i].manual_seed(seed)
        assert torch.equal(graph(td.copy())["action"], theirs)
    assert backend.captures == 2


def test_a_seed_in_the_tensordict_cannot_be_captured():
    policy = policy_of(generator="rng")
    graph, _ = graphed(policy)
    with pytest.raises(fp.GraphError, match=r"_local_scalar_dense"):
        graph(TensorDict(obs=torch.zeros(3), rng=torch.tensor(3)))


def test_a_replaced_generator_is_noticed():
    generator = torch.Generator().manual_seed(5)
    policy = policy_of(generator=generator)
    graph, backend = graphed(policy)
    graph(observations(2))
    fp.rng.fold_in(policy, 3)
    twin = copy.deepcopy(policy)
    for _ in range(3):
        given = observations(2)
        assert torch.equal(graph(given.copy())["action"], twin(given.copy())["action"])
    assert backend.captures == 2


def test_warm_up_and_capture_leave_no_trace():
    """Neither buffers, nor generators, nor the input: the first call is like any other."""
    policy = policy_of(torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    twin = copy.deepcopy(policy)
    graph, backend = graphed(policy, warmup=5)
    given = observations(6)
    before = given.clone()
    graph.capture(given, ["random", "mode"])
    assert_same(given, before)
    assert backend.captures == 2
    for a, b in zip(policy.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)
    for seed in range(3):
        given = observations(6)
        torch.manual_seed(seed)
        theirs = twin(given.copy())
        torch.manual_seed(seed)
        with fp.set_interaction_type("random"):
            ours = graph(given.copy())
        assert_same(ours, theirs)
        for a, b in zip(policy.buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), "running statistics"
    assert backend.captures == 2


# the key ---------------------------------------------------------------------------------------


def _in(manager: Any, call: Any) -> Any:
    with manager:
        return call()


def _set(target: Any, name: str, value: Any) -> Any:
    setattr(target, name, value)
    return target


OTHERS = {
    "shape": lambda p: observations(5),
    "batch size": lambda p: TensorDict(obs=torch.randn(4, 3), batch_size=[]),
    "device of the tensordict": lambda p: TensorDict(
        obs=torch.randn(4, 3), batch_size=[4], device="cpu"
    ),
    "order of dimensions": lambda p: TensorDict(obs=torch.randn(3, 4).T, batch_size=[4]),
    "needs a gradient": lambda p: TensorDict(
        obs=torch.randn(4, 3, requires_grad=True), batch_size=[4]
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_input_takes_another_graph(name):
    policy = policy_of()
    graph, backend = graphed(policy)
    for seed in range(3):
        assert_like_eager(graph, policy, lambda: observations(4), seed)
        assert_like_eager(graph, policy, lambda: OTHERS[name](policy), seed)
    assert backend.captures == 2


def test_another_dtype_takes_another_graph():
    policy = fp.ProbabilisticTensorDictModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=torch.distributions.Normal,
        default_interaction_type="random",
    )
    graph, backend = graphed(policy)
    for dtype in (torch.float32, torch.float64, torch.float32):
        out = assert_like_eager(
            graph,
            policy,
            lambda dtype=dtype: TensorDict(
                loc=torch.randn(4, dtype=dtype), scale=torch.rand(4, dtype=dtype), batch_size=[4]
            ),
        )
        assert out["action"].dtype is dtype
    assert backend.captures == 2


SAME = {
    "values": lambda: observations(4),
    "a slice": lambda: TensorDict(obs=torch.randn(4, 7, 3)[:, 2], batch_size=[4]),
    "rows in steps": lambda: TensorDict(obs=torch.randn(8, 3)[::2], batch_size=[4]),
    "expanded": lambda: TensorDict(obs=torch.randn(3).expand(4, 3), batch_size=[4]),
    "other entries": lambda: observations(4).set("reward", torch.zeros(4)),
    "a parameter": lambda: TensorDict(
        obs=torch.nn.Parameter(torch.randn(4, 3), requires_grad=False), batch_size=[4]
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_what_makes_no_difference_takes_no_graph(name):
    policy = policy_of()
    graph, backend = graphed(policy)
    for seed in range(3):
        assert_like_eager(graph, policy, lambda: observations(4), seed)
        assert_like_eager(graph, policy, SAME[name], seed)
    assert backend.captures == 1


SURROUNDINGS = {
    "inference mode": lambda: torch.inference_mode(),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "skip existing": lambda: set_skip_existing(True),
    "kernels": lambda: kernels.using_backend("reference"),
    "interaction type": lambda: fp.set_interaction_type("median"),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_other_surroundings_take_another_graph(name):
    policy = policy_of()
    graph, backend = graphed(policy)
    for seed in range(3):
        assert_like_eager(graph, policy, lambda: observations(4), seed)
        with SURROUNDINGS[name]():
            assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert backend.captures == 2


def test_grad_mode_takes_another_graph():
    policy = policy_of().requires_grad_(False)
    graph, backend = graphed(policy)
    for seed in range(3):
        assert_like_eager(graph, policy, lambda: observations(4), seed)
        with torch.enable_grad():
            assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert backend.captures == 2


def test_autocast_weights_follow_their_parameters():
    """Autocast keeps the cast of a parameter; a graph must not have it as a constant."""
    policy = policy_of()
    graph, backend = graphed(policy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        # Eager calls keep casts until the block ends, and those of a capture hold nothing yet.
        given = observations(4)
        before = policy(given.copy())["loc"]
        graph.capture(given)
        assert torch.equal(policy(given.copy())["loc"], before)
        assert_like_eager(graph, policy, lambda: observations(4))
    for p in policy.parameters():
        p.add_(0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_like_eager(graph, policy, lambda: observations(4))
    assert backend.captures == 1


CONFIGURATIONS = {
    "return_log_prob": lambda p: _set(p[1], "return_log_prob", False),
    "spec": lambda p: _set(
        p[1], "spec", fp.specs.Composite(action=fp.specs.Bounded(low=0.0, high=0.1, shape=(2,)))
    ),
    "default_interaction_type": lambda p: _set(
        p[1], "default_interaction_type", fp.InteractionType.MODE
    ),
    "distribution_class": lambda p: _set(p[1], "distribution_class", fp.distributions.TanhNormal),
    "distribution_kwargs": lambda p: _set(p[1], "distribution_kwargs", {"validate_args": False}),
    "training": lambda p: p.eval(),
    "training of one module": lambda p: p[0].module[2].eval(),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_another_configuration_takes_another_graph(name):
    policy = policy_of(torch.nn.Dropout(0.5))
    graph, backend = graphed(policy)
    assert_like_eager(graph, policy, lambda: observations(4))
    CONFIGURATIONS[name](policy)
    for seed in range(2):
        assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert backend.captures == 2


def test_training_and_evaluation_each_keep_their_graph():
    policy = policy_of(torch.nn.Dropout(0.5))
    graph, backend = graphed(policy)
    for seed in range(4):
        policy.train(seed % 2 == 0)
        assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert backend.captures == 2


def test_keyword_arguments_changed_in_place_are_noticed():
    policy = policy_of(
        distribution_class=fp.distributions.TanhNormal,
        distribution_kwargs={"low": -1.0, "high": 1.0},
        safe=False,
        spec=None,
    )
    graph, backend = graphed(policy)
    assert_like_eager(graph, policy, lambda: observations(4))
    policy[1].distribution_kwargs["high"] = 5.0
    assert_like_eager(graph, policy, lambda: observations(4))
    assert backend.captures == 2


class Repeats(TensorDictModuleBase):
    """Reads an entry that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys, self.out_keys = ["obs", "times"], ["out", "said"]

    def forward(self, tensordict: Any) -> Any:
        times = tensordict.get("times")
        times = times.data if isinstance(times, NonTensorData) else times
        tensordict["out"] = tensordict["obs"] * times
        return tensordict.set_non_tensor("said", f"{times!r} times")


def test_inputs_that_are_no_tensors_are_part_of_the_key():
    policy = Repeats()
    graph, backend = graphed(policy)
    for times in (2, 3, 2, 1, True, 1.0, 3):
        out = assert_like_eager(
            graph, policy, lambda times=times: observations(4).set_non_tensor("times", times)
        )
        assert out["said"] == f"{times!r} times"
    assert backend.captures == 5
    with pytest.raises(TypeError, match="'times' is a list, which cannot be part"):
        graph(observations(4).set_non_tensor("times", [3]))


def test_a_missing_optional_input_is_part_of_the_key():
    def run(td):
        return td.set("out", td["a"] + td.get("b", 0))

    policy = TensorDictSequential(
        TensorDictModule(torch.neg, in_keys=["a"], out_keys=["out"]),
        TensorDictModule(torch.neg, in_keys=["b"], out_keys=["more"]),
        partial_tolerant=True,
    )
    graph, backend = graphed(policy)
    for keys in ("ab", "a", "ab"):
        make = lambda keys=keys: TensorDict({k: torch.randn(2) for k in keys}, [2])  # noqa: E731
        assert ("more" in assert_like_eager(graph, policy, make)) is ("b" in keys)
    assert backend.captures == 2
    # A function says nothing about what it reads, so that all entries count.
    graph, backend = graphed(run)
    for keys in ("ab", "a", "ac"):
        make = lambda keys=keys: TensorDict({k: torch.randn(2) for k in keys}, [2])  # noqa: E731
        assert_like_eager(graph, run, make)
    assert backend.captures == 3


def test_a_sample_that_is_there_is_kept_under_skip_existing():
    policy = policy_of()
    graph, backend = graphed(policy)

    def there():
        return (
            observations(2)
            .update({k: torch.ones(2, 2) for k in ("loc", "scale", "action")})
            .set("sample_log_prob", torch.zeros(2))
        )

    with set_skip_existing(True):
        for _ in range(2):
            assert_like_eager(graph, policy, there)
            assert_like_eager(graph, policy, lambda: observations(2))
    assert backend.captures == 2


def test_the_aggregate_switch_is_part_of_the_key():
    policy = policy_of()
    graph, _ = graphed(policy)
    graph(observations(2))
    # Upstream's rule: a switch after construction raises.
    with set_composite_lp_aggregate(True), pytest.raises(RuntimeError, match="aggregate"):
        graph(observations(2))
    graph(observations(2))
    assert [g.replays for g in graph.graphs] == [2]


# what is held ----------------------------------------------------------------------------------


def test_the_least_recently_used_graph_goes_first():
    policy = policy_of()
    graph, backend = graphed(policy, max_graphs=2)

    def sizes():
        return [g.inputs[0][1][0] for g in graph.graphs]

    for size, held, captures in (
        (1, [1], 1),
        (2, [1, 2], 2),
        (1, [2, 1], 2),
        (1, [2, 1], 2),
        (3, [1, 3], 3),
        (2, [3, 2], 4),
    ):
        assert_like_eager(graph, policy, lambda size=size: observations(size))
        assert (sizes(), backend.captures) == (held, captures)
    graph.reset()
    assert graph.graphs == []
    assert_like_eager(graph, policy, lambda: observations(1))
    assert (sizes(), backend.captures) == ([1], 5)


def test_capturing_ahead():
    policy = policy_of()
    graph, backend = graphed(policy)
    given = observations(4)
    graph.capture(given, interaction_types=["random", fp.InteractionType.MODE, None])
    assert list(given.keys()) == ["obs"]
    assert backend.captures == 3
    assert [g.replays for g in graph.graphs] == [0, 0, 0]
    assert [g.interaction_type for g in graph.graphs] == [
        fp.InteractionType.RANDOM,
        fp.InteractionType.MODE,
        None,
    ]
    graph.capture(given)
    for kind in ("random", "mode", None):
        with fp.set_interaction_type(kind):
            assert_like_eager(graph, policy, lambda: observations(4))
    assert backend.captures == 3
    with pytest.raises(ValueError, match="interaction_types must be an InteractionType"):
        graph.capture(given, ["often"])


def test_results_last_and_inputs_are_left_alone():
    policy = policy_of()
    graph, _ = graphed(policy)
    given = [observations(4) for _ in range(3)]
    before = [td.clone() for td in given]
    results = [graph(td.copy()) for td in given]
    kept = [td.clone() for td in results]
    graph(observations(4))
    for result, copied, td, was in zip(results, kept, given, before, strict=True):
        assert_same(result, copied)
        assert_same(td, was)
        assert result["obs"] is td["obs"]
        # Nobody's memory but the caller's.
        result["action"].zero_()
    assert_like_eager(graph, policy, lambda: observations(4))


def test_the_result_is_the_tensordict_that_was_given():
    graph, _ = graphed(policy_of())
    for _ in range(2):
        given = observations(4)
        assert graph(given) is given


class Counts(TensorDictModuleBase):
    """Writes its output under its input's key."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys = self.out_keys = ["hidden"]

    def forward(self, tensordict: Any) -> Any:
        return tensordict.set("hidden", tensordict["hidden"] * 2 + 1)


@pytest.mark.parametrize("clone", [True, False])
def test_an_output_under_an_input_key_follows_its_input(clone):
    graph, backend = graphed(Counts(), clone_outputs=clone, debug=True)
    td = TensorDict(hidden=torch.zeros(2), batch_size=[2])
    for i in range(1, 6):
        td = graph(td)
        assert td["hidden"].tolist() == [2.0**i - 1] * 2
    other = graph(TensorDict(hidden=torch.full((2,), 10.0), batch_size=[2])) if clone else None
    assert other is None or other["hidden"].tolist() == [21.0] * 2
    assert backend.captures == 1


def test_an_input_written_in_place_is_written_in_place():
    def policy(td):
        td["a"].mul_(2)
        return td.set("b", td["a"] + 1)

    graph, _ = graphed(policy)
    a = torch.ones(3)
    td = TensorDict(a=a, batch_size=[3])
    for i in range(1, 4):
        graph(td)
        assert td["a"] is a
        assert a.tolist() == [2.0**i] * 3
        assert td["b"].tolist() == [2.0**i + 1] * 3


# what is noticed -------------------------------------------------------------------------------


def test_updates_in_place_are_seen():
    policy = policy_of()
    graph, backend = graphed(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    for seed in range(4):
        assert_like_eager(graph, policy, lambda: observations(4), seed)
        with torch.enable_grad():
            policy(observations(4))["sample_log_prob"].sum().backward()
        optimizer.step()
    for p in policy.parameters():
        p.copy_(torch.randn_like(p))
    policy.load_state_dict({k: v + 1 for k, v in policy.state_dict().items()})
    assert_like_eager(graph, policy, lambda: observations(4))
    assert backend.captures == 1


def _to_and_back(policy):
    policy.to(torch.float64)
    policy.to(torch.float32)


MOVES = {
    "to another dtype and back": _to_and_back,
    "load_state_dict(assign=True)": lambda p: p.load_state_dict(
        {k: v + 1 for k, v in p.state_dict().items()}, assign=True
    ),
    "data": lambda p: _set(p[0].module[0].weight, "data", torch.randn(8, 3)),
    "a new parameter": lambda p: _set(p[0].module[0], "bias", torch.nn.Parameter(torch.randn(8))),
    "no parameter any more": lambda p: _set(p[0].module[0], "bias", None),
    "a new module": lambda p: p[0].module.__setitem__(0, torch.nn.Linear(3, 8)),
    "a new head": lambda p: p.__setitem__(
        1,
        fp.ProbabilisticTensorDictModule(
            in_keys={"param": "loc"}, out_keys=["action"], default_interaction_type="mode"
        ),
    ),
    "a parametrization": lambda p: torch.nn.utils.parametrizations.weight_norm(p[0].module[0]),
    "a buffer": lambda p: _set(p[0].module[2], "running_mean", torch.randn(8)),
}


@pytest.mark.parametrize("name", MOVES)
def test_what_has_moved_is_captured_anew(name):
    policy = policy_of(torch.nn.BatchNorm1d(8).eval())
    policy[0].module[2].requires_grad_(False)
    graph, backend = graphed(policy)
    assert_like_eager(graph, policy, lambda: observations(4))
    MOVES[name](policy)
    for seed in range(3):
        assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert backend.captures == 2
    assert len(graph.graphs) == 1


def test_a_dtype_that_moves_with_its_inputs():
    policy = policy_of(spec=None, safe=False)
    graph, backend = graphed(policy)
    assert_like_eager(graph, policy, lambda: observations(4))
    policy.double()
    assert_like_eager(graph, policy, lambda: observations(4, dtype=torch.float64))
    policy.float()
    assert_like_eager(graph, policy, lambda: observations(4))
    assert backend.captures == 3


@pytest.mark.parametrize("plain", [False, True], ids=["parameters", "tensors"])
def test_parameters_swapped_by_to_module_are_noticed(plain):
    policy = policy_of()
    graph, backend = graphed(policy)
    own = TensorDict.from_module(policy)
    others = [own.data.clone().apply(lambda t, i=i: t + i) for i in (1, 2)]
    if not plain:
        others = [td.apply(torch.nn.Parameter) for td in others]
    for params in (None, others[0], others[1], None, others[0]):
        if params is None:
            assert_like_eager(graph, policy, lambda: observations(4))
            continue
        with params.to_module(policy):
            assert_like_eager(graph, policy, lambda: observations(4))
            # Changed in place while they are there.
            params.data.apply_(lambda t: t.mul_(1.5))
            assert_like_eager(graph, policy, lambda: observations(4))
    assert backend.captures == 5


def test_memory_of_parameters_is_not_given_to_others_while_a_graph_reads_it():
    """A freed address may be taken by the very parameter that replaces the old one."""
    policy = policy_of()
    graph, backend = graphed(policy)
    for i in range(4):
        assert_like_eager(graph, policy, lambda: observations(4))
        assert backend.captures == i + 1
        layer = policy[0].module[0]
        shape, address = layer.weight.shape, layer.weight.data_ptr()
        layer.weight = None
        # Held by the entry itself: not every backend holds what it has captured.
        (entry,) = graph._table.entries.values()
        assert address in [t.data_ptr() for t in entry.held]
        layer.weight = torch.nn.Parameter(torch.randn(shape))
        assert layer.weight.data_ptr() != address


def test_moving_at_every_call_is_warned_of():
    policy = policy_of()
    graph, _ = graphed(policy)
    with pytest.warns(UserWarning, match=r"captured anew.*in place") as caught:
        for _ in range(8):
            policy.load_state_dict(policy.state_dict(), assign=True)
            for p in policy.parameters():
                p.data = p.data.clone()
            graph(observations(2))
    assert len(caught) == 1


# tensordicts of all kinds ----------------------------------------------------------------------


def test_nested_keys():
    policy = fp.ProbabilisticTensorDictModule(
        in_keys={"loc": ("agent", "loc"), "scale": ("agent", "scale")},
        out_keys=[("agent", "action")],
        distribution_class=torch.distributions.Normal,
        default_interaction_type="random",
        return_log_prob=True,
        log_prob_key=("agent", "lp"),
    )
    graph, backend = graphed(policy)

    def make():
        inner = TensorDict(loc=torch.randn(2, 3), scale=torch.rand(2, 3), batch_size=[2, 3])
        return TensorDict(agent=inner, batch_size=[2])

    for seed in range(3):
        out = assert_like_eager(graph, policy, make, seed)
        assert out["agent"].batch_size == (2, 3)
    assert backend.captures == 1


def test_a_whole_tensordict_as_an_input():
    def total(td):
        return td["a"] + td["b"]

    policy = TensorDictModule(total, in_keys=["both"], out_keys=["sum"])
    graph, backend = graphed(policy)

    def make(names="ab"):
        return TensorDict(both=TensorDict({k: torch.randn(2) for k in names}, [2]), batch_size=[2])

    for seed in range(3):
        assert_like_eager(graph, policy, make, seed)
    assert_like_eager(graph, policy, lambda: make("abc"))
    assert backend.captures == 2


@pytest.mark.parametrize("inplace", [True, False, "empty", None])
@pytest.mark.parametrize("given_out", [False, True])
def test_results_in_another_tensordict(inplace, given_out):
    head = fp.ProbabilisticTensorDictModule(
        in_keys={"param": "loc"}, out_keys=["action"], default_interaction_type="mode"
    )
    net = TensorDictModule(torch.nn.Linear(3, 2), in_keys=["obs"], out_keys=["loc"])
    policy = fp.ProbabilisticTensorDictSequential(net, head, inplace=inplace)
    graph, backend = graphed(policy)
    for _ in range(3):
        given = observations(4).set("other", torch.ones(4))
        outs = [TensorDict(there=torch.ones(4), batch_size=[4]) for _ in range(2)]
        kwargs = [{"tensordict_out": out} if given_out else {} for out in outs]
        theirs = policy(given.copy(), **kwargs[0])
        mine = given.copy()
        ours = graph(mine, **kwargs[1])
        assert_same(ours, theirs)
        assert (ours is mine) is (theirs is not outs[0] and inplace in (True, None))
        assert (ours is outs[1]) is (theirs is outs[0])
    assert backend.captures == 1


@pytest.mark.parametrize("count", [1, 5])
def test_several_samples(count):
    policy = policy_of(num_samples=count)
    graph, backend = graphed(policy)
    for seed in range(3):
        out = assert_like_eager(
            graph, policy, lambda: observations(4).set("other", torch.ones(4)), seed
        )
        assert out["action"].shape == (count, 4, 2)
        assert out["other"].shape == (count, 4)
    assert backend.captures == 1


def test_calls_without_a_tensordict():
    policy = policy_of(default_interaction_type="mode")
    graph, backend = graphed(policy)
    for _ in range(2):
        obs = torch.randn(4, 3)
        for ours, theirs in zip(graph(obs), policy(obs), strict=True):
            assert torch.equal(ours, theirs)
        for ours, theirs in zip(graph(obs=obs), policy(obs), strict=True):
            assert torch.equal(ours, theirs)
        assert graph(tensordict=TensorDict(obs=obs, batch_size=[4]))["action"].shape == (4, 2)
    assert backend.captures == 2


@tensorclass
class Sample:
    obs: torch.Tensor
    loc: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    action: torch.Tensor | None = None
    sample_log_prob: torch.Tensor | None = None


def test_other_kinds_of_tensordicts():
    policy = policy_of()
    graph, backend = graphed(policy)
    for make in (
        lambda: Sample(obs=torch.randn(2, 3), batch_size=[2]),
        lambda: LazyStackedTensorDict(observations(), observations(), stack_dim=0),
    ):
        for _ in range(2):
            given = make()
            torch.manual_seed(4)
            theirs = policy(given.copy())
            torch.manual_seed(4)
            ours = graph(given)
            assert ours is given
            for key in ("action", "sample_log_prob", "loc"):
                assert torch.equal(ours.get(key), theirs.get(key))
    assert backend.captures == 1


def test_a_locked_tensordict_is_the_policys_to_refuse():
    graph, _ = graphed(policy_of())
    graph(observations(2))
    locked = observations(2).lock_()
    with pytest.raises(RuntimeError, match="locked"):
        graph(locked)
    assert [g.replays for g in graph.graphs] == [1]


def test_entries_that_the_policy_deletes_are_deleted():
    def policy(td):
        td["b"] = td["a"] + 1
        del td["a"]
        return td

    graph, _ = graphed(policy)
    for _ in range(2):
        assert_like_eager(graph, policy, lambda: TensorDict(a=torch.randn(2), batch_size=[2]))


def test_upstreams_modules():
    from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential

    net = TensorDictModule(torch.nn.Linear(3, 2), in_keys=["obs"], out_keys=["loc"])
    head = ProbabilisticTensorDictModule(
        in_keys=["loc"],
        out_keys=["action"],
        distribution_class=torch.distributions.Normal,
        distribution_kwargs={"scale": 0.5},
        default_interaction_type=fp.InteractionType.RANDOM,
        return_log_prob=True,
    )
    policy = ProbabilisticTensorDictSequential(net, head)
    graph, backend = graphed(policy)
    for seed in range(3):
        for kind in ("random", "mean", None):
            with fp.set_interaction_type(kind):
                assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert backend.captures == 3


def test_every_family():
    heads = {
        "TanhNormal": 2,
        "Categorical": 1,
        "OneHotCategorical": 1,
        "Bernoulli": 1,
        "Beta": 2,
        "Delta": 1,
    }
    for name, count in heads.items():
        cls = getattr(fp.distributions, name)
        keys = {"Beta": ["concentration1", "concentration0"], "Delta": ["param"]}.get(
            name, ["loc", "scale"] if count == 2 else ["logits"]
        )
        policy = fp.ProbabilisticTensorDictModule(
            in_keys=keys,
            out_keys=["action"],
            distribution_class=cls,
            default_interaction_type="random",
            return_log_prob=True,
        )
        graph, backend = graphed(policy)
        for seed in range(2):
            for kind in ("random", "mode"):
                with fp.set_interaction_type(kind):
                    assert_like_eager(
                        graph,
                        policy,
                        lambda keys=keys: TensorDict(
                            {k: torch.rand(4, 3) + 1.1 for k in keys}, [4]
                        ),
                        seed,
                    )
        assert backend.captures == 2, name


# without a device ------------------------------------------------------------------------------


def test_without_a_gpu_the_policy_runs_directly(recwarn):
    policy = policy_of()
    graph = fp.CudaGraphPolicy(policy)
    for seed in range(3):
        for kind in ("random", "mode"):
            with fp.set_interaction_type(kind):
                assert_like_eager(graph, policy, lambda: observations(4), seed)
    assert [(g.captured, g.memory) for g in graph.graphs] == [(False, 0)] * 2
    # What a graph would refuse, a direct call does.
    with torch.enable_grad():
        out = graph(TensorDict(obs=torch.randn(4, 3, requires_grad=True), batch_size=[4]))
    assert out["sample_log_prob"].requires_grad
    assert len(recwarn) == 0


def test_what_no_key_can_hold_is_no_matter_without_a_graph():
    class Odd(torch.Tensor):
        pass

    def policy(td):
        return td.set("out", td["obs"] + 1)

    for graph in (fp.CudaGraphPolicy(policy), graphed(policy, enabled=False)[0]):
        given = observations(2).set_non_tensor("list", [3])
        given["odd"] = torch.ones(2).as_subclass(Odd)
        assert torch.equal(graph(given)["out"], given["obs"] + 1)
    for backend in (None, RecordingBackend()):
        step = fp.CudaGraphStep(len, backend=backend, enabled=False)
        assert step({3, 4}) == 2
    assert fp.CudaGraphStep(len)([torch.ones(1).as_subclass(Odd)]) == 1


def test_enabled_is_a_switch():
    policy = policy_of()
    graph, backend = graphed(policy, enabled=False)
    assert_like_eager(graph, policy, lambda: observations(4))
    assert [g.captured for g in graph.graphs] == [False]
    graph.enabled = True
    assert_like_eager(graph, policy, lambda: observations(4))
    assert [g.captured for g in graph.graphs] == [True]
    graph.enabled = False
    replays = graph.graphs[0].replays
    assert_like_eager(graph, policy, lambda: observations(4))
    assert graph.graphs[0].replays == replays
    assert backend.captures == 1


def test_it_is_a_module_around_the_policy():
    policy = policy_of()
    graph, _ = graphed(policy)
    assert graph.in_keys == policy.in_keys
    assert graph.out_keys == policy.out_keys
    assert set(graph.state_dict()) == {f"policy.{key}" for key in policy.state_dict()}
    assert list(graph.parameters()) == list(policy.parameters())
    assert fp.CudaGraphPolicy(lambda td: td).in_keys == []


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_captures_graphs_of_its_own(how):
    policy = policy_of()
    graph, backend = graphed(policy, max_graphs=3)
    graph._given_backend = None
    assert_like_eager(graph, policy, lambda: observations(4))
    other = how(graph)
    assert other.graphs == []
    other._given_backend = RecordingBackend()
    for p in other.policy.parameters():
        p.add_(1.0)
    assert_like_eager(other, other.policy, lambda: observations(4))
    assert_like_eager(graph, policy, lambda: observations(4))
    assert other._table.max_graphs == 3
    assert backend.captures == 0


def test_under_transforms_and_in_larger_graphs_the_policy_runs_directly():
    policy = policy_of()
    graph, backend = graphed(policy)
    with fp.set_interaction_type("mode"):
        graph(observations(2))
        many = TensorDict(obs=torch.randn(5, 2, 3), batch_size=[5, 2])
        ours = torch.vmap(graph)(many.copy())
        theirs = torch.vmap(policy)(many.copy())
        assert torch.equal(ours["action"], theirs["action"])
        # A graph within a graph.
        inner, inner_backend = graphed(policy)
        outer, outer_backend = graphed(TensorDictSequential(inner))
        assert_like_eager(outer, policy, lambda: observations(2))
    assert (backend.captures, inner_backend.captures, outer_backend.captures) == (1, 0, 1)


def test_torchrl_steps_an_environment_with_it():
    torchrl = pytest.importorskip("torchrl.envs")
    env = torchrl.GymEnv("Pendulum-v1")
    torch.manual_seed(0)
    net = TensorDictModule(torch.nn.Linear(3, 1), in_keys=["observation"], out_keys=["loc"])
    head = fp.ProbabilisticTensorDictModule(
        in_keys=["loc"],
        out_keys=["action"],
        distribution_class=torch.distributions.Normal,
        distribution_kwargs={"scale": 0.1},
        default_interaction_type="random",
        return_log_prob=True,
    )
    policy = fp.ProbabilisticTensorDictSequential(net, head)
    graph, backend = graphed(policy)
    batches = []
    for call in (policy, graph):
        env.set_seed(0)
        torch.manual_seed(1)
        batches.append(env.rollout(12, call))
    assert torch.equal(batches[0]["action"], batches[1]["action"])
    assert torch.equal(batches[0]["next", "reward"], batches[1]["next", "reward"])
    assert backend.captures == 1
