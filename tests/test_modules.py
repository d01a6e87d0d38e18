"""ProbabilisticTensorDictModule: arguments, calls, and what stands around it."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
from tensordict import LazyStackedTensorDict, TensorDict, tensorclass
from tensordict import nn as tdnn
from tensordict.nn import TensorDictParams, set_composite_lp_aggregate, set_skip_existing
from torch import Tensor, nn
from torch import distributions as D

import fastprob as fp
from fastprob import InteractionType, ProbabilisticTensorDictModule, set_interaction_type
from fastprob import distributions as fpd
from tests._modules import (
    MODE,
    RANDOM,
    TYPES,
    assert_same,
    entries,
    head,
    indep_normal,
    keys,
    normal_td,
    twins,
    unchanged,
)

# --- names and classes ---


def test_interaction_types_are_tensordicts_own():
    assert fp.InteractionType is tdnn.InteractionType
    assert fp.set_interaction_type is tdnn.set_interaction_type
    assert fp.interaction_type is tdnn.probabilistic.interaction_type


def test_modules_are_tensordicts_modules():
    module = head()
    assert isinstance(module, tdnn.ProbabilisticTensorDictModule)
    assert isinstance(module, tdnn.TensorDictModuleBase)
    assert isinstance(module, nn.Module)
    assert set(fp.__all__) <= set(dir(fp))


# --- interaction types ---


def test_the_default_is_the_mode():
    kwargs = {"in_keys": ["logits"], "distribution_class": D.Categorical}
    td = TensorDict(logits=torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, -2.0]]), batch_size=[2])
    module = head(**kwargs)
    assert module.default_interaction_type is MODE
    assert module(td)["action"].tolist() == [1, 0]
    # Not the mean of the squashed Normal, and not its median either.
    td = normal_td(3)
    dist = fpd.TanhNormal(td["loc"], td["scale"])
    value = head(distribution_class=fpd.TanhNormal)(td)["action"]
    assert torch.equal(value, dist.mode)
    assert not torch.equal(value, dist.median)
    assert not torch.equal(value, dist.mean)


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("how", ["default", "default as string", "global", "global over default"])
def test_every_interaction_type(kind, how):
    td = normal_td(5)
    dist = fpd.TanhNormal(td["loc"], td["scale"])
    torch.manual_seed(7)
    expected = {
        InteractionType.MODE: lambda: dist.mode,
        InteractionType.MEDIAN: lambda: dist.median,
        InteractionType.MEAN: lambda: dist.mean,
        InteractionType.DETERMINISTIC: lambda: dist.deterministic_sample,
        InteractionType.RANDOM: dist.rsample,
    }[kind]()
    kwargs = {"distribution_class": fpd.TanhNormal, "return_log_prob": True}
    if how == "default":
        kwargs["default_interaction_type"] = kind
    elif how == "default as string":
        kwargs["default_interaction_type"] = kind.value
    elif how == "global over default":
        kwargs["default_interaction_type"] = "random" if kind is MODE else "mode"
    module = head(**kwargs)
    torch.manual_seed(7)
    with set_interaction_type(kind if how.startswith("global") else None):
        out = module(td)
    torch.testing.assert_close(out["action"], expected)
    torch.testing.assert_close(out["sample_log_prob"], dist.log_prob(expected))


def test_the_type_of_the_call_is_the_one_that_counts():
    module = head()
    td = normal_td(4)
    with set_interaction_type("random"):
        first, second = module(td.copy())["action"], module(td.copy())["action"]
        assert not torch.equal(first, second)
        with set_interaction_type("mean"):
            assert torch.equal(module(td.copy())["action"], td["loc"])
    assert torch.equal(module(td.copy())["action"], td["loc"])


def test_default_interaction_mode_is_deprecated():
    with pytest.warns(DeprecationWarning, match="use default_interaction_type") as caught:
        module = head(default_interaction_mode="random")
    assert len(caught) == 1
    assert module.default_interaction_type is RANDOM
    with pytest.raises(TypeError, match="default_interaction_mode is the deprecated name"):
        head(default_interaction_mode="random", default_interaction_type="mode")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(default_interaction_type="random")


# --- distribution_class and distribution_kwargs ---


def test_the_default_distribution_is_a_delta():
    module = ProbabilisticTensorDictModule(in_keys=["param"], out_keys=["action"])
    td = TensorDict(param=torch.randn(3, 4), batch_size=[3])
    for kind in TYPES:
        with set_interaction_type(kind):
            assert torch.equal(module(td.copy())["action"], td["param"])


class Third(D.Distribution):
    """A third-party distribution that has no support, mean or mode."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(self, loc: Tensor, scale: Tensor):
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def rsample(self, sample_shape=()):
        return self.loc + self.scale * torch.rand(torch.Size(sample_shape) + self.loc.shape)

    def log_prob(self, value):
        return -self.scale.log().sum(-1).expand(value.shape[:-1])


