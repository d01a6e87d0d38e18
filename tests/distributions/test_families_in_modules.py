"""The later families through the module: compiled without a break, by name, and recognized."""

from __future__ import annotations

import pytest
import torch
import torchrl.modules as rl
from tensordict import TensorDict
from torch import distributions as D

import fastprob as fp
from fastprob import distributions as F

MASK = torch.tensor([True, False, True, True])
PARAMS = {
    "TruncatedNormal": lambda: {"loc": torch.randn(3, 4), "scale": torch.rand(3, 4) + 0.1},
    "TanhDelta": lambda: {"param": torch.randn(3, 4)},
    "MaskedCategorical": lambda: {"logits": torch.randn(3, 4), "mask": MASK.expand(3, 4)},
    "MaskedOneHotCategorical": lambda: {
        "logits": torch.randn(3, 4),
        "indices": torch.tensor([0, 2, 3]).expand(3, 3),
    },
    "Ordinal": lambda: {"scores": torch.randn(3, 4)},
    "OneHotOrdinal": lambda: {"scores": torch.randn(3, 4)},
    "Bernoulli": lambda: {"logits": torch.randn(3, 4)},
    "Beta": lambda: {
        "concentration1": torch.rand(3, 4) + 1.5,
        "concentration0": torch.rand(3, 4) + 1.5,
    },
}
TYPES = ["random", "mode", "median", "mean", "deterministic"]
# A mean between the values has no score.
UNSCORED = {n for n in PARAMS if n not in ("TruncatedNormal", "TanhDelta", "Beta")}


def head(name, **kwargs):
    params = PARAMS[name]()
    module = fp.ProbabilisticTensorDictModule(
        in_keys=list(params), out_keys=["action"], distribution_class=name, **kwargs
    )
    return module, TensorDict(params, batch_size=[3])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", PARAMS)
def test_compiles_without_a_break_to_the_same_numbers(name, kind):
    scored = not (kind == "mean" and name in UNSCORED)
    module, td = head(name, default_interaction_type=kind, return_log_prob=scored)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    results = []
    for call in (module, compiled):
        torch.manual_seed(5)
        results.append(call(td.clone()))
    for key in ["action", "sample_log_prob"][: 1 + scored]:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["TruncatedNormal", "Beta"])
def test_compiled_gradients(name):
    module, td = head(name, default_interaction_type="random", return_log_prob=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (module, compiled):
        leaves = {k: v.clone().requires_grad_() for k, v in td.items()}
        torch.manual_seed(5)
        out = call(TensorDict(leaves, batch_size=[3]))
        total = out["action"].square().sum() + out["sample_log_prob"].sum()
        grads.append(torch.autograd.grad(total, list(leaves.values())))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", UNSCORED)
def test_a_mean_between_the_values_has_no_score(name):
    module, td = head(name, default_interaction_type="mean", return_log_prob=True)
    with pytest.raises(NotImplementedError, match="no log-probability"):
        module(td)


@pytest.mark.parametrize("name", PARAMS)
def test_upstreams_classes_and_names_are_known(name):
    theirs = getattr(rl, name, None) or getattr(D, name)
    assert F.resolve(theirs) is F.resolve(name) is getattr(F, name)


@pytest.mark.parametrize("base", [D.Bernoulli, D.Beta])
def test_what_a_callable_builds_is_recognized(base):
    args = (torch.rand(3, 4),) * (1 + (base is D.Beta))
    flat, event = F.recognize(base(*args)), F.recognize(D.Independent(base(*args), 1))
    assert isinstance(flat, F.Fused) and flat.batch_shape == (3, 4)
    assert isinstance(event, F.Fused) and event.event_shape == (4,)
    assert isinstance(event, D.Independent) and isinstance(event.base_dist, base)
    subclass = type("Own", (base,), {})
    assert not isinstance(F.recognize(subclass(*args)), F.Fused)
