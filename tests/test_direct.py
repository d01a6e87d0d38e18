"""The straight call gives what the general one gives, and steps aside where it does not apply."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import set_composite_lp_aggregate, set_skip_existing
from torch import distributions as D
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.testing import CompileCounter

from fastprob import (
    InteractionType,
    ProbabilisticTensorDictModule,
    SafeProbabilisticModule,
    set_interaction_type,
)
from fastprob.direct import Straight
from fastprob.distributions import IndependentNormal, TanhNormal
from fastprob.specs import Bounded, Composite, Unbounded

ARGS = {
    "in_keys": ["loc", "scale"],
    "out_keys": ["action"],
    "distribution_class": IndependentNormal,
    "default_interaction_type": "random",
    "return_log_prob": True,
}


@pytest.fixture(autouse=True)
def unchecked():
    """The straight call serves where torch's argument checks are off, as TorchRL leaves them."""
    before = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(False)
    yield
    D.Distribution.set_default_validate_args(before)


@pytest.fixture
def runs(monkeypatch):
    """Whether each call that reached the straight one was made by it."""
    seen: list[bool] = []
    run = Straight.run

    def record(self, module, tensordict):
        seen.append(run(self, module, tensordict))
        return seen[-1]

    monkeypatch.setattr(Straight, "run", record)
    return seen


def params(rows=5, n=3, dtype=torch.float32, batch=None, **kwargs):
    return TensorDict(
        {
            "loc": torch.randn(rows, n, dtype=dtype),
            "scale": torch.rand(rows, n, dtype=dtype) + 0.1,
        },
        [rows] if batch is None else batch,
        **kwargs,
    )


def general(module, td):
    """The same call by the general way."""
    module.__dict__["_straight"] = None
    return module(td)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows, n", [(0, 3), (1, 1), (5, 3), (16, 8), (700, 17)])
@pytest.mark.parametrize("batch", ["rows", "none"])
@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("safe", [False, True])
def test_equals_the_general_call_bit_for_bit(runs, dtype, rows, n, batch, device, safe):
    td = params(rows, n, dtype, None if batch == "rows" else [], device=device)
    if safe:
        module = SafeProbabilisticModule(
            **ARGS, spec=Bounded(-0.5, 0.5, shape=(n,), dtype=dtype), safe=True
        )
    else:
        module = ProbabilisticTensorDictModule(**ARGS)
    with torch.no_grad():
        torch.manual_seed(3)
        straight = module(td.copy())
        state = torch.get_rng_state()
        torch.manual_seed(3)
        other = general(module, td.copy())
    assert runs == [rows > 0]
    assert list(straight.keys()) == list(other.keys())
    for key in ("action", "sample_log_prob"):
        assert straight[key].dtype == dtype
        assert torch.equal(straight[key], other[key])
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def traces(monkeypatch):
    """Whether each call that reached the straight one of a graph was made by it."""
    seen: list[bool] = []
    trace = Straight.trace

    def record(self, module, tensordict):
        seen.append(trace(self, module, tensordict))
        return seen[-1]

    monkeypatch.setattr(Straight, "trace", record)
    torch._dynamo.reset()
    yield seen
    torch._dynamo.reset()


def compiled(module, td):
    torch._dynamo.reset()
    torch.manual_seed(3)
    return torch.compile(module, backend="aot_eager", fullgraph=True)(td)


