"""Calls without nn.Module's frames, and all that still goes through them."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch.nn.modules import module as nn_module

import fastprob as fp
from fastprob.calls import Called
from fastprob.distributions import IndependentNormal
from fastprob.specs import Bounded

CONFIG = {
    "in_keys": ["loc", "scale"],
    "out_keys": ["action"],
    "distribution_class": IndependentNormal,
    "default_interaction_type": "random",
    "return_log_prob": True,
}


def parameters(rows=4):
    return TensorDict(loc=torch.zeros(rows, 3), scale=torch.ones(rows, 3), batch_size=[rows])


def sequence(kind):
    identity = TensorDictModule(nn.Identity(), in_keys=["loc"], out_keys=["loc"])
    return kind(identity, fp.ProbabilisticTensorDictModule(**CONFIG))


MODULES = {
    "module": lambda: fp.ProbabilisticTensorDictModule(**CONFIG),
    "safe": lambda: fp.SafeProbabilisticModule(
        **CONFIG, spec=Bounded(-1.0, 1.0, shape=(3,)), safe=True
    ),
    "sequential": lambda: sequence(fp.ProbabilisticTensorDictSequential),
    "safe sequential": lambda: fp.SafeProbabilisticTensorDictSequential(
        *sequence(fp.ProbabilisticTensorDictSequential).module,
    ),
}


@pytest.fixture
def entered(monkeypatch):
    """The modules whose calls went through nn.Module's frames."""
    seen = []
    plain = nn.Module._call_impl

    def record(self, *args, **kwargs):
        seen.append(self)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "_call_impl", record)
    return seen


@pytest.mark.parametrize("name", MODULES)
def test_a_call_goes_to_forward(entered, name):
    module = MODULES[name]()
    assert isinstance(module, Called)
    td = parameters()
    assert module(td) is td
    assert not any(isinstance(m, Called) for m in entered)


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


# nn.Module has no backward hooks for tensordicts, and says so.
unheard = pytest.mark.filterwarnings("ignore:For backward hooks to be called:UserWarning")


@unheard
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", ["module", "sequential"])
def test_hooks_of_a_module_are_seen_until_they_are_removed(entered, name, hook):
    module = MODULES[name]()
    handle = getattr(module, hook)(lambda *_: None)
    module(parameters())
    assert entered.count(module) == 1
    handle.remove()
    module(parameters())
    assert entered.count(module) == 1


@unheard
@pytest.mark.parametrize(
    "hook",
    [
        nn_module.register_module_forward_hook,
        nn_module.register_module_forward_pre_hook,
        nn_module.register_module_full_backward_hook,
        nn_module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_of_all_modules_are_seen(entered, hook):
    module = MODULES["module"]()
    handle = hook(lambda *_: None)
    try:
        module(parameters())
    finally:
        handle.remove()
    assert entered == [module]


def test_a_module_compiled_in_place_runs_its_graph():
    module = MODULES["module"]()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    module.compile(backend=backend)
    for _ in range(2):
        assert "action" in module(parameters())
    assert len(graphs) == 1


def test_dynamo_compiles_forward_and_runs_hooks_that_come_later():
    torch._dynamo.reset()
    module = MODULES["module"]()
    call = torch.compile(module, backend="eager")
    call(parameters())
    assert not _debug_get_cache_entry_list(Called.__call__.__code__)
    assert len(_debug_get_cache_entry_list(type(module).forward.__code__)) == 1
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(out))
    td = call(parameters())
    assert len(seen) == 1 and seen[0] is td


def test_a_module_inside_a_graph_is_one_graph():
    torch._dynamo.reset()
    module = MODULES["sequential"]()
    call = torch.compile(lambda td: module(td), backend="eager", fullgraph=True)
    assert "action" in call(parameters())


class Loud:
    def __call__(self, *args, **kwargs):
        return "loud", super().__call__(*args, **kwargs)  # type: ignore[misc]


class LoudModule(Loud, nn.Module):
    pass


@pytest.mark.parametrize("base, first", [(LoudModule, True), (LoudModule, False), (Loud, True)])
def test_another_base_with_a_call_of_its_own_comes_first(base, first):
    own = fp.ProbabilisticTensorDictModule
    kind = type("Mixed", (base, own) if first else (own, base), {})
    loud, td = kind(**CONFIG)(parameters())
    assert loud == "loud" and "action" in td


def test_who_traces_modules_sees_them():
    """torch.fx makes each call of a module a node, by a replacement of nn.Module's `__call__`."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = MODULES["module"]()

        def forward(self, loc, scale):
            return self.head(loc, scale)

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m, name):
            return isinstance(m, Called)

    graph = Leaves().trace(Head())
    assert [n.target for n in graph.nodes if n.op == "call_module"] == ["head"]
