"""The generator= argument: which numbers are drawn, and what they leave behind."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from contextlib import contextmanager

import pytest
import torch
import torch._dynamo.testing
from tensordict import NonTensorData, TensorDict
from tensordict import nn as tdnn
from torch import distributions as D

import fastprob as fp
from fastprob import distributions as fpd
from fastprob.counter import CounterStream
from fastprob.rng import exponential, fold_in, standard_normal
from tests._modules import (
    assert_same,
    head,
    keys,
    normal_td,
    raises_and_writes_nothing,
    twins,
)


@contextmanager
def global_state_untouched():
    before = torch.get_rng_state()
    yield
    assert torch.equal(torch.get_rng_state(), before)


def logits_td(*batch):
    return TensorDict(logits=torch.randn(*batch, 5), batch_size=batch)


def uniform(loc, scale):
    return D.Independent(D.Uniform(loc, loc + scale), 1)


def made(names, *batch):
    return TensorDict({n: torch.rand(*batch, 5) + 0.5 for n in names}, batch_size=batch)


COMPOSITE = {"distribution_map": {"a": D.Normal, "b": D.Categorical}}
# Distribution and its parameters; the first four go through fastprob's operations, the last
# through its public methods.
CASES = {
    "normal": ({}, normal_td),
    "num_samples": ({"num_samples": (2, 3)}, normal_td),
    "categorical": ({"in_keys": ["logits"], "distribution_class": D.Categorical}, logits_td),
    "categorical, num_samples": (
        {"in_keys": ["logits"], "distribution_class": D.Categorical, "num_samples": 3},
        logits_td,
    ),
    "composite": (
        {
            "in_keys": ["params"],
            "out_keys": None,
            "distribution_class": tdnn.CompositeDistribution,
            "distribution_kwargs": COMPOSITE,
        },
        lambda *batch: TensorDict(
            params=TensorDict(a=normal_td(*batch), b=logits_td(*batch), batch_size=batch),
            batch_size=batch,
        ),
    ),
    "unknown to fastprob": ({"distribution_class": uniform}, normal_td),
}


def generator(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- a generator, an int ---


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("given", ["generator", "int"])
def test_the_draws_are_upstreams(name, given):
    kwargs, make = CASES[name]
    td = make(4)
    results = []
    for cls in (fp.ProbabilisticTensorDictModule, tdnn.ProbabilisticTensorDictModule):
        module = head(
            cls,
            default_interaction_type="random",
            generator=generator() if given == "generator" else 11,
            **kwargs,
        )
        with global_state_untouched():
            results.append([module(td.copy()) for _ in range(3)])
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)
    first, second, _ = results[0]
    key = keys(first)[-1]
    assert not torch.equal(first[key], second[key])


def test_a_generator_is_advanced_in_place():
    own, other = generator(), generator()
    module = head(generator=own, default_interaction_type="random")
    assert module.generator is own
    module(normal_td(4))
    torch.randn(4, 4, generator=other)
    assert torch.equal(own.get_state(), other.get_state())


def test_without_a_generator_the_global_state_is_advanced():
    module = head(default_interaction_type="random")
    assert module.generator is None
    before = torch.get_rng_state()
    module(normal_td(4))
    assert not torch.equal(torch.get_rng_state(), before)


def test_two_modules_may_share_a_generator():
    shared = generator()
    kwargs = {"generator": shared, "default_interaction_type": "random"}
    first, second = head(**kwargs), head(**kwargs)
    td = normal_td(4)
    draws = [m(td.copy())["action"] for m in (first, second)]
    one = head(generator=11, default_interaction_type="random")
    assert torch.equal(draws[0], one(td.copy())["action"])
    assert torch.equal(draws[1], one(td.copy())["action"])


@pytest.mark.parametrize("kind", ["mode", "median", "mean", "deterministic"])
def test_deterministic_types_do_not_advance_a_generator(kind):
    own = generator()
    state = own.get_state()
    module = head(generator=own, default_interaction_type=kind, return_log_prob=True)
    td = normal_td(4)
    with global_state_untouched():
        module(td)
    assert torch.equal(own.get_state(), state)
    td.set_non_tensor("seed", 5)
    out = head(generator="seed", default_interaction_type=kind)(td)
    assert out["seed"] == 5


class NoMean(D.Normal):
    """A distribution whose mean has to be estimated."""

    @property
    def mean(self):
        raise NotImplementedError


@pytest.mark.parametrize("kind", ["mean", "deterministic"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a composite"])
def test_an_estimated_mean_draws_from_the_generator(kind, inside):
    kwargs = {"n_empirical_estimate": 8, "default_interaction_type": kind}
    td = normal_td(4)
    if inside:
        kwargs |= {
            "in_keys": ["params"],
            "out_keys": ["action"],
            "distribution_class": tdnn.CompositeDistribution,
            "distribution_kwargs": {"distribution_map": {"action": NoMean}},
        }
        td = TensorDict(params=TensorDict(action=td, batch_size=[4]), batch_size=[4])
    else:
        kwargs["distribution_class"] = NoMean
    module = head(generator=generator(), **kwargs)
    with global_state_untouched(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        out = module(td.copy())
    params = td["params", "action"] if inside else td
    noise = torch.randn(8, 4, 4, generator=generator())
    torch.testing.assert_close(out["action"], (params["loc"] + noise * params["scale"]).mean(0))


# --- a key of the tensordict ---


@pytest.mark.parametrize("key", ["rng", ("agent", "rng")], ids=str)
def test_a_generator_in_the_tensordict(key):
    ours, theirs = twins(generator=key, default_interaction_type="random")
    assert ours.generator == key
    results = []
    for module in (ours, theirs):
        td = normal_td(4)
        td["loc"][:], td["scale"][:] = 0, 1
        own = generator()
        td.set_non_tensor(key, own)
        with global_state_untouched():
            results.append([module(td)["action"].clone() for _ in range(2)])
        assert td[key] is own
    torch.testing.assert_close(*results)
    assert not torch.equal(*results[0])


@pytest.mark.parametrize("how", ["tensor", "int"])
@pytest.mark.parametrize("key", ["rng", ("agent", "rng")], ids=str)
def test_a_seed_in_the_tensordict_is_replaced_by_the_next(how, key):
    ours, theirs = twins(
        generator=key, default_interaction_type="random", return_log_prob=True, log_prob_key="lp"
    )
    source = TensorDict(normal_td(4).to_dict())
    ours.distribution_class = theirs.distribution_class = D.Normal
    seen = []
    for module in (ours, theirs):
        td = source.copy()
        td.set(key, torch.tensor(17) if how == "tensor" else NonTensorData(17))
        seeds, values = [], []
        for _ in range(3):
            with global_state_untouched():
                assert module(td) is td
            seeds.append(int(td[key]))
            values.append(td["action"].clone())
            assert isinstance(td[key], torch.Tensor if how == "tensor" else int)
        seen.append((seeds, values))
    assert seen[0][0] == seen[1][0]
    torch.testing.assert_close(seen[0][1], seen[1][1])
    assert len({17, *seen[0][0]}) == 4
    first = torch.randn(4, 4, generator=generator(17)) * source["scale"] + source["loc"]
    torch.testing.assert_close(seen[0][1][0], first)


def test_the_next_tensor_seed_is_in_an_expanded_result():
    module = head(
        generator="rng",
        default_interaction_type="random",
        num_samples=2,
        distribution_class=D.Normal,
    )
    td = TensorDict(loc=torch.zeros(4), scale=torch.ones(4), rng=torch.tensor(17))
    out = module(td)
    assert td["rng"].shape == ()
    assert out["rng"].tolist() == [td["rng"].item()] * 2
    assert td["rng"] != 17


def test_the_next_seed_is_in_the_result_also_where_that_is_another_tensordict():
    module = head(generator="rng", default_interaction_type="random", num_samples=2)
    theirs = head(
        tdnn.ProbabilisticTensorDictModule,
        generator="rng",
        default_interaction_type="random",
        num_samples=2,
    )
    results = []
    for m in (module, theirs):
        td = normal_td(4)
        td["loc"][:], td["scale"][:] = 0, 1
        td.set("rng", NonTensorData(17, batch_size=[4]))
        out = m(td)
        assert td["rng"] != 17
        assert out.get("rng").data == td["rng"]
        results.append(out["action"])
    torch.testing.assert_close(*results)


def test_a_missing_key_draws_from_the_default_generator():
    ours = head(generator="rng", default_interaction_type="random")
    td = normal_td(4)
    torch.manual_seed(4)
    value = ours(td.copy())["action"]
    torch.manual_seed(4)
    assert torch.equal(value, head(default_interaction_type="random")(td.copy())["action"])


def test_tensordict_out_and_the_seed():
    module = head(generator="rng", default_interaction_type="random")
    td = normal_td(4)
    td.set_non_tensor("rng", 17)
    out = module(td, TensorDict(batch_size=[4]))
    assert keys(out) == ["action"]
    assert td["rng"] != 17


@pytest.mark.parametrize(
    ("value", "parts", "kind"),
    [
        (torch.zeros(4, dtype=torch.int64), ("'rng'", "one seed", "(4,)"), ValueError),
        (NonTensorData("seven"), ("'rng'", "torch.Generator", "str"), TypeError),
        (NonTensorData(True), ("'rng'", "int", "bool"), TypeError),
        (NonTensorData(1.5), ("'rng'", "int", "float"), TypeError),
    ],
    ids=["vector", "string", "bool", "float"],
)
def test_a_key_that_holds_something_else(value, parts, kind):
    module = head(generator="rng", default_interaction_type="random")
    td = normal_td(4)
    td.set("rng", value)
    with global_state_untouched(), raises_and_writes_nothing(kind, td, *parts):
        module(td)


@pytest.mark.parametrize("value", [1.5, True, [3], torch.tensor(3)], ids=str)
def test_an_argument_of_a_wrong_type(value):
    with pytest.raises(TypeError, match=r"generator must be a torch.Generator") as caught:
        head(generator=value)
    assert type(value).__name__ in str(caught.value)


def test_a_failed_call_does_not_write_the_next_seed():
    module = head(generator="rng", default_interaction_type="random", distribution_class=D.Normal)
    td = TensorDict(loc=torch.zeros(4), scale=torch.ones(4), batch_size=[4])
    td.set_non_tensor("rng", 17)
    bad = TensorDict(batch_size=[5])
    with raises_and_writes_nothing(RuntimeError, td, "(5,)"):
        module(td, bad)
    assert keys(bad) == []


# --- sequences, compile ---


def test_a_sequence_uses_the_generator_of_its_head():
    results = []
    for library in (fp, tdnn):
        seq = library.ProbabilisticTensorDictSequential(
            tdnn.TensorDictModule(lambda x: (x, x.exp()), ["obs"], ["loc", "scale"]),
            head(
                library.ProbabilisticTensorDictModule,
                generator=5,
                default_interaction_type="random",
            ),
        )
        with global_state_untouched():
            results.append([seq(TensorDict(obs=torch.ones(3, 2), batch_size=[3])) for _ in "ab"])
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)


def test_get_dist_of_a_composite_sequence_uses_each_generator():
    def sequence(library):
        first = library.ProbabilisticTensorDictModule(
            in_keys=["loc", "scale"],
            out_keys=["x"],
            distribution_class=D.Normal,
            default_interaction_type="random",
            generator=5,
        )
        second = library.ProbabilisticTensorDictModule(
            in_keys={"loc": "x"},
            out_keys=["y"],
            distribution_class=D.Normal,
            distribution_kwargs={"scale": 1.0},
            default_interaction_type="random",
        )
        return library.ProbabilisticTensorDictSequential(first, second)

    td = normal_td(3)
    with global_state_untouched(), fp.set_interaction_type("random"):
        ours, theirs = (sequence(lib).get_dist(td).dists["y"].loc for lib in (fp, tdnn))
    torch.testing.assert_close(ours, theirs)


BACKENDS = ["aot_eager", "inductor"]


def source_of(how: str) -> torch.Generator | int | str | None:
    return {"none": None, "generator": generator(), "int": 11, "key": "rng"}[how]


@pytest.mark.parametrize("name", [n for n in CASES if n != "unknown to fastprob"])
@pytest.mark.parametrize("how", ["none", "generator", "int", "key"])
def test_compiled_draws_what_eager_draws(name, how):
    kwargs, make = CASES[name]
    source = make(4)
    source.batch_size = []
    source["rng"] = torch.tensor(17)
    results, seeds = [], []
    for compiled in (False, True):
        torch._dynamo.reset()
        module = head(default_interaction_type="random", generator=source_of(how), **kwargs)
        call = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        torch.manual_seed(3)
        td = source.copy()
        for _ in range(3):
            out = call(td.copy())
            if how == "key":
                # num_samples: the result holds one for each sample.
                td["rng"] = out["rng"].flatten()[0]
            results.append(out)
            seeds.append(int(td["rng"]))
    assert seeds[:3] == seeds[3:]
    assert len(set(seeds)) == (3 if how == "key" else 1)
    for eager, graph in zip(results[:3], results[3:], strict=True):
        assert_same(graph, eager)
    drawn = "a" if name == "composite" else "action"
    assert not torch.equal(results[0][drawn], results[1][drawn])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [True, False])
def test_equal_draws_of_one_graph_are_different_draws_in_order(backend, grad):
    """Three heads of the same parameters: no compiler may merge or reorder their noise."""
    source = normal_td(4)
    for how in ("none", "generator"):
        results = []
        for compiled in (False, True):
            own = source_of(how)
            heads = [
                head(
                    out_keys=[key],
                    default_interaction_type="random",
                    generator=own,
                    return_log_prob=True,
                    log_prob_key=key + "_lp",
                )
                for key in "abc"
            ]

            def run(td, heads=heads):
                for module in heads:
                    td = module(td)
                return td

            torch._dynamo.reset()
            torch.manual_seed(3)
            call = torch.compile(run, backend=backend, fullgraph=True) if compiled else run
            leaves = {k: v.clone().requires_grad_(grad) for k, v in source.items()}
            td = call(TensorDict(leaves, batch_size=[4]))
            if grad:
                sum((i + 1) * td[k].square().sum() for i, k in enumerate(heads_keys())).backward()
                td["loc_grad"], td["scale_grad"] = leaves["loc"].grad, leaves["scale"].grad
            results.append(td.detach())
        assert_same(results[1], results[0])
        assert not torch.equal(results[1]["a"], results[1]["b"])


def heads_keys() -> list[str]:
    return [key + suffix for suffix in ("", "_lp") for key in "abc"]


def test_a_compiled_call_advances_the_generator_in_place():
    own, other = generator(), generator()
    module = head(generator=own, default_interaction_type="random")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    td = normal_td(4)
    with global_state_untouched():
        drawn = [m(td.copy())["action"] for m in (compiled, module, compiled)]
    for value in drawn:
        noise = torch.randn(4, 4, generator=other)
        torch.testing.assert_close(value, td["loc"] + noise * td["scale"])
    assert torch.equal(own.get_state(), other.get_state())


def test_one_graph_serves_many_streams():
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    td = normal_td(4)
    drawn = []
    for seed in (1, 2, 3):
        module = head(generator=seed, default_interaction_type="random")
        compiled = torch.compile(module, backend=frames, fullgraph=True)
        drawn.append(compiled(td.copy())["action"])
        again = head(generator=seed, default_interaction_type="random")
        assert_same(TensorDict(a=drawn[-1]), TensorDict(a=again(td.copy())["action"]))
    assert frames.frame_count == 1
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("held", [NonTensorData(5), NonTensorData(torch.Generator())])
def test_under_compile_a_key_must_hold_a_tensor(held):
    module = head(generator="rng", default_interaction_type="random")
    td = TensorDict(normal_td(4).to_dict())
    td.set("rng", held)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"the generator key 'rng' holds a \w+, which would become"):
        compiled(td)
    with fp.set_interaction_type("mode"):
        assert torch.equal(compiled(td)["action"], td["loc"])


def test_under_compile_a_distribution_takes_no_generator():
    own = generator()

    def draw(loc):
        return fpd.Normal(loc, torch.ones_like(loc)).rsample_and_log_prob(generator=own)

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"Give it to the module"):
        torch.compile(draw, backend="aot_eager", fullgraph=True)(torch.zeros(3))


def test_under_compile_an_unknown_distribution_takes_no_generator():
    module = head(distribution_class=uniform, generator=3, default_interaction_type="random")
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"a distribution that fastprob does not know"):
        compiled(normal_td(4))


# --- a CounterStream ---


COUNTED = {
    **{n: c for n, c in CASES.items() if n != "unknown to fastprob"},
    **{
        name: (
            {"in_keys": list(params), "distribution_class": cls},
            functools.partial(made, params),
        )
        for name, cls, params in (
            ("tanh normal", "TanhNormal", ("loc", "scale")),
            ("bernoulli", D.Bernoulli, ("logits",)),
            ("beta", D.Beta, ("concentration1", "concentration0")),
        )
    },
    "truncated normal": (
        {
            "distribution_class": "TruncatedNormal",
            "distribution_kwargs": {"low": -1.0, "high": 1.0},
        },
        normal_td,
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_counter_stream_compiled_and_eager_and_resumed(name):
    kwargs, make = COUNTED[name]
    td = make(4)
    eager, other, later = (
        head(default_interaction_type="random", generator=CounterStream(7), **kwargs) for _ in "abc"
    )
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    with global_state_untouched(), torch.no_grad():
        results = [[call(td.copy()) for _ in range(3)] for call in (eager, compiled)]
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)
    assert torch.equal(eager.generator.state, other.generator.state)
    drawn = "a" if name == "composite" else "action"
    assert not torch.equal(results[0][0][drawn], results[0][1][drawn])
    later.load_state_dict(other.state_dict())
    assert list(later.state_dict()) == ["counter_stream.state"]
    assert_same(later(td.copy()), eager(td.copy()))


def test_a_counter_stream_draws_the_distribution():
    """Shares of 40,000 draws; 5 standard deviations are 0.0125 at most."""
    n = 40_000
    weights = torch.tensor([0.1, 0.0, 0.6, 0.3])
    stream = CounterStream(3)
    for module, size in (
        (head(in_keys=["probs"], distribution_class=D.Categorical, generator=stream), n),
        (
            head(
                in_keys=["probs"], distribution_class=D.Categorical, generator=stream, num_samples=n
            ),
            1,
        ),
    ):
        td = TensorDict(probs=weights.expand(size, 4), batch_size=[size])
        drawn = module(td, interaction_type="random")["action"].flatten()
        shares = torch.bincount(drawn, minlength=4) / n
        assert shares[1] == 0
        torch.testing.assert_close(shares, weights, rtol=0, atol=0.0125)
    beta = head(
        in_keys=["concentration1", "concentration0"], distribution_class=D.Beta, generator=stream
    )
    td = TensorDict(concentration1=torch.full((n,), 2.0), concentration0=torch.ones(n))
    value = beta(td, interaction_type="random")["action"]
    assert abs(float(value.mean()) - 2 / 3) < 0.0125
    assert abs(float(value.var()) - 1 / 18) < 0.002


def test_a_large_draw_of_a_counter_stream_is_one_draw():
    """Eager draws of this size are made in pieces, which would be several draws of a stream."""
    td = normal_td(65536, event=16)
    for cls in ("IndependentNormal", "TanhNormal"):
        stream = CounterStream(1)
        module = head(distribution_class=cls, generator=stream, return_log_prob=True)
        with torch.no_grad():
            value = module(td.copy(), interaction_type="random")["action"]
        assert stream.state.tolist() == [1, 1]
        noise = CounterStream(1).standard_normal((65536, 16))
        expected = td["loc"] + noise * td["scale"]
        expected = expected.tanh() if cls == "TanhNormal" else expected
        torch.testing.assert_close(value, expected)


def test_a_counter_stream_of_another_device_and_unknown_distributions():
    module = head(generator=CounterStream(1, device="meta"), default_interaction_type="random")
    with pytest.raises(ValueError, match=r"on meta and the parameters are on cpu"):
        module(normal_td(4))
    module = head(
        generator=CounterStream(1), distribution_class=uniform, default_interaction_type="random"
    )
    with pytest.raises(TypeError, match=r"not from a CounterStream"):
        module(normal_td(4))


def test_fold_in_of_a_counter_stream():
    td = normal_td(4)
    shared = CounterStream(3)
    heads = [head(generator=shared, default_interaction_type="random", out_keys=[k]) for k in "ab"]
    policy = fold_in(fp.ProbabilisticTensorDictSequential(*heads), 2)
    assert heads[0].generator is heads[1].generator is shared
    direct = fold_in(CounterStream(3), 2)
    assert torch.equal(shared.state, direct.state)
    assert not torch.equal(shared.state, CounterStream(3).state)
    again = head(generator=direct, default_interaction_type="random", out_keys=["a"])
    assert torch.equal(policy(td.copy())["a"], again(td.copy())["a"])


def test_modules_that_share_a_generator_go_on_sharing_one_when_folded():
    shared = generator()
    heads = [head(generator=shared, default_interaction_type="random", out_keys=[k]) for k in "ab"]
    fold_in(fp.ProbabilisticTensorDictSequential(*heads), 2)
    assert heads[0].generator is heads[1].generator is not shared


# --- stop and resume ---


def four_draws(module, td):
    return [module(td.copy())["action"] for _ in range(4)]


@pytest.mark.parametrize("how", ["generator", "int"])
@pytest.mark.parametrize("before", [0, 3])
def test_a_stream_resumes_bit_by_bit(how, before):
    td = normal_td(4)
    first = head(generator=source_of(how), default_interaction_type="random")
    for _ in range(before):
        first(td.copy())
    saved = first.state_dict()
    assert list(saved) == ["generator_state"]
    rest = four_draws(first, td)
    for called in (0, 1):
        second = head(
            generator=generator(99) if how == "generator" else 99, default_interaction_type="random"
        )
        for _ in range(called):
            second(td.copy())
        second.load_state_dict(saved)
        assert all(map(torch.equal, rest, four_draws(second, td)))
    # Loading and saving again without a call in between.
    third = head(generator=99, default_interaction_type="random")
    third.load_state_dict(saved)
    assert torch.equal(third.state_dict()["generator_state"], saved["generator_state"])


def test_a_seed_of_64_bits_resumes():
    td = normal_td(4)
    first, second = (
        head(generator=seed, default_interaction_type="random") for seed in (2**64 - 3, 0)
    )
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(td.copy())["action"], second(td.copy())["action"])


def test_modules_without_a_generator_have_the_keys_of_upstream():
    ours, theirs = twins()
    assert list(ours.state_dict()) == list(theirs.state_dict()) == []
    assert list(head(generator="rng").state_dict()) == []
    # What upstream has saved loads, and leaves the stream where it is.
    module = head(generator=5, default_interaction_type="random")
    module.load_state_dict(theirs.state_dict())
    td = normal_td(4)
    again = head(generator=5, default_interaction_type="random")
    assert torch.equal(module(td.copy())["action"], again(td.copy())["action"])


@pytest.mark.parametrize(
    "state", [torch.zeros(3), torch.zeros(17, dtype=torch.uint8), "seven"], ids=str
)
def test_a_state_that_is_none(state):
    module = head(generator=generator())
    with pytest.raises(RuntimeError, match=r"generator_state: (the state of a stream is|a state)"):
        module.load_state_dict({"generator_state": state})


def test_a_module_without_a_generator_refuses_the_state_of_one():
    with pytest.raises(RuntimeError, match=r"Unexpected key.*generator_state"):
        head().load_state_dict(head(generator=3).state_dict())


def test_a_copy_is_a_stream_of_its_own_also_compiled():
    td = normal_td(4)
    module = head(generator=5, default_interaction_type="random")
    module(td.copy())
    copied = copy.deepcopy(module)
    torch._dynamo.reset()
    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)
    rest = four_draws(module, td)
    torch.testing.assert_close(rest, four_draws(compiled, td))


def test_to_another_device_a_seed_goes_on_from_a_seed_of_its_own():
    td = normal_td(4)
    module = head(generator=5, default_interaction_type="random")
    module.to(torch.float64)
    module(td.copy())
    expected = int(
        torch.randint(0, 2**62, (), generator=pickle.loads(pickle.dumps(module.generator)))
    )
    module.to(torch.float32)
    assert module._stream.generator is not None
    module.to("meta")
    assert module._stream.generator is None
    assert module._stream.seed == expected


# --- ranks and workers ---


def test_no_two_workers_share_a_stream():
    seeds = [fold_in(7, i) for i in range(20_000)]
    assert all(0 <= s < 2**63 for s in seeds)
    # What torch's CPU generator takes of a seed.
    assert len({s & 0xFFFFFFFF for s in seeds}) == len(seeds)
    assert torch.equal(
        torch.randn(3, generator=generator(5)), torch.randn(3, generator=generator(5 + 2**32))
    )
    # Other seeds give other streams, also of the neighbouring index.
    others = {fold_in(s, i) for s in range(100) for i in range(100)}
    assert len(others) == 10_000


def test_folded_seeds_look_random():
    bits = torch.tensor([[(fold_in(s, i) >> b) & 1 for b in range(63)] for s in range(40)
                         for i in range(100)], dtype=torch.float64)  # fmt: skip
    # 63 means of 4,000 fair bits, of standard deviation 0.008: none is 5 of them away.
    assert (bits.mean(0) - 0.5).abs().max() < 0.04


@pytest.mark.parametrize("seed", [0, 1, -5, 2**62, 2**63 - 1, -(2**63)])
def test_fold_in_of_a_tensor_is_that_of_the_int(seed):
    for index in (0, 1, 77, 2**32 - 1):
        folded = fold_in(torch.tensor([seed, 3]), index)
        assert folded.tolist() == [fold_in(seed, index), fold_in(3, index)]


def test_fold_in_of_a_tensor_compiles_without_a_look_at_it():
    torch._dynamo.reset()
    compiled = torch.compile(lambda s: fold_in(s, 3), backend="aot_eager", fullgraph=True)
    assert int(compiled(torch.tensor(9))) == fold_in(9, 3)


def test_fold_in_of_modules_and_generators():
    td = normal_td(4)

    def make(seed, shared=None):
        heads = [
            head(generator=g, default_interaction_type="random", out_keys=[k])
            for k, g in (("a", seed), ("b", shared))
        ]
        return tdnn.ProbabilisticTensorDictSequential(*heads)

    workers = [fold_in(make(5, generator()), i) for i in range(3)]
    outs = [w(td.copy()) for w in workers]
    again = fold_in(make(5, generator()), 1)(td.copy())
    assert_same(outs[1], again)
    for key in "ab":
        assert not torch.equal(outs[0][key], outs[1][key])
        assert not torch.equal(outs[1][key], outs[2][key])
    direct = head(generator=fold_in(5, 2), default_interaction_type="random", out_keys=["a"])
    assert torch.equal(direct(td.copy())["a"], outs[2]["a"])
    # A generator that was drawn from folds by its initial seed.
    used = generator()
    torch.randn(3, generator=used)
    torch.testing.assert_close(
        torch.randn(3, generator=fold_in(used, 1)),
        torch.randn(3, generator=generator(fold_in(11, 1))),
    )


@pytest.mark.parametrize(
    ("source", "index", "kind", "said"),
    [
        (3, -1, ValueError, "from 0 to"),
        (3, 2**32, ValueError, "from 0 to"),
        (3, 1.0, ValueError, "from 0 to"),
        (3, True, ValueError, "from 0 to"),
        ("seed", 1, TypeError, "got str"),
        (True, 1, TypeError, "got bool"),
        (torch.zeros(2), 1, TypeError, "a tensor of torch.float32"),
    ],
)
def test_fold_in_of_something_else(source, index, kind, said):
    with pytest.raises(kind, match=said):
        fold_in(source, index)


def test_fold_in_of_a_module_whose_seed_is_in_the_tensordict():
    with pytest.raises(ValueError, match=r"fold_in\(tensordict\['rng'\], index\)"):
        fold_in(head(generator="rng"), 1)


# --- the functions ---


def test_noise_of_the_functions():
    like = torch.zeros(3, 4, dtype=torch.float64)
    torch.manual_seed(0)
    noise = standard_normal(torch.Size((2, 3, 4)), like)
    assert noise.dtype is torch.float64
    torch.manual_seed(0)
    assert torch.equal(noise, torch.randn(2, 3, 4, dtype=torch.float64))
    # The noise of a transposed tensor is that of its shape, not that of its layout.
    torch.manual_seed(0)
    transposed = standard_normal(like.shape, like.t().contiguous().t())
    torch.manual_seed(0)
    assert torch.equal(transposed, torch.randn(3, 4, dtype=torch.float64))
    drawn = exponential(torch.Size((5,)), like, generator())
    assert torch.equal(
        drawn, torch.zeros(5, dtype=torch.float64).exponential_(generator=generator())
    )


def test_integer_parameters_cannot_be_sampled():
    td = TensorDict(loc=torch.zeros(3, dtype=torch.int64), scale=torch.ones(3, dtype=torch.int64))
    module = head(distribution_class=D.Normal, default_interaction_type="random")
    with raises_and_writes_nothing(TypeError, td, "floating-point", "torch.int64", ".float()"):
        module(td)


def test_the_joint_methods_take_a_generator():
    td = normal_td(4)
    for cls in (fpd.IndependentNormal, fpd.TanhNormal):
        dist = cls(td["loc"], td["scale"])
        with global_state_untouched():
            first = dist.rsample_and_log_prob(generator=generator())
            again = dist.sample_and_log_prob(generator=generator())
        torch.testing.assert_close(first, again)


@pytest.mark.parametrize("source", ["none", "generator", "int", "key"])
def test_in_a_sequence_of_upstreams_the_same_conditional_distribution(source):
    def parameters():
        return TensorDict(loc=torch.zeros(3), scale=torch.ones(3), seed=torch.tensor(5))

    outs = []
    for cls in (fp.ProbabilisticTensorDictModule, tdnn.ProbabilisticTensorDictModule):
        generator = {"generator": torch.Generator().manual_seed(3), "int": 3, "key": "seed"}
        first, second = (
            cls(
                in_keys={"loc": loc, "scale": "scale"},
                out_keys=[out],
                distribution_class=D.Normal,
                default_interaction_type="random",
                generator=generator.get(source),
            )
            for loc, out in (("loc", "a"), ("a", "b"))
        )
        seq = tdnn.ProbabilisticTensorDictSequential(first, second)
        torch.manual_seed(0)
        outs.append(torch.stack([seq.get_dist(parameters()).dists["b"].loc for _ in range(2)]))
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    assert (outs[0][0] == outs[0][1]).all().item() is (source == "key")


@pytest.mark.parametrize(
    "dist, params, kwargs",
    [
        ("IndependentNormal", ["loc", "scale"], {}),
        ("TanhNormal", ["loc", "scale"], {}),
        ("TruncatedNormal", ["loc", "scale"], {"low": -1.0, "high": 1.0}),
        ("Beta", ["concentration1", "concentration0"], {}),
        ("OneHotCategorical", ["logits"], {}),
    ],
)
def test_compiled_draws_backpropagate(dist, params, kwargs):
    module = head(
        in_keys=params,
        distribution_class=dist,
        distribution_kwargs=kwargs,
        default_interaction_type="random",
        return_log_prob=True,
    )
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    grads = []
    for call in (module, compiled):
        torch.manual_seed(1)
        leaves = [torch.rand(6, 4).add_(0.2).requires_grad_() for _ in params]
        td = call(TensorDict(dict(zip(params, leaves, strict=True)), batch_size=[6]))
        (td["action"].square().sum() + td["sample_log_prob"].sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(grads[1], grads[0])
    assert all(g.abs().max() > 0 for g in grads[0])
