"""The generator= argument: which numbers are drawn, and what they leave behind."""

from __future__ import annotations

import warnings
from contextlib import contextmanager

import pytest
import torch
from tensordict import NonTensorData, TensorDict
from tensordict import nn as tdnn
from torch import distributions as D

import fastprob as fp
from fastprob import distributions as fpd
from fastprob.rng import exponential, standard_normal
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


def test_compile_does_not_ignore_a_generator():
    module = head(generator=generator(), default_interaction_type="random")
    td = normal_td(4)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"generator= is not supported under torch.compile"):
        compiled(td.copy())
    with fp.set_interaction_type("mode"):
        assert torch.equal(compiled(td.copy())["action"], td["loc"])


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
