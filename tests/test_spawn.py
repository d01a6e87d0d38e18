"""Modules in a spawned worker, as collectors send their policies: the same results as here.

A spawned process has imported nothing and registered nothing, so that whatever a module needs must
come with its pickle. One child answers for all cases: importing torch, tensordict and TorchRL takes
it seconds, a case milliseconds.
"""

from __future__ import annotations

import copy
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing
import torchrl.data as rl_data
import torchrl.modules as rl
from tensordict import NonTensorData, TensorDict
from tensordict import nn as tdnn
from torch import nn

import fastprob as fp
from fastprob import distributions as F
from fastprob import specs
from tests import _fuzz
from tests._modules import MODE, RANDOM, head, normal_td

Made = tuple[nn.Module, TensorDict]
CASES: dict[str, Callable[[], Made]] = {}


def case(make: Callable[[], Made]) -> Callable[[], Made]:
    CASES[make.__name__.replace("_", " ")] = make
    return make


def run(module: Any, td: Any) -> list[dict]:
    """The tensors after each of two calls: the second goes on where the first left the stream."""
    torch.manual_seed(5)
    found = []
    for _ in range(2):
        leaves = module(td).items(True, True)
        found.append({k: v.detach().clone() for k, v in leaves if isinstance(v, torch.Tensor)})
    return found


def work(cases: dict[str, Made], connection: Any) -> None:
    """What the child does."""
    torch.set_num_threads(1)
    answers: dict[str, Any] = {}
    for name, (module, td) in cases.items():
        try:
            answers[name] = type(module).__name__, run(module, td)
        except Exception:
            answers[name] = traceback.format_exc()
    # As bytes: a tensor sent as such is memory of this process, which ends now.
    connection.send_bytes(pickle.dumps(answers))


# --- modules ---


@case
def a_mode() -> Made:
    return head(default_interaction_type=MODE, return_log_prob=True), normal_td(6)


@case
def a_draw_from_the_global_stream() -> Made:
    return head(default_interaction_type=RANDOM, return_log_prob=True), normal_td(6)


@case
def a_module_that_was_called_before() -> Made:
    """Called: it keeps its straight call and a cached sum."""
    module = head(
        distribution_class=F.IndependentNormal,
        default_interaction_type=RANDOM,
        return_log_prob=True,
    )
    with torch.no_grad():
        module(normal_td(6))
    assert module._straight is not None
    return module, normal_td(6)


@case
def a_seed() -> Made:
    return head(default_interaction_type=RANDOM, generator=3), normal_td(6)


@case
def a_seed_whose_stream_has_begun() -> Made:
    module = head(default_interaction_type=RANDOM, generator=3)
    module(normal_td(6))
    return module, normal_td(6)


@case
def a_generator_that_was_drawn_from() -> Made:
    generator = torch.Generator().manual_seed(4)
    torch.randn(7, generator=generator)
    return head(default_interaction_type=RANDOM, generator=generator), normal_td(6)


@case
def two_heads_that_share_a_generator() -> Made:
    generator = torch.Generator().manual_seed(4)
    heads = (
        head(out_keys=[key], default_interaction_type=RANDOM, generator=generator)
        for key in ("first", "second")
    )
    return fp.ProbabilisticTensorDictSequential(*heads), normal_td(6)


@case
def a_seed_in_the_tensordict() -> Made:
    td = normal_td(6)
    td["rng"] = NonTensorData(8, batch_size=[6])
    return head(default_interaction_type=RANDOM, generator="rng"), td


def family(name: str) -> Callable[[], Made]:
    """A draw and its score from a fastprob distribution, with a generator of the module's own."""

    def make() -> Made:
        source = _fuzz.Draw(torch.Generator().manual_seed(1), torch.float32, False)
        params = _fuzz.FUSED[name].params(source, (6,), 4)
        module = fp.ProbabilisticTensorDictModule(
            list(params),
            ["action"],
            distribution_class=_fuzz.FUSED[name].ours,
            distribution_kwargs=dict(_fuzz.FUSED[name].kwargs[-1]),
            default_interaction_type=RANDOM,
            return_log_prob=True,
            generator=2,
        )
        return module, TensorDict(params, [6])

    return make


for _name, _family in _fuzz.FUSED.items():
    if _family.ours is not None:
        CASES[f"family {_name}"] = family(_name)


@case
def a_composite() -> Made:
    td = TensorDict({("params", "a"): normal_td(6)}, [6])
    td["params", "b", "logits"] = torch.randn(6, 5)
    module = fp.ProbabilisticTensorDictModule(
        ["params"],
        distribution_class=F.CompositeDistribution,
        distribution_kwargs={"distribution_map": {"a": "TanhNormal", "b": F.Categorical}},
        default_interaction_type=RANDOM,
        return_log_prob=True,
        generator=6,
    )
    return module, td