def uniform(loc, scale):
    return D.Independent(D.Uniform(loc, loc + scale), 1)


CLASSES = {
    "class": (D.Normal, {}),
    "name": ("normal", {}),
    "name, other case": ("IndependentNormal", {}),
    "function": (indep_normal, {}),
    "function of another family": (uniform, {}),
    "lambda": (lambda loc, scale: D.Laplace(loc, scale), {}),
    "partial": (functools.partial(fpd.TanhNormal, low=-2.0, high=3.0), {}),
    "partial of upstream": (functools.partial(D.Normal, validate_args=True), {}),
    "torch's other classes": (D.Laplace, {}),
    "kwargs": (fpd.TanhNormal, {"low": -2.0, "high": 3.0}),
    "third-party": (Third, {}),
}
BUILT = {
    "class": D.Normal,
    "name": D.Normal,
    "name, other case": indep_normal,
    "partial": lambda loc, scale: fpd.TanhNormal(loc, scale, low=-2.0, high=3.0),
    "partial of upstream": D.Normal,
    "kwargs": lambda loc, scale: fpd.TanhNormal(loc, scale, low=-2.0, high=3.0),
}


@pytest.mark.parametrize("name", CLASSES)
def test_distribution_class_in_every_form(name):
    given, kwargs = CLASSES[name]
    td = normal_td(5)
    dist = BUILT.get(name, given)(loc=td["loc"], scale=td["scale"])
    torch.manual_seed(2)
    value = dist.rsample()
    module = head(
        distribution_class=given,
        distribution_kwargs=kwargs,
        return_log_prob=True,
        default_interaction_type="random",
    )
    torch.manual_seed(2)
    out = module(td)
    torch.testing.assert_close(out["action"], value)
    torch.testing.assert_close(out["sample_log_prob"], dist.log_prob(value))


def test_distribution_class_keeps_what_was_given():
    assert head(distribution_class=D.Normal).distribution_class is D.Normal
    assert head().distribution_class is indep_normal


@pytest.mark.parametrize("kind", [InteractionType.MEAN, InteractionType.DETERMINISTIC])
def test_a_mean_that_is_estimated(kind):
    td = normal_td(3)
    ours, theirs = (
        head(cls, distribution_class=Third, n_empirical_estimate=7, default_interaction_type=kind)
        for cls in (ProbabilisticTensorDictModule, tdnn.ProbabilisticTensorDictModule)
    )
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            results.append(module(td.copy()))
    assert_same(*results)
    torch.manual_seed(3)
    expected = Third(td["loc"], td["scale"]).rsample((7,)).mean(0)
    torch.testing.assert_close(results[0]["action"], expected)


def test_deterministic_without_a_value_of_its_own_warns():
    module = head(distribution_class=Third, default_interaction_type="deterministic")
    with pytest.warns(UserWarning, match="Third has no deterministic_sample; its mean is used"):
        module(normal_td(3))


def test_lkj_cholesky():
    module = head(
        in_keys=["concentration"],
        distribution_class=D.LKJCholesky,
        distribution_kwargs={"dim": 3, "validate_args": False},
        default_interaction_type="random",
        return_log_prob=True,
    )
    td = TensorDict(concentration=torch.full((4,), 2.0), batch_size=[4])
    torch.manual_seed(1)
    out = module(td.copy())
    torch.manual_seed(1)
    dist = D.LKJCholesky(3, td["concentration"], validate_args=False)
    assert torch.equal(out["action"], dist.sample())
    torch.testing.assert_close(out["sample_log_prob"], dist.log_prob(out["action"]))
    for kind in ("mode", "mean", "deterministic"):
        with (
            set_interaction_type(kind),
            unchanged(td),
            pytest.raises(NotImplementedError, match="LKJCholesky") as caught,
        ):
            module(td)
        assert kind.upper() in str(caught.value)


