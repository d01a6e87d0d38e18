"""Bad input: an error that names what was given and what is right, and nothing written."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict import nn as tdnn
from torch import distributions as D

import fastprob as fp
from fastprob import (
    ProbabilisticTensorDictSequential,
    SafeProbabilisticModule,
    set_interaction_type,
    specs,
)
from fastprob import distributions as fpd
from tests._modules import head, indep_normal, keys, normal_td, raises_and_writes_nothing


@pytest.fixture(params=["module", "sequence", "safe", "num_samples", "generator"])
def wrap(request):
    """A head alone, at the end of a sequence, safe, and with what else acts around a call."""
    kind = request.param

    def make(**kwargs):
        if kind == "module":
            return head(**kwargs)
        if kind == "sequence":
            return ProbabilisticTensorDictSequential(head(**kwargs))
        if kind == "safe":
            return head(SafeProbabilisticModule, spec=specs.Bounded(-1, 1, ()), safe=True, **kwargs)
        if kind == "num_samples":
            return head(num_samples=2, **kwargs)
        return head(generator=3, **kwargs)

    return make


@pytest.fixture
def validated():
    """torch's default of checking arguments, which importing TorchRL switches off for all."""
    before = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(True)
    yield
    D.Distribution.set_default_validate_args(before)


# --- keys and keywords ---


@pytest.mark.parametrize("key", ["scale", ("net", "scale")], ids=str)
@pytest.mark.parametrize("build", [D.Normal, indep_normal, "normal"], ids=str)
def test_a_missing_in_key(wrap, key, build):
    module = wrap(in_keys=["loc", key], distribution_class=build, return_log_prob=True)
    td = TensorDict(loc=torch.zeros(3), batch_size=[3])
    td["net", "other"] = torch.zeros(3)
    with raises_and_writes_nothing(
        KeyError, td, repr(key), "'scale'", "no such entry", "loc", "other"
    ):
        module(td)
    for method in ("get_dist", "build_dist_from_params", "log_prob"):
        with raises_and_writes_nothing(KeyError, td, repr(key), "no such entry", "loc"):
            getattr(module, method)(td)


def test_a_missing_in_key_of_a_call_with_tensors():
    with pytest.raises(KeyError) as caught:
        head()(loc=torch.zeros(3, 4))
    assert "'scale'" in str(caught.value)
    assert "['loc']" in str(caught.value)


def test_a_missing_in_key_of_an_earlier_module():
    net = tdnn.TensorDictModule(lambda x: (x, x.exp()), ["obs"], ["loc", "scale"])
    td = TensorDict(other=torch.zeros(3), batch_size=[3])
    with raises_and_writes_nothing(KeyError, td, "obs"):
        ProbabilisticTensorDictSequential(net, head())(td)


def test_a_missing_value_to_score(wrap):
    td = normal_td(3)
    with raises_and_writes_nothing(KeyError, td, "scores 'action'", "'loc', 'scale'"):
        wrap().log_prob(td)


@pytest.mark.parametrize(
    ("in_keys", "kwargs", "parts"),
    [
        (["mean", "scale"], {}, ("['mean', 'scale']", "'mean'", "loc", "dictionary")),
        (["loc"], {}, ("['loc']", "scale", "dictionary")),
        (["loc", "scale"], {"df": 3}, ("['df', 'loc', 'scale']", "'df'", "distribution_kwargs")),
        ({"mu": "loc", "scale": "scale"}, {}, ("['mu', 'scale']", "'mu'", "loc")),
    ],
    ids=["a wrong name", "one too few", "one too many", "a wrong name in a dictionary"],
)
@pytest.mark.parametrize(
    "build", [D.Normal, D.Laplace, fpd.TanhNormal, fpd.IndependentNormal, indep_normal]
)
def test_keywords_that_do_not_match(wrap, in_keys, kwargs, parts, build):
    module = wrap(in_keys=in_keys, distribution_class=build, distribution_kwargs=kwargs)
    td = normal_td(3)
    td["mean"] = td["loc"]
    with raises_and_writes_nothing(TypeError, td, "do not match", *parts[:2], "in_keys="):
        module(td)
    if build is not indep_normal:
        # A function that takes anything cannot say what it expects.
        with raises_and_writes_nothing(TypeError, td, "it accepts", *parts):
            module.get_dist(td)


def test_an_error_of_the_distribution_itself_comes_through():
    def build(loc, scale):
        raise TypeError("a message of its own")

    td = normal_td(3)
    with raises_and_writes_nothing(TypeError, td, "a message of its own"):
        head(distribution_class=build)(td)