# --- safe modules and sequences ---


def narrow_td() -> TensorDict:
    """Parameters of which many draws leave [-1, 1]."""
    return TensorDict(loc=torch.randn(6, 4) * 2, scale=torch.ones(6, 4), batch_size=[6])


def boxed(library: Any) -> Made:
    spec = library.Bounded(-1.0, 1.0, shape=(4,))
    config: dict[str, Any] = {"default_interaction_type": RANDOM, "return_log_prob": True}
    return head(fp.SafeProbabilisticModule, spec=spec, safe=True, **config), narrow_td()


@case
def a_safe_module_with_a_spec_of_fastprob() -> Made:
    return boxed(specs)


@case
def a_safe_module_with_a_spec_of_torchrl() -> Made:
    return boxed(rl_data)


@case
def a_safe_module_with_a_composite_of_a_one_hot_spec() -> Made:
    module = fp.SafeProbabilisticModule(
        ["logits"],
        [("agents", "action")],
        rl_data.Composite({("agents", "action"): rl_data.OneHot(5)}),
        safe=True,
        distribution_class="OneHotCategorical",
        default_interaction_type=RANDOM,
        generator=1,
    )
    return module, TensorDict(logits=torch.randn(6, 5), batch_size=[6])


def network() -> tdnn.TensorDictModule:
    layers = nn.Sequential(nn.Linear(3, 8), tdnn.NormalParamExtractor())
    return tdnn.TensorDictModule(layers, in_keys=["observation"], out_keys=["loc", "scale"])


def observed() -> TensorDict:
    return TensorDict(observation=torch.randn(6, 3), batch_size=[6])


@case
def a_sequence() -> Made:
    last = head(default_interaction_type=RANDOM, return_log_prob=True, generator=9)
    return fp.ProbabilisticTensorDictSequential(network(), last), observed()


@case
def a_safe_sequence() -> Made:
    last, _ = boxed(specs)
    return fp.SafeProbabilisticTensorDictSequential(network(), last), observed()


def actor(**kwargs: Any) -> Made:
    policy = rl.ProbabilisticActor(
        network(),
        in_keys=["loc", "scale"],
        spec=rl_data.Bounded(-0.5, 0.5, shape=(4,)),
        safe=True,
        return_log_prob=True,
        **kwargs,
    )
    return fp.accelerate(policy), observed()


@case
def an_accelerated_actor() -> Made:
    return actor(distribution_class=rl.TanhNormal, default_interaction_type=RANDOM)


@case
def an_accelerated_actor_that_takes_the_deterministic_value() -> Made:
    return actor(distribution_class=rl.IndependentNormal)


@case
def an_accelerated_actor_with_a_seed() -> Made:
    return actor(
        distribution_class=rl.IndependentNormal, default_interaction_type=RANDOM, generator=7
    )


# --- the child ---


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[tuple, Any]]:
    """For each case, the answer of this process and that of the child."""
    torch.manual_seed(0)
    cases = {name: make() for name, make in CASES.items()}
    context = torch.multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=work, args=(cases, theirs))
    child.start()  # pickles the cases
    theirs.close()
    try:
        here = {n: (type(module).__name__, run(module, td)) for n, (module, td) in cases.items()}
        assert mine.poll(120), "the child does not answer"
        there = pickle.loads(mine.recv_bytes())
        child.join(60)
    finally:
        child.kill()
    return {name: (here[name], there[name]) for name in cases}


@pytest.mark.parametrize("name", CASES)
def test_a_spawned_worker_gets_the_same(name, answers):
    here, there = answers[name]
    assert not isinstance(there, str), there
    assert there[0] == here[0]
    for mine, theirs in zip(here[1], there[1], strict=True):
        assert list(mine) == list(theirs)
        for key, value in mine.items():
            assert theirs[key].dtype == value.dtype
            assert torch.equal(theirs[key], value), key


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_share_a_generator_as_their_originals_do(copied):
    policy, _ = two_heads_that_share_a_generator()
    first, second = (module.generator for module in copied(policy))
    assert first is second and first is not policy[0].generator
    assert torch.equal(first.get_state(), policy[0].generator.get_state())


def test_the_second_call_draws_anew(answers):
    """So that a child which loses its place in the stream is caught."""
    for name in ("a seed", "a generator that was drawn from", "an accelerated actor with a seed"):
        first, second = answers[name][0][1]
        assert not torch.equal(first["action"], second["action"])