def test_params_as_kwargs_move_with_the_module():
    kwargs = TensorDictParams(TensorDict(scale=torch.tensor(0.5)))
    module = head(in_keys=["loc"], distribution_class=D.Normal, distribution_kwargs=kwargs)
    assert [name for name, _ in module.named_parameters()] == ["distribution_kwargs.scale"]
    assert list(module.state_dict()) != []
    td = TensorDict(loc=torch.randn(3), batch_size=[3])
    assert module.get_dist(td).scale.tolist() == [0.5] * 3
    module.to(torch.float64)
    assert module.get_dist(td.to(torch.float64)).scale.dtype is torch.float64
    state = {
        k: torch.full_like(v, 2.0) if isinstance(v, Tensor) else v
        for k, v in module.state_dict().items()
    }
    module.load_state_dict(state)
    assert module.get_dist(td.to(torch.float64)).scale.tolist() == [2.0] * 3
    # They are trained: the score's gradient reaches them.
    module.get_dist(td.to(torch.float64)).log_prob(
        torch.zeros(3, dtype=torch.float64)
    ).sum().backward()
    (parameter,) = module.parameters()
    assert parameter.grad is not None
    assert parameter.grad != 0


# --- num_samples ---


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("num_samples", [0, 2, (2, 3), torch.Size([2]), ()], ids=str)
def test_num_samples(kind, num_samples):
    td = normal_td(4)
    shape = (num_samples,) if isinstance(num_samples, int) else tuple(num_samples)
    kwargs = {"num_samples": num_samples, "return_log_prob": True, "default_interaction_type": kind}
    ours = head(**kwargs)
    assert ours.num_samples == torch.Size(shape)
    torch.manual_seed(1)
    with unchanged(td):
        out = ours(td)
    assert out is not td or shape == ()
    assert out.batch_size == (*shape, 4)
    assert out["action"].shape == (*shape, 4, 4)
    assert out["sample_log_prob"].shape == (*shape, 4)
    assert out["loc"].shape == (*shape, 4, 4)
    if kind is RANDOM and 0 in shape:
        # torch's Independent cannot score an empty sample.
        assert out["action"].numel() == 0
    elif kind is RANDOM:
        theirs = head(tdnn.ProbabilisticTensorDictModule, log_prob_key="sample_log_prob", **kwargs)
        torch.manual_seed(1)
        assert_same(out, theirs(td.copy()))
    else:
        # Upstream leaves the value without the sample dimensions, and cannot write it.
        assert torch.equal(out["action"], td["loc"].expand(*shape, 4, 4))


def test_num_samples_of_a_composite():
    params = TensorDict(a=normal_td(4), b=TensorDict(logits=torch.randn(4, 3)), batch_size=[4])
    module = head(
        in_keys=["params"],
        out_keys=["a", "b"],
        distribution_class=tdnn.CompositeDistribution,
        distribution_kwargs={"distribution_map": {"a": D.Normal, "b": D.Categorical}},
        num_samples=2,
        return_log_prob=True,
    )
    td = TensorDict(params=params, batch_size=[4])
    for kind in ("random", "mode"):
        with set_interaction_type(kind):
            out = module(td)
        assert out.batch_size == (2, 4)
        assert out["a"].shape == (2, 4, 4)
        assert out["b"].shape == (2, 4)
        assert out["sample_log_prob"].shape == (2, 4)
        total = out["a_log_prob"].sum(-1) + out["b_log_prob"]
        torch.testing.assert_close(out["sample_log_prob"], total)


# --- calls ---


def test_calls_with_tensors():
    ours, theirs = twins(return_log_prob=True, log_prob_key="sample_log_prob")
    td = normal_td(3)
    loc, scale = td["loc"], td["scale"]
    for call in (
        lambda m: m(loc=loc, scale=scale),
        lambda m: m(loc, scale),
        lambda m: m(loc, scale=scale),
    ):
        value, log_prob = call(ours)
        assert torch.equal(value, loc)
        torch.testing.assert_close((value, log_prob), call(theirs))
    assert torch.equal(head()(loc, scale), loc)


def test_calls_with_tensors_under_nested_keys():
    module = head(in_keys=[("a", "loc"), ("b", "scale")], out_keys=[("c", "action")])
    td = normal_td(3)
    assert torch.equal(module(a_loc=td["loc"], b_scale=td["scale"]), td["loc"])