# --- names ---


@pytest.mark.parametrize("name", ["default_interaction_type", "default_interaction_mode"])
@pytest.mark.parametrize("value", ["modal", "", 3, True])
@pytest.mark.filterwarnings("ignore:default_interaction_mode is deprecated:DeprecationWarning")
def test_an_unknown_interaction_type(name, value):
    with pytest.raises(ValueError, match="default_interaction_type must be") as caught:
        head(**{name: value})
    said = str(caught.value)
    assert repr(value) in said
    for known in ("mode", "median", "mean", "random", "deterministic"):
        assert repr(known) in said


@pytest.mark.parametrize("name", ["norml", "", "torch.distributions.Normal"])
def test_an_unknown_distribution_name(name):
    with pytest.raises(ValueError, match="distribution_class") as caught:
        head(distribution_class=name)
    said = str(caught.value)
    assert repr(name) in said
    for known in ("normal", "tanhnormal", "delta", "categorical"):
        assert repr(known) in said
    assert "Pass the class itself" in said


@pytest.mark.parametrize("value", [3, None, torch.zeros(3)], ids=str)
def test_a_distribution_class_that_builds_nothing(value):
    with pytest.raises(TypeError, match="distribution_class must be") as caught:
        head(distribution_class=value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("built", [None, torch.zeros(3)], ids=str)
def test_a_callable_that_builds_no_distribution(wrap, built):
    td = normal_td(3)
    module = wrap(distribution_class=lambda loc, scale: built)
    with raises_and_writes_nothing(
        TypeError, td, "torch.distributions.Distribution", type(built).__name__
    ):
        module(td)


# --- specs ---


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        (specs.Composite({"act": specs.Bounded(-1, 1, (4,))}), ("['act']", "['action']")),
        (
            specs.Composite({"action": specs.Bounded(-1, 1, (4,)), "x": specs.Unbounded((1,))}),
            ("['action', 'x']", "['action']", "['x']"),
        ),
        (
            specs.Composite({"agent": {"action": specs.Bounded(-1, 1, (4,))}}),
            ("('agent', 'action')", "['action']"),
        ),
    ],
    ids=["another", "one more", "nested"],
)
@pytest.mark.parametrize("safe", [False, True])
def test_spec_keys_that_are_no_out_keys(spec, parts, safe):
    with pytest.raises(RuntimeError, match="spec keys and out_keys do not match") as caught:
        head(SafeProbabilisticModule, spec=spec, safe=safe)
    for part in parts:
        assert part in str(caught.value)


def test_setting_a_spec_of_other_keys():
    module = head(SafeProbabilisticModule, spec=specs.Bounded(-1, 1, (4,)), safe=True)
    before = module.spec
    with pytest.raises(RuntimeError, match="spec keys and out_keys do not match") as caught:
        module.spec = specs.Composite({"act": specs.Bounded(-1, 1, (4,))})
    assert "['act']" in str(caught.value)
    assert module.spec is before


def test_one_spec_for_several_keys():
    with pytest.raises(RuntimeError, match="one spec cannot serve") as caught:
        SafeProbabilisticModule(
            in_keys=["params"],
            out_keys=["a", "b"],
            spec=specs.Bounded(-1, 1, (4,)),
            distribution_class=fp.CompositeDistribution,
        )
    assert "['a', 'b']" in str(caught.value)
    assert "Composite" in str(caught.value)


@pytest.mark.parametrize("spec", [None, specs.Composite({"action": None}), specs.Composite()])
def test_safe_without_a_spec(spec):
    with pytest.raises(RuntimeError, match="safe=True without a spec") as caught:
        head(SafeProbabilisticModule, spec=spec, safe=True)
    assert "pass spec=" in str(caught.value)
    assert "safe=False" in str(caught.value)


@pytest.mark.parametrize("spec", [3, "bounded", torch.zeros(4), D.Normal(0, 1)], ids=str)
def test_a_spec_that_is_none(spec):
    with pytest.raises(TypeError, match="expected a spec") as caught:
        head(SafeProbabilisticModule, spec=spec)
    assert type(spec).__name__ in str(caught.value)