@pytest.mark.parametrize("family", [IndependentNormal, TanhNormal])
@pytest.mark.parametrize("batch", [[5], [], [2, 3]])
@pytest.mark.parametrize("safe", [False, True])
def test_graph_equals_that_of_the_general_call(traces, family, batch, safe):
    args = {**ARGS, "distribution_class": family}
    if safe:
        spec = Bounded(-0.5, 0.5, shape=(3,))
        module = SafeProbabilisticModule(**args, spec=spec, safe=True)
    else:
        module = ProbabilisticTensorDictModule(**args)
    size = batch or [4]
    results = []
    for way in ("straight", "general"):
        draw = torch.Generator().manual_seed(1)
        leaves = [torch.randn(*size, 3, generator=draw), torch.rand(*size, 3, generator=draw) + 0.1]
        loc, scale = (leaf.requires_grad_() for leaf in leaves)
        if way == "general":
            # A module with a get_dist of its own has no straight call.
            module.get_dist = module.get_dist
        td = compiled(module, TensorDict(loc=loc, scale=scale, batch_size=batch))
        assert list(td.keys()) == ["loc", "scale", "action", "sample_log_prob"]
        value, score = td["action"], td["sample_log_prob"]
        loss = (value * torch.arange(3.0)).sum() + (score * score).sum()
        results.append([value, score, *torch.autograd.grad(loss, (loc, scale))])
    assert traces == [True]
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    "change",
    [
        lambda module, td: setattr(module, "default_interaction_type", InteractionType.MODE),
        lambda module, td: module.distribution_kwargs.update(event_dim=0),
        lambda module, td: td.set("scale", td["scale"][:, :1]),
        lambda module, td: td.set("scale", td["scale"].double()),
        lambda module, td: td.to("cpu"),
    ],
    ids=["type", "keywords", "broadcast", "two dtypes", "device"],
)
def test_graph_steps_aside(traces, change):
    module = ProbabilisticTensorDictModule(**{**ARGS, "distribution_kwargs": {}})
    td = params()
    changed = change(module, td)
    td = changed if isinstance(changed, TensorDict) else td
    torch.manual_seed(3)
    expected = module(td.copy())
    found = compiled(module, td.copy())
    assert traces == [False]
    assert torch.equal(found["action"], expected["action"])
    assert torch.allclose(found["sample_log_prob"], expected["sample_log_prob"])


SPECS = {
    "numbers": lambda: Bounded(-0.5, 0.5, shape=(3,)),
    "each": lambda: Bounded(torch.tensor([-0.5, -0.1, 0.0]), torch.ones(3), shape=(3,)),
    "one for all": lambda: Bounded(-0.5, 0.5, shape=(1,)),
    "two dimensions": lambda: Bounded(-0.5, 0.5, shape=(5, 3)),
    "double": lambda: Bounded(-0.5, 0.5, shape=(3,), dtype=torch.float64),
    "none": lambda: Unbounded(shape=(3,)),
}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_graph_projects_onto_every_spec(traces, spec, dtype):
    module = SafeProbabilisticModule(**ARGS, spec=SPECS[spec](), safe=True)
    td = params(dtype=dtype)
    torch.manual_seed(3)
    expected = module(td.copy())
    found = compiled(module, td.copy())
    assert traces == [True]
    assert found["action"].dtype is expected["action"].dtype
    assert torch.equal(found["action"], expected["action"])
    assert torch.allclose(found["sample_log_prob"], expected["sample_log_prob"])


def test_graph_says_which_spec_a_value_does_not_fit(traces):
    module = SafeProbabilisticModule(**ARGS, spec=Bounded(-0.5, 0.5, shape=(4,)), safe=True)
    with pytest.raises(ValueError, match="does not fit its spec") as eager:
        module(params())
    with pytest.raises(Exception, match="does not fit its spec") as graph:
        compiled(module, params())
    assert str(eager.value) in str(graph.value)


def test_graph_of_another_spec_is_made_anew(traces):
    module = SafeProbabilisticModule(**ARGS, spec=Bounded(-0.5, 0.5, shape=(3,)), safe=True)
    call = torch.compile(module, backend="aot_eager", fullgraph=True)
    td = TensorDict(loc=torch.full((5, 3), 4.0), scale=torch.full((5, 3), 0.1), batch_size=[5])
    with torch.no_grad():
        assert (call(td.copy())["action"] == 0.5).all()
        module.spec = Composite(action=Bounded(-0.5, 0.25, shape=(3,)))
        assert (call(td.copy())["action"] == 0.25).all()
    assert traces == [True, True]