def test_calls_with_keyword_tensordicts():
    module = head()
    td, out = normal_td(3), TensorDict(batch_size=[3])
    assert module(tensordict=td, tensordict_out=out) is out
    assert keys(out) == ["action"]
    assert module.forward(td) is td


@pytest.mark.parametrize("score", [False, True])
def test_tensordict_out(score):
    ours, theirs = twins(return_log_prob=score, log_prob_key="lp")
    results = []
    for module in (ours, theirs):
        td, out = normal_td(3), TensorDict(other=torch.zeros(3), batch_size=[3])
        td["loc"][:] = 1
        td["scale"][:] = 2
        with unchanged(td):
            assert module(td, out) is out
            results.append(out)
    assert_same(*results)
    assert keys(results[0]) == ["other", "action", *(["lp"] if score else [])]


def test_cache_dist_writes_the_parameters_next_to_the_sample():
    td = normal_td(3)
    td["net", "loc"] = td.pop("loc")
    kwargs = {"in_keys": [("net", "loc"), "scale"], "default_interaction_type": "random"}
    out = head(cache_dist=True, return_log_prob=True, **kwargs)(td, TensorDict(batch_size=[3]))
    assert set(keys(out)) == {("net", "loc"), "scale", "action", "sample_log_prob"}
    # Enough to build the distribution again, for instance for the divergence in PPO.
    module = head(**kwargs)
    old, new = module.get_dist(out), module.get_dist(td)
    assert torch.equal(D.kl_divergence(old, new), torch.zeros(3))
    assert "scale" not in keys(head(**kwargs)(td, TensorDict(batch_size=[3])))
    repeated = head(cache_dist=True, num_samples=2, **kwargs)(td, TensorDict(batch_size=[3]))
    assert repeated["net", "loc"].shape == (2, 3, 4)
    same = head(cache_dist=True, **kwargs)(td)
    assert same is td


def test_cache_dist_leaves_out_a_parameter_that_is_not_there():
    module = head(in_keys=["logits", "probs"], distribution_class=D.Categorical, cache_dist=True)
    td = TensorDict(logits=torch.randn(3, 4), batch_size=[3])
    out = module(td, TensorDict(batch_size=[3]))
    assert keys(out) == ["action", "logits"]


def test_a_value_that_is_there_is_only_scored():
    td = normal_td(3)
    td["action"] = torch.randn(3, 4)
    module = head(return_log_prob=True, default_interaction_type="random")
    expected = indep_normal(loc=td["loc"], scale=td["scale"]).log_prob(td["action"])
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        for out in (
            module(td.copy(), _requires_sample=False),
            module(td.copy(), None, False),
        ):
            assert torch.equal(out["action"], td["action"])
            torch.testing.assert_close(out["sample_log_prob"], expected)
        assert torch.equal(torch.get_rng_state(), state)
    theirs = head(tdnn.ProbabilisticTensorDictModule, return_log_prob=True, log_prob_key="lp")
    ours = head(return_log_prob=True, log_prob_key="lp")
    assert_same(ours(td.copy(), _requires_sample=False), theirs(td.copy(), _requires_sample=False))


# --- skipping what is there ---


@pytest.mark.parametrize(
    ("present", "skips"),
    [(["action", "sample_log_prob"], True), (["action"], False), ([], False)],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True])
def test_set_skip_existing(present, skips, compiled):
    module = head(return_log_prob=True)
    td = normal_td(3)
    zeros = {"action": torch.zeros(3, 4), "sample_log_prob": torch.zeros(3)}
    td.update({k: zeros[k] for k in present})
    call = module
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(module, backend="aot_eager", fullgraph=True)
    with set_skip_existing(True):
        skipped = call(td.copy())
    if skips:
        assert torch.equal(skipped["action"], zeros["action"])
        assert torch.equal(skipped["sample_log_prob"], zeros["sample_log_prob"])
    else:
        assert torch.equal(skipped["action"], td["loc"])
    # Without the switch the value is taken anew, also by what was compiled under it.
    fresh = call(td.copy())
    assert torch.equal(fresh["action"], td["loc"])
    assert set(keys(fresh)) == {"loc", "scale", "action", "sample_log_prob"}


def test_nothing_is_skipped_where_an_out_key_is_an_in_key():
    module = head(out_keys=["loc"], default_interaction_type="random")
    td = normal_td(3)
    with set_skip_existing(True):
        assert not torch.equal(module(td.copy())["loc"], td["loc"])


# --- distributions and scores ---