@pytest.mark.parametrize("shape", [(5,), (2, 4), (3, 5), (4, 1)], ids=str)
@pytest.mark.parametrize("kind", ["mode", "random"])
def test_a_spec_whose_shape_does_not_fit(shape, kind):
    module = head(
        SafeProbabilisticModule,
        spec=specs.Bounded(-1, 1, shape),
        safe=True,
        return_log_prob=True,
        default_interaction_type=kind,
    )
    td = normal_td(3)
    for _ in range(2):
        with raises_and_writes_nothing(
            ValueError, td, "(3, 4)", "'action'", str(shape), "trailing dimensions"
        ):
            module(td)


def test_a_value_that_fits_does_not_let_the_next_one_through():
    module = head(SafeProbabilisticModule, spec=specs.Bounded(-1, 1, (4,)), safe=True)
    module(normal_td(3))
    td = normal_td(3, event=5)
    with raises_and_writes_nothing(ValueError, td, "(3, 5)", "(4,)"):
        module(td)


# --- log-prob keys ---


@pytest.mark.parametrize(
    ("out_keys", "given", "named"),
    [
        (["action"], {"log_prob_key": "action"}, "'action'"),
        (["action"], {"log_prob_keys": ["action"]}, "'action'"),
        ([("a", "b")], {"log_prob_key": ("a", ("b",))}, "('a', 'b')"),
        (["sample_log_prob"], {}, "'sample_log_prob'"),
    ],
    ids=str,
)
def test_a_log_prob_key_that_is_a_sampled_key(out_keys, given, named):
    with pytest.raises(ValueError, match="sampled key") as caught:
        head(out_keys=out_keys, return_log_prob=True, **given)
    assert named in str(caught.value)
    assert "Choose another log_prob_key" in str(caught.value)


# --- parameters out of their domain ---

NAN, INF = float("nan"), float("inf")
BAD = [
    ("loc", NAN, "real, not NaN"),
    ("scale", NAN, "greater than 0"),
    ("scale", 0.0, "greater than 0"),
    ("scale", -0.5, "greater than 0"),
    ("scale", -INF, "greater than 0"),
]


@pytest.mark.parametrize(("name", "value", "wanted"), BAD, ids=str)
@pytest.mark.parametrize("build", [D.Normal, fpd.TanhNormal, fpd.IndependentNormal])
def test_parameters_out_of_their_domain(wrap, validated, name, value, wanted, build):
    td = normal_td(3)
    td[name][1, 2] = value
    module = wrap(distribution_class=build, return_log_prob=True)
    parts = (f"expects {name} to be {wanted}", "1 of 12", "(3, 4)", "(1, 2)", str(value))
    with raises_and_writes_nothing(ValueError, td, *parts):
        module(td)
    with raises_and_writes_nothing(ValueError, td, *parts):
        module.get_dist(td)
    td[name][1, 2] = 1.0
    assert "action" in keys(module(td))


@pytest.mark.parametrize(("name", "value", "wanted"), BAD, ids=str)
def test_parameters_of_a_callable(wrap, validated, name, value, wanted):
    td = normal_td(3)
    td[name][1, 2] = value
    # torch's own check, in the call that builds torch's distribution.
    with raises_and_writes_nothing(ValueError, td, f"parameter {name}"):
        wrap()(td)


@pytest.mark.parametrize("kind", ["logits", "probs"])
@pytest.mark.parametrize("build", [D.Categorical, tdnn.distributions.OneHotCategorical])
def test_categorical_parameters(wrap, validated, kind, build):
    td = TensorDict(batch_size=[3])
    td[kind] = torch.rand(3, 4)
    td[kind][1, 2] = NAN
    module = wrap(in_keys=[kind], distribution_class=build)
    with raises_and_writes_nothing(ValueError, td, kind, "1 of 12", "(1, 2)", "nan"):
        module(td)


def test_a_validate_args_of_the_module_decides():
    td = normal_td(3)
    td["scale"][0, 0] = -1.0
    checked = head(distribution_class=D.Normal, distribution_kwargs={"validate_args": True})
    with raises_and_writes_nothing(ValueError, td, "expects scale to be greater than 0"):
        checked(td)
    free = head(distribution_class=D.Normal, distribution_kwargs={"validate_args": False})
    assert "action" in keys(free(td))


def test_a_switch_that_is_off_checks_nothing(validated):
    td = normal_td(3)
    td["scale"][0, 0] = -1.0
    D.Distribution.set_default_validate_args(False)
    assert "action" in keys(head(distribution_class=D.Normal)(td))