def test_an_overridden_projection_is_seen(traces):
    class Doubled(SafeProbabilisticModule):
        def _project(self, items, kind=None):
            return [(k, v * 0 + 7) for k, v in items]

    module = Doubled(**ARGS, spec=Bounded(-0.5, 0.5, shape=(3,)), safe=True)
    assert (compiled(module, params())["action"] == 7).all()


def test_a_projection_to_numbers_costs_no_guards():
    counts = []
    for safe in (False, True):
        spec = {"spec": Bounded(-0.5, 0.5, shape=(3,)), "safe": True} if safe else {}
        kind = SafeProbabilisticModule if safe else ProbabilisticTensorDictModule
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(kind(**ARGS, **spec), backend="eager", fullgraph=True)(params())
        (entry,) = _debug_get_cache_entry_list(kind.forward.__code__)
        counts.append(str(entry.guard_manager).count("+- "))
    # The numbers are in the code that all settings are in.
    assert counts[1] == counts[0]


def test_graph_of_a_changed_module_is_made_anew(traces):
    module = ProbabilisticTensorDictModule(**ARGS)
    call = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        call(params())
        module.return_log_prob = False
        assert "sample_log_prob" not in call(params())
        module.return_log_prob = True
        module.out_keys = ["other"]
        assert "other" in call(params())
    assert traces == [True, True]


def test_graph_is_made_anew_for_bounds_of_another_sign_of_zero():
    counter = CompileCounter()
    call = torch.compile(lambda m, td: m(td), backend=counter, fullgraph=True)
    loc, scale = torch.full((5, 3), -4.0), torch.full((5, 3), 0.1)
    found = []
    for low in (0.0, -0.0, 0.0):
        module = SafeProbabilisticModule(**ARGS, spec=Bounded(low, 1.0, shape=(3,)), safe=True)
        with torch.no_grad():
            td = call(module, TensorDict(loc=loc, scale=scale, batch_size=[5]))
        found.append(torch.signbit(td["action"]).any().item())
    assert found == [False, True, False]
    assert counter.frame_count == 2  # the third has the settings of the first


def test_graph_follows_the_switches_and_the_tensordict(traces):
    """One compiled module through all that the straight call steps aside for, and back."""
    module = ProbabilisticTensorDictModule(**ARGS, distribution_kwargs={})
    call = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        td = call(params())
        assert (td["action"] != td["loc"]).all()
        with set_interaction_type("mode"):
            assert torch.equal(call(td.copy())["action"], td["loc"])
        with set_skip_existing(True):
            assert call(td.copy())["action"] is td["action"]
        with set_composite_lp_aggregate(True), pytest.raises(Exception, match="aggregate"):
            call(td.copy())
        with pytest.raises(Exception, match="lock"):
            call(params().lock_())
        unlocked = params().lock_().unlock_()
        assert (call(unlocked)["action"] != unlocked["loc"]).all()
        module.distribution_kwargs["event_dim"] = 0
        assert call(params())["sample_log_prob"].shape == (5, 3)
        module.distribution_kwargs.clear()
        assert call(params())["sample_log_prob"].shape == (5,)
        D.Distribution.set_default_validate_args(True)
        call(params())
        D.Distribution.set_default_validate_args(False)
    assert traces[0] and not all(traces)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_shares_the_graph(clone):
    module = SafeProbabilisticModule(**ARGS, spec=Bounded(-0.5, 0.5, shape=(3,)), safe=True)
    counter = CompileCounter()
    call = torch.compile(lambda m, td: m(td), backend=counter, fullgraph=True)
    with torch.no_grad():
        for each in (module, clone(module)):
            assert (call(each, params())["action"].abs() <= 0.5).all()
    assert counter.frame_count == 1


def test_writes_to_the_input_and_returns_it(runs):
    td = params()
    with torch.no_grad():
        assert ProbabilisticTensorDictModule(**ARGS)(td) is td
    assert runs == [True]