def test_get_dist_and_build_dist_from_params():
    module = head()
    td = normal_td(3)
    with unchanged(td):
        dist, again = module.get_dist(td), module.build_dist_from_params(td)
    assert isinstance(dist, D.Independent)
    assert dist.batch_shape == (3,)
    assert dist.event_shape == (4,)
    for built in (dist, again):
        assert built.base_dist.loc is td["loc"]


def test_an_overridden_get_dist_is_seen_everywhere():
    class Wide(ProbabilisticTensorDictModule):
        def get_dist(self, tensordict):
            return D.Independent(D.Laplace(tensordict["loc"], 10.0), 1)

    module = head(Wide, return_log_prob=True, default_interaction_type="random")
    td = normal_td(3)
    dist = D.Independent(D.Laplace(td["loc"], 10.0), 1)
    assert type(module.build_dist_from_params(td).base_dist) is D.Laplace
    torch.manual_seed(1)
    out = module(td)
    torch.manual_seed(1)
    assert torch.equal(out["action"], dist.rsample())
    torch.testing.assert_close(out["sample_log_prob"], dist.log_prob(out["action"]))
    torch.testing.assert_close(module.log_prob(out), out["sample_log_prob"])


def test_log_prob():
    ours, theirs = twins()
    td = normal_td(3)
    td["action"] = torch.randn(3, 4)
    with unchanged(td):
        result = ours.log_prob(td)
    assert result.shape == (3,)
    torch.testing.assert_close(result, theirs.log_prob(td))
    wide = indep_normal(loc=td["loc"], scale=10 * td["scale"])
    torch.testing.assert_close(ours.log_prob(td, dist=wide), wide.log_prob(td["action"]))


def test_log_prob_with_tensordict_out():
    td = normal_td(3)
    td["action"] = torch.randn(3, 4)
    out = TensorDict(batch_size=[3])
    with unchanged(td):
        result = head(log_prob_key=("a", "lp")).log_prob(td, out)
    assert keys(out) == [("a", "lp")]
    assert out["a", "lp"] is result
    torch.testing.assert_close(
        result, indep_normal(**td.select("loc", "scale")).log_prob(td["action"])
    )


def test_the_score_is_that_of_the_value_drawn():
    td = normal_td(200)
    out = head(return_log_prob=True, default_interaction_type="random")(td)
    torch.testing.assert_close(
        out["sample_log_prob"],
        indep_normal(loc=td["loc"], scale=td["scale"]).log_prob(out["action"]),
    )


def test_a_fresh_sample_does_not_ask_for_log_prob(monkeypatch):
    def forbidden(self, value):
        raise AssertionError("log_prob was called")

    module = head(return_log_prob=True, default_interaction_type="random")
    td = normal_td(3)
    for cls in {type(module.get_dist(td)), *type(module.get_dist(td)).__mro__}:
        if "log_prob" in vars(cls):
            monkeypatch.setattr(cls, "log_prob", forbidden)
    assert "sample_log_prob" in keys(module(td))


def test_gradients_flow_as_upstream():
    ours, theirs = twins(return_log_prob=True, log_prob_key="lp", default_interaction_type="random")
    td = normal_td(6, dtype=torch.float64)
    grads = []
    for module in (ours, theirs):
        loc, scale = td["loc"].clone().requires_grad_(), td["scale"].clone().requires_grad_()
        torch.manual_seed(4)
        out = module(TensorDict(loc=loc, scale=scale, batch_size=[6]))
        (out["action"].square().sum() + out["lp"].sum() * 2).backward()
        grads.append((loc.grad, scale.grad))
    torch.testing.assert_close(*grads)


# --- shapes and dtypes ---


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_batch_sizes(batch, kind):
    ours, theirs = twins(return_log_prob=True, log_prob_key="lp", default_interaction_type=kind)
    td = normal_td(*batch)
    torch.manual_seed(1)
    out = ours(td.copy())
    assert out["action"].shape == (*batch, 4)
    assert out["lp"].shape == batch
    assert keys(out) == ["loc", "scale", "action", "lp"]
    if 0 in batch:
        # torch's Independent cannot score an empty batch.
        return
    if kind is InteractionType.MEDIAN:
        # It has no median either; that of a Normal is its mean.
        theirs.default_interaction_type = InteractionType.MEAN
    torch.manual_seed(1)
    assert_same(out, theirs(td.copy()))