def test_infinite_means_are_no_nan(validated):
    td = normal_td(3)
    td["loc"][0, 0], td["loc"][0, 1] = INF, -INF
    out = head(distribution_class=D.Normal)(td)
    assert torch.equal(out["action"], td["loc"])


def test_values_out_of_the_support_are_not_scored(validated):
    td = normal_td(3)
    td["action"] = torch.full((3, 4), NAN)
    with raises_and_writes_nothing(ValueError, td, "support"):
        head(distribution_class=D.Normal).log_prob(td)


def test_shapes_that_do_not_broadcast(wrap):
    td = TensorDict(loc=torch.zeros(3, 4), scale=torch.ones(3, 5), batch_size=[3])
    with raises_and_writes_nothing(
        ValueError, td, "loc of shape (3, 4)", "scale of shape (3, 5)", "broadcast"
    ):
        wrap(distribution_class=D.Normal)(td)


# --- values to score, and generators ---

HALF = torch.full((3, 4), 0.5)
# Name in the message, a distribution of 3 x 4 parameters, and the shape of its values.
SCORED = {
    "Normal": (lambda: fpd.IndependentNormal(HALF, HALF), (3, 4)),
    "TanhNormal": (lambda: fpd.TanhNormal(HALF, HALF), (3, 4)),
    "TruncatedNormal": (lambda: fpd.TruncatedNormal(HALF, HALF), (3, 4)),
    "Beta": (lambda: fpd.Beta(HALF, HALF), (3, 4)),
    "Bernoulli": (lambda: fpd.Bernoulli(HALF), (3, 4)),
    "Categorical": (lambda: fpd.Categorical(logits=HALF), (3,)),
    "MaskedCategorical": (lambda: fpd.MaskedCategorical(logits=HALF, mask=HALF > 0), (3,)),
}


@pytest.fixture
def unchecked(monkeypatch):
    """No check by torch: what is wrong is told by what fails."""
    monkeypatch.setattr(D.Distribution, "_validate_args", False)


@pytest.mark.parametrize("name", SCORED)
def test_a_value_to_score_that_does_not_broadcast(name, unchecked):
    build, shape = SCORED[name]
    for wrong in ((5, *shape[1:]), (2, 7, *shape[1:]), (0, *shape[1:])):
        with pytest.raises(ValueError, match="does not broadcast") as caught:
            build().log_prob(torch.zeros(wrong))
        assert str(wrong) in str(caught.value) and name.removeprefix("Masked") in str(caught.value)
    assert build().log_prob(torch.zeros(2, *shape)).shape[:2] == (2, 3)


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("wrong", [None, 0.5, "x", [0.5]], ids=str)
def test_a_value_to_score_that_is_no_tensor(name, wrong, unchecked):
    build, _ = SCORED[name]
    with pytest.raises(TypeError, match="scores tensors of real numbers") as caught:
        build().log_prob(wrong)
    assert str(caught.value).endswith(f"got {type(wrong).__name__}")


@pytest.mark.parametrize("name", SCORED)
def test_torch_s_own_check_of_a_value_that_is_no_tensor(name, validated):
    build, _ = SCORED[name]
    if name in ("TanhNormal", "TruncatedNormal", "MaskedCategorical"):
        # TorchRL's classes check no value.
        with pytest.raises(TypeError, match="scores tensors of real numbers"):
            build().log_prob(0.5)
        return
    with pytest.raises(ValueError, match="must be a Tensor"):
        build().log_prob(0.5)


def test_a_category_that_there_is_not(unchecked):
    """torch's own words: the kernels score it NaN, as they tell the host nothing."""
    with pytest.raises(RuntimeError, match="index 4 is out of bounds"):
        fpd.Categorical(logits=HALF).log_prob(torch.tensor([0, 4, 1]))


@pytest.mark.parametrize("name", SCORED)
@pytest.mark.parametrize("generator", ["x", 3, HALF], ids=["str", "int", "tensor"])
def test_a_draw_by_what_is_no_generator(name, generator):
    dist = SCORED[name][0]()
    draw = dist.rsample_and_log_prob if dist.has_rsample else dist.sample_and_log_prob
    with pytest.raises(TypeError, match=r"torch\.Generator or a CounterStream, got"):
        draw(generator=generator)


def test_parameters_and_a_mask_on_two_devices():
    with pytest.raises(ValueError, match="must be on one device"):
        fpd.Beta(HALF, HALF.to("meta"))
    with pytest.raises(ValueError, match="must be on one device"):
        fpd.MaskedCategorical(logits=HALF, mask=(HALF > 0).to("meta"))


