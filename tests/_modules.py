"""What the tests of the modules share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict import nn as tdnn
from tensordict.utils import NestedKey
from torch import Tensor
from torch import distributions as D

import fastprob as fp

TYPES = list(fp.InteractionType.__members__.values())
RANDOM = fp.InteractionType.RANDOM
MODE = fp.InteractionType.MODE


def normal_td(*batch: int, event: int = 4, **kwargs: Any) -> TensorDict:
    """Parameters of a Normal."""
    loc, scale = torch.randn(*batch, event, **kwargs), torch.rand(*batch, event, **kwargs) + 0.1
    return TensorDict(loc=loc, scale=scale, batch_size=batch)


def indep_normal(**kwargs: Any) -> D.Distribution:
    return D.Independent(D.Normal(**kwargs), 1)


def head(cls: type = fp.ProbabilisticTensorDictModule, **kwargs: Any) -> Any:
    """A module over `normal_td` that samples `action`, unless told otherwise."""
    config: dict[str, Any] = {
        "in_keys": ["loc", "scale"],
        "out_keys": ["action"],
        "distribution_class": indep_normal,
    }
    config.update(kwargs)
    return cls(**config)


def twins(**kwargs: Any) -> tuple[Any, Any]:
    """fastprob's module and upstream's of the same configuration."""
    return head(**kwargs), head(tdnn.ProbabilisticTensorDictModule, **kwargs)


def entries(td: Any) -> list[tuple[NestedKey, Any]]:
    """Leaves in the tensordict's own order."""
    return list(td.items(True, True))


def keys(td: Any) -> list[NestedKey]:
    return [key for key, _ in entries(td)]


def assert_same(ours: Any, theirs: Any) -> None:
    """The same leaves in the same order: shape, dtype, and value within rounding."""
    assert keys(ours) == keys(theirs)
    assert ours.batch_size == theirs.batch_size
    for (key, a), (_, b) in zip(entries(ours), entries(theirs), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, key=key: f"{key}: {text}")


@contextmanager
def unchanged(td: Any) -> Iterator[None]:
    """Fails if the block changes a tensordict: its keys, its tensors, or their values."""
    before = [(k, v, v.clone() if isinstance(v, Tensor) else v) for k, v in entries(td)]
    nodes = list(td.keys(True))
    batch_size = td.batch_size
    yield
    assert list(td.keys(True)) == nodes
    assert td.batch_size == batch_size
    for (key, now), (_, same, value) in zip(entries(td), before, strict=True):
        assert now is same, f"{key} was replaced"
        if isinstance(value, Tensor):
            torch.testing.assert_close(now, value, rtol=0, atol=0, equal_nan=True)


@contextmanager
def raises_and_writes_nothing(
    kind: type[BaseException], td: TensorDictBase, *parts: str
) -> Iterator[None]:
    """Expects an error whose message holds all `parts`, and an untouched tensordict."""
    with unchanged(td), pytest.raises(kind) as caught:
        yield
    # A KeyError prints the repr of its message.
    said = caught.value.args[0] if isinstance(caught.value, KeyError) else str(caught.value)
    for part in parts:
        assert part in said, f"{part!r} is not in the message: {said}"