@pytest.mark.parametrize("batch", [(3,), (0,)], ids=str)
def test_fewer_batch_dims_than_the_parameters_have(batch):
    ours, theirs = twins(return_log_prob=True, log_prob_key="lp", default_interaction_type="random")
    td = TensorDict(normal_td(*batch, 5).to_dict(), batch_size=batch)
    torch.manual_seed(1)
    out = ours(td.copy())
    assert out["lp"].shape == (*batch, 5)
    if 0 not in batch:
        torch.manual_seed(1)
        assert_same(out, theirs(td.copy()))


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda t: torch.stack([t, -t], -1)[..., 0],
    "expanded over the batch": lambda t: t[:1].expand_as(t),
    "expanded over the event": lambda t: t[:, :1].expand_as(t),
    "a single element expanded": lambda t: t[0, 0].expand_as(t),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["loc", "scale", "both"])
def test_parameters_of_any_layout(layout, which):
    ours, theirs = twins(return_log_prob=True, log_prob_key="lp", default_interaction_type="random")
    td = normal_td(3, event=5)
    for key in ("loc", "scale"):
        if which in (key, "both"):
            td[key] = LAYOUTS[layout](td[key])
            assert not td[key].is_contiguous()
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        with unchanged(td):
            results.append(module(td.copy()))
    assert_same(*results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["random", "mode", "mean"])
def test_dtypes(dtype, kind):
    td = normal_td(3, dtype=dtype)
    torch.manual_seed(1)
    out = head(return_log_prob=True, default_interaction_type=kind)(td.copy())
    theirs = head(
        tdnn.ProbabilisticTensorDictModule,
        return_log_prob=True,
        log_prob_key="sample_log_prob",
        default_interaction_type=kind,
    )
    torch.manual_seed(1)
    reference = theirs(td.copy())
    assert out["action"].dtype is out["sample_log_prob"].dtype is dtype
    torch.testing.assert_close(out["action"], reference["action"])
    # The score is a sum of four terms: the reference is the sum in double of the same value.
    exact = indep_normal(loc=td["loc"].double(), scale=td["scale"].double())
    exact = exact.log_prob(out["action"].double())
    error = (out["sample_log_prob"].double() - exact).abs().max()
    native = (reference["sample_log_prob"].double() - exact).abs().max()
    assert error <= 2 * native + torch.finfo(dtype).eps * exact.abs().max()


# --- other tensordicts ---


@tensorclass
class Params:
    loc: Tensor
    scale: Tensor
    action: Tensor | None = None
    sample_log_prob: Tensor | None = None


def test_tensorclass():
    td = normal_td(3)
    params = Params(loc=td["loc"], scale=td["scale"], batch_size=[3])
    out = head(return_log_prob=True)(params)
    assert out is params
    assert torch.equal(params.action, td["loc"])
    torch.testing.assert_close(
        params.sample_log_prob, head(return_log_prob=True)(td)["sample_log_prob"]
    )


@pytest.mark.parametrize("kind", ["mode", "random"])
def test_lazily_stacked(kind):
    parts = [normal_td(3) for _ in range(2)]
    lazy = LazyStackedTensorDict.lazy_stack(parts, 0)
    dense = torch.stack([part.copy() for part in parts], 0)
    module = head(return_log_prob=True, default_interaction_type=kind)
    torch.manual_seed(0)
    expected = module(dense)
    torch.manual_seed(0)
    out = module(lazy)
    assert out is lazy
    for key in ("action", "sample_log_prob"):
        assert torch.equal(lazy[key], expected[key])
        assert torch.equal(parts[1][key], expected[key][1])


def test_locked():
    td = normal_td(3).lock_()
    with unchanged(td), pytest.raises(RuntimeError, match="lock"):
        head(return_log_prob=True)(td)
    out = head(return_log_prob=True)(td, TensorDict(batch_size=[3]))
    assert keys(out) == ["action", "sample_log_prob"]
    unlocked = normal_td(3)
    unlocked.update({"action": torch.zeros(3, 4), "sample_log_prob": torch.zeros(3)})
    with unchanged(unlocked.lock_()), pytest.raises(RuntimeError, match="lock"):
        head(return_log_prob=True)(unlocked)


def test_a_tensordict_with_a_device():
    td = normal_td(3).to("cpu")
    assert td.device == torch.device("cpu")
    assert torch.equal(head()(td)["action"], td["loc"])