@pytest.mark.parametrize("name", ["Normal", "TanhNormal", "Beta"])
def test_a_wider_value_has_a_wider_score(name, unchecked):
    """As torch's: a float64 value of float32 parameters is scored in float64."""
    build, shape = SCORED[name]
    value = torch.full(shape, 0.25, dtype=torch.float64)
    score = build().log_prob(value)
    assert score.dtype is torch.float64
    torch.testing.assert_close(score.float(), build().log_prob(value.float()))


# --- values that there are none of ---


@pytest.mark.parametrize(
    "build", [lambda loc, scale: D.Gamma(scale, scale), D.Gumbel, D.Cauchy], ids=str
)
def test_a_median_that_there_is_none_of(wrap, build):
    td = normal_td(3)
    name = type(build(td["loc"], td["scale"])).__name__
    module = wrap(distribution_class=build)
    with (
        set_interaction_type("median"),
        raises_and_writes_nothing(
            NotImplementedError, td, name, "no median", "MEDIAN", "another interaction type"
        ),
    ):
        module(td)


def test_a_mode_that_there_is_none_of(wrap):
    td = normal_td(3)

    class Modeless(D.Gumbel):
        @property
        def mode(self):
            raise NotImplementedError

    module = wrap(distribution_class=Modeless)
    with raises_and_writes_nothing(NotImplementedError, td, "Modeless", "no mode", "MODE"):
        module(td)


def test_the_mean_of_categories_has_no_score(wrap):
    td = TensorDict(logits=torch.zeros(3, 4), batch_size=[3])
    module = wrap(in_keys=["logits"], distribution_class=D.Categorical, return_log_prob=True)
    with (
        set_interaction_type("mean"),
        raises_and_writes_nothing(NotImplementedError, td, "Categorical", "MODE or MEDIAN"),
    ):
        module(td)


# --- results that do not fit ---


def test_a_result_that_does_not_fit_the_batch_size():
    # One value for the whole batch.
    td = TensorDict(logits=torch.zeros(3, 4), batch_size=[3, 4])
    module = head(in_keys=["logits"], distribution_class=D.Categorical, return_log_prob=True)
    with raises_and_writes_nothing(RuntimeError, td, "'action'", "(3,)", "(3, 4)", "batch size"):
        module(td)


def test_a_score_that_does_not_fit_leaves_no_value_behind():
    td = TensorDict(normal_td(3, 4).to_dict(), batch_size=[3, 4, 4])
    with raises_and_writes_nothing(
        RuntimeError, td, "'sample_log_prob'", "(3, 4)", "(3, 4, 4)", "event dimensions"
    ):
        head(return_log_prob=True)(td)


def test_several_keys_for_one_value(wrap):
    td = normal_td(3)
    module = head(out_keys=["a", "b"])
    with raises_and_writes_nothing(ValueError, td, "['a', 'b']", "one tensor", "one out_key"):
        module(td)


def test_an_out_tensordict_is_left_alone_too():
    td = normal_td(3)
    td["scale"][0, 0] = -1.0
    out = TensorDict(x=torch.zeros(3), batch_size=[3])
    module = head(distribution_class=D.Normal, distribution_kwargs={"validate_args": True})
    with raises_and_writes_nothing(ValueError, td, "scale"):
        module(td, out)
    assert keys(out) == ["x"]


# --- sequences ---


def test_a_sequence_of_nothing():
    with pytest.raises(ValueError, match="ProbabilisticTensorDictSequential"):
        ProbabilisticTensorDictSequential()


def test_a_sequence_whose_last_module_is_not_probabilistic():
    net = tdnn.TensorDictModule(lambda x: x, ["action"], ["y"])
    with pytest.raises(TypeError, match="return_composite"):
        ProbabilisticTensorDictSequential(head(), net, return_composite=False)


def test_the_failing_module_of_a_sequence_is_named():
    def fail(x):
        raise ZeroDivisionError("in the network")

    seq = ProbabilisticTensorDictSequential(
        tdnn.TensorDictModule(lambda x: x, ["obs"], ["obs2"]),
        lambda td: fail(td),
        head(),
    )
    with pytest.raises(ZeroDivisionError, match="in the network") as caught:
        seq(TensorDict(obs=torch.zeros(3), batch_size=[3]))
    notes = getattr(caught.value, "__notes__", None)
    if notes is not None:
        # Python 3.11 and later.
        assert any("module 1" in note for note in notes)