@pytest.mark.parametrize(
    "prepare",
    [
        lambda td: td.set("loc", td["loc"].half()).set("scale", td["scale"].half()),
        lambda td: td.set("scale", td["scale"][:, :1]),
        lambda td: td.set("scale", td["scale"].double()),
        lambda td: td.set("loc", torch.nn.Parameter(td["loc"])),
        lambda td: TensorDict({k: v.view(5, 3, 1) for k, v in td.items()}, [5]),
        lambda td: TensorDict(dict(td.items()), [5, 3]).lock_(),
    ],
    ids=["half", "broadcast", "two dtypes", "parameter", "three dims", "locked"],
)
def test_steps_aside_for_other_inputs(runs, prepare):
    td = prepare(params())
    module = ProbabilisticTensorDictModule(**ARGS)
    with torch.no_grad():
        if td.is_locked:
            with pytest.raises(RuntimeError):
                module(td)
        else:
            torch.manual_seed(0)
            first = module(td.copy())
            torch.manual_seed(0)
            assert torch.equal(first["action"], general(module, td.copy())["action"])
    assert runs == [False]


def test_steps_aside_where_gradients_are_wanted(runs):
    td = params()
    td["loc"].requires_grad_()
    assert ProbabilisticTensorDictModule(**ARGS)(td)["action"].requires_grad
    assert runs == [False]


def test_steps_aside_for_a_batch_size_that_the_results_do_not_fit(runs):
    td = params(batch=[5, 3])
    with torch.no_grad(), pytest.raises(RuntimeError, match="batch size"):
        ProbabilisticTensorDictModule(**ARGS)(td)
    assert runs == [False] and list(td.keys()) == ["loc", "scale"]


def test_steps_aside_under_the_switches(runs):
    module = ProbabilisticTensorDictModule(**ARGS)
    td = params()
    with torch.no_grad():
        with set_interaction_type("mode"):
            assert torch.equal(module(td)["action"], td["loc"])
        before = td["action"]
        with set_skip_existing(True):
            assert module(td)["action"] is before
        with set_composite_lp_aggregate(True), pytest.raises(RuntimeError, match="aggregate"):
            module(td)
        D.Distribution.set_default_validate_args(True)
        td["scale"][0, 0] = -1.0
        with pytest.raises(ValueError, match="greater than 0"):
            module(td)
    assert runs == [False] * 4


def test_later_changes_of_the_module_are_seen(runs):
    module = ProbabilisticTensorDictModule(**ARGS)
    td = params()
    with torch.no_grad():
        module(td)
        module.return_log_prob = False
        del td["sample_log_prob"]
        assert "sample_log_prob" not in module(td)
        module.return_log_prob = True
        module.default_interaction_type = "mode"
        module.distribution_class = TanhNormal
        assert (module(td)["action"].abs() < 1).all()
        module.distribution_class = IndependentNormal
        module.distribution_kwargs["event_dim"] = 0
        assert module(td)["sample_log_prob"].shape == (5, 3)
        module.distribution_kwargs.clear()
        module.num_samples = torch.Size([2])
        assert module(td).shape == (2, 5)
        module.num_samples = None
        module.get_dist = lambda tensordict: IndependentNormal(tensordict["loc"] + 100.0, 1e-3)
        assert (module(td)["action"] > 50).all()
    assert runs == [True, False]


def test_an_overridden_get_dist_is_seen(runs):
    class Shifted(ProbabilisticTensorDictModule):
        def get_dist(self, tensordict):
            return IndependentNormal(tensordict["loc"] + 100.0, tensordict["scale"])

    with torch.no_grad():
        assert (Shifted(**ARGS)(params())["action"] > 50).all()
    assert runs == []


def test_hooks_run(runs):
    module = ProbabilisticTensorDictModule(**ARGS)
    module.register_forward_hook(lambda m, args, out: out.set("seen", torch.ones(5)))
    with torch.no_grad():
        assert "seen" in module(params())
    assert runs == [True]