def test_other_entries_stay():
    td = normal_td(3)
    td["x", "y"] = torch.zeros(3)
    td.set_non_tensor("name", "run")
    before = dict(entries(td))
    out = head()(td)
    assert out["name"] == "run"
    for key in [("x", "y"), "loc", "scale"]:
        assert out[key] is before[key]


# --- torch's modes ---


def test_inference_mode():
    module = head(return_log_prob=True, default_interaction_type="random")
    td = normal_td(3)
    torch.manual_seed(1)
    expected = module(td.copy())
    torch.manual_seed(1)
    with torch.inference_mode():
        out = module(td.copy())
    assert out["action"].is_inference()
    assert_same(out, expected)


def test_no_grad_draws_the_same():
    module = head(return_log_prob=True, default_interaction_type="random")
    td = normal_td(3)
    td["loc"].requires_grad_()
    torch.manual_seed(1)
    expected = module(td.copy())
    torch.manual_seed(1)
    with torch.no_grad():
        out = module(td.copy())
    assert expected["action"].requires_grad
    assert not out["action"].requires_grad
    assert_same(out.detach(), expected.detach())


def test_autocast():
    net = tdnn.TensorDictModule(
        nn.Sequential(nn.Linear(3, 8), tdnn.NormalParamExtractor()), ["obs"], ["loc", "scale"]
    )
    results = []
    for library in (fp, tdnn):
        seq = library.ProbabilisticTensorDictSequential(
            net,
            head(
                library.ProbabilisticTensorDictModule,
                return_log_prob=True,
                log_prob_key="lp",
                default_interaction_type="random",
            ),
        )
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            td = seq(TensorDict(obs=torch.ones(5, 3), batch_size=[5]))
        results.append(td)
    ours, theirs = results
    assert {k: v.dtype for k, v in entries(ours)} == {k: v.dtype for k, v in entries(theirs)}
    torch.testing.assert_close(ours["action"], theirs["action"])
    # bfloat16 holds 8 bits: four terms of the order of 1 are summed.
    torch.testing.assert_close(ours["lp"], theirs["lp"], rtol=2**-6, atol=2**-6)


def test_vmap_over_the_parameters():
    module = head(return_log_prob=True)
    td = normal_td(5, 3)

    def one(loc, scale):
        out = module(TensorDict(loc=loc, scale=scale, batch_size=[3]))
        return out["action"], out["sample_log_prob"]

    value, log_prob = torch.vmap(one)(td["loc"], td["scale"])
    expected = module(td.copy())
    torch.testing.assert_close(value, expected["action"])
    torch.testing.assert_close(log_prob, expected["sample_log_prob"])


def test_vmap_random():
    module = head(return_log_prob=True, default_interaction_type="random")
    td = normal_td(5, 3)

    def one(td):
        return module(td)

    out = torch.vmap(one, randomness="different")(td.copy())
    assert out.batch_size == (5, 3)
    assert (out["action"] != td["loc"]).all()
    torch.testing.assert_close(out["sample_log_prob"], indep_normal(**td).log_prob(out["action"]))


# --- hooks, copies, pickles ---


def test_forward_hooks():
    module = head()
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(("pre", keys(args[0]))))
    module.register_forward_hook(lambda m, args, out: seen.append(("post", keys(out))))
    module.register_forward_hook(
        lambda m, args, kwargs, out: seen.append(("kwargs", list(kwargs))), with_kwargs=True
    )
    td = normal_td(3)
    module(td)
    assert seen == [
        ("pre", ["loc", "scale"]),
        ("post", ["loc", "scale", "action"]),
        ("kwargs", []),
    ]
    replace = head()
    replace.register_forward_hook(lambda m, args, out: out.set("hooked", torch.ones(3)))
    assert "hooked" in keys(replace(normal_td(3)))


def make(kind: str):
    """Modules that pickle and copy: nothing local in them."""
    if kind == "int generator":
        return head(generator=5, default_interaction_type="random", return_log_prob=True)
    if kind == "generator":
        generator = torch.Generator().manual_seed(3)
        return head(generator=generator, default_interaction_type="random", return_log_prob=True)
    if kind == "key generator":
        return head(generator="seed", default_interaction_type="random", return_log_prob=True)
    if kind == "composite":
        return head(
            in_keys={"params": "params"},
            out_keys=None,
            distribution_class=fp.CompositeDistribution,
            distribution_kwargs={"distribution_map": {"a": D.Normal}},
        )
    if kind == "params":
        kwargs = TensorDictParams(TensorDict(scale=torch.tensor(0.5)))
        return head(in_keys=["loc"], distribution_class=D.Normal, distribution_kwargs=kwargs)
    return head(return_log_prob=True)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, pickled, saved])
