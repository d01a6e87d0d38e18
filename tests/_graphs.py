"""What the tests of graphs share."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from tensordict.tensorclass import is_non_tensor

import fastprob as fp
from fastprob.graphs import RecordingBackend


def policy_of(*middle: torch.nn.Module, **head: Any) -> Any:
    """An MLP and a head that draws, scores and projects `action` `[*, 2]` from `obs` `[*, 3]`."""
    torch.manual_seed(7)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 8),
        torch.nn.Tanh(),
        *middle,
        torch.nn.Linear(8, 4),
        NormalParamExtractor(),
    )
    config: dict[str, Any] = {
        "in_keys": ["loc", "scale"],
        "out_keys": ["action"],
        "spec": fp.specs.Bounded(low=-0.5, high=0.5, shape=(2,)),
        "safe": True,
        "distribution_class": fp.distributions.IndependentNormal,
        "return_log_prob": True,
        "default_interaction_type": "random",
    }
    config.update(head)
    return fp.SafeProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=["obs"], out_keys=["loc", "scale"]),
        fp.SafeProbabilisticModule(**config),
    )


def graphed(policy: Any, **kwargs: Any) -> tuple[fp.CudaGraphPolicy, RecordingBackend]:
    """The policy as graphs on the stand-in, and the stand-in."""
    backend = RecordingBackend()
    return fp.CudaGraphPolicy(policy, backend=backend, **kwargs), backend


def observations(*batch: int, dtype: torch.dtype = torch.float32) -> TensorDict:
    return TensorDict(obs=torch.randn(*batch, 3, dtype=dtype), batch_size=batch)


def assert_same(a: Any, b: Any) -> None:
    """The same entries in the same order, bit for bit."""
    assert list(a.keys(True)) == list(b.keys(True))
    assert a.batch_size == b.batch_size
    assert a.device == b.device
    for key in b.keys(True):
        ours, theirs = a.get(key), b.get(key)
        if isinstance(theirs, torch.Tensor):
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), key
            assert torch.equal(ours, theirs), key
        elif is_non_tensor(theirs):
            assert ours.data == theirs.data, key


def assert_like_eager(graph: Any, policy: Any, make: Any, seed: int = 3, **kwargs: Any) -> Any:
    """A call of the graph and one of the policy, from the same random state, are the same."""
    given = make()
    torch.manual_seed(seed)
    theirs = policy(given.copy(), **kwargs)
    after = torch.get_rng_state()
    torch.manual_seed(seed)
    ours = graph(given.copy(), **kwargs)
    assert torch.equal(torch.get_rng_state(), after), "another number of random draws"
    assert_same(ours, theirs.detach())
    return ours