@pytest.mark.parametrize(
    "kind", ["plain", "int generator", "generator", "key generator", "composite", "params"]
)
@pytest.mark.parametrize("called", [False, True])
def test_copies_and_pickles(clone, kind, called):
    module = make(kind)
    td = normal_td(3)
    td["seed"] = torch.full((3,), 0)
    td["params"] = TensorDict(a=normal_td(3), batch_size=[3])
    td = TensorDict(td.to_dict())
    td["seed"] = torch.tensor(9)
    if called:
        module(td.clone())
    other = clone(module)
    assert type(other) is type(module)
    shared = clone is copy.copy and "generator" in kind and kind != "key generator"
    ours = module(td.clone())
    if not shared:
        assert_same(ours, other(td.clone()))
    else:
        assert not torch.equal(ours["action"], other(td.clone())["action"])


def test_load_state_dict_of_a_network_with_a_head():
    def policy():
        return fp.ProbabilisticTensorDictSequential(
            tdnn.TensorDictModule(nn.Linear(3, 4), ["obs"], ["loc"]),
            head(in_keys=["loc"], distribution_kwargs={"scale": 1.0}),
        )

    first, second = policy(), policy()
    td = TensorDict(obs=torch.randn(2, 3), batch_size=[2])
    assert not torch.equal(first(td.copy())["action"], second(td.copy())["action"])
    assert list(first.state_dict()) == ["module.0.module.weight", "module.0.module.bias"]
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(td.copy())["action"], second(td.copy())["action"])


def test_repr_names_the_configuration():
    text = repr(head(default_interaction_type="random", num_samples=3))
    for part in ("ProbabilisticTensorDictModule", "loc", "action", "indep_normal", "[3]"):
        assert part in text
    assert repr(InteractionType.RANDOM) in text or "random" in text


# --- torch.compile ---


@pytest.mark.parametrize("kind", [RANDOM, MODE], ids=str)
@pytest.mark.parametrize("build", [D.Normal, indep_normal], ids=["Normal", "callable"])
def test_compiled_without_a_break(kind, build):
    module = head(distribution_class=build, return_log_prob=True, default_interaction_type=kind)
    td = normal_td(3)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    results = []
    for call in (module, compiled, compiled):
        torch.manual_seed(5)
        results.append(call(td.copy()))
    assert_same(results[1], results[0])
    assert torch.equal(results[1]["action"], results[2]["action"])
    if kind is RANDOM:
        # The seed is not part of the graph.
        assert not torch.equal(compiled(td.copy())["action"], results[1]["action"])


def test_compiled_follows_the_global_type():
    module = head()
    td = normal_td(3)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(td.copy())["action"], td["loc"])
    with set_interaction_type("random"):
        assert not torch.equal(compiled(td.copy())["action"], td["loc"])
    assert torch.equal(compiled(td.copy())["action"], td["loc"])


def test_the_module_leaves_the_globals_alone():
    td = normal_td(3)
    before = (D.Distribution._validate_args, torch.get_default_dtype(), torch.is_grad_enabled())
    with set_composite_lp_aggregate(False):
        head(return_log_prob=True, default_interaction_type="random")(td)
    assert before == (
        D.Distribution._validate_args,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


class Prior(nn.Module):
    """Builds a distribution with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, loc):
        return D.Independent(D.Normal(loc, self.scale), 1)


def test_a_module_that_builds_the_distribution_is_a_child_of_the_same_name_as_upstream():
    ours, theirs = (
        cls(in_keys=["loc"], out_keys=["action"], distribution_class=Prior())
        for cls in (ProbabilisticTensorDictModule, tdnn.ProbabilisticTensorDictModule)
    )
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["distribution_class.scale"]
    assert [name for name, _ in ours.named_modules()] == ["", "distribution_class"]
    td = normal_td(3)
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert module.distribution_class is dict(module.named_children())["distribution_class"]
        dist = module.get_dist(td)
        assert dist.base_dist.scale.unique().item() == 0.5
    ours.distribution_class = Prior().requires_grad_(False)
    assert not ours.distribution_class.scale.requires_grad
    assert not ours.get_dist(td).base_dist.scale.requires_grad
