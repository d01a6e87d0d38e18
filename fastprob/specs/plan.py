"""From a spec, fastprob's or TorchRL's, to the callables that project onto it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from tensordict import unravel_key, unravel_key_list
from torch import Tensor

from fastprob.ops import projection as ops
from fastprob.specs import leaves
from fastprob.specs.base import Projection, Spec
from fastprob.specs.composite import Composite, Key

# The most derived first. TorchRL's Binary is read as the Categorical of n = 2 that it is.
_READ = (
    "MultiCategorical",
    "Categorical",
    "MultiOneHot",
    "OneHot",
    "Bounded",
    "Unbounded",
)


def _torchrl(name: str) -> type | tuple[()]:
    """TorchRL's class of this name where TorchRL is loaded, else what nothing is an instance of."""
    return getattr(sys.modules.get("torchrl.data.tensor_specs"), name, ())


def _is_spec(spec: Any) -> bool:
    return isinstance(spec, (Spec, _torchrl("TensorSpec")))


def _is_composite(spec: Any) -> bool:
    return isinstance(spec, (Composite, _torchrl("Composite")))


def _overrides(spec: Any, base: type, *names: str) -> bool:
    return any(getattr(type(spec), name, None) is not getattr(base, name, None) for name in names)


def _read_torchrl(spec: Any) -> Spec | None:
    """A TorchRL leaf as one of fastprob's, or None where its ``project`` is one of its own."""
    for name in _READ:
        base = _torchrl(name)
        if isinstance(base, type) and isinstance(spec, base):
            break
    else:
        return None
    if _overrides(spec, base, "project", "_project", "is_in"):
        return None
    # A size left open, -1, is a 1 in the bounds, which goes with any size.
    shape = [1 if size == -1 else int(size) for size in spec.shape]
    where: dict[str, Any] = {"shape": shape, "device": spec.device, "dtype": spec.dtype}
    if name == "Bounded":
        return leaves.Bounded(spec.low, spec.high, **where)
    if name == "Unbounded":
        return leaves.Unbounded(**where)
    if name in ("MultiCategorical", "MultiOneHot"):
        return getattr(leaves, name)(spec.nvec, mask=spec.mask, **where)
    if spec.space.n < 1:  # Categorical(-1): a number of outcomes left open, every index is valid
        return leaves.Unbounded(**where) if spec.space.n == -1 else None
    return getattr(leaves, name)(spec.space.n, mask=spec.mask, **where)


def _make(spec: Any) -> Projection:
    if isinstance(spec, Spec):
        return ops.Ask(spec) if _overrides(spec, Spec, "project") else spec.projection()
    read = _read_torchrl(spec)
    return ops.Ask(spec) if read is None else read.projection()


class _Masked:
    """The projection of a spec whose mask may be set anew, which makes a new projection.

    ``update_mask`` on the spec of a module is seen, as with TorchRL; it costs one comparison a
    call. Writing into the mask tensor itself is not seen.
    """

    __slots__ = ("mask", "projection", "spec")

    def __init__(self, spec: Any):
        self.spec = spec
        self.mask = spec.mask
        self.projection = _make(spec)

    def __call__(self, value: Tensor) -> Tensor:
        if self.spec.mask is not self.mask:
            self.__init__(self.spec)
        return self.projection(value)

    @property
    def covers(self) -> tuple | None:
        """What needs no projection, as long as there is no mask."""
        if self.mask is None and self.spec.mask is None:
            return getattr(self.projection, "covers", None)
        return None

    def __repr__(self) -> str:
        return f"Masked({self.projection!r})"


def projection_for(spec: Any) -> Projection | None:
    """The callable that projects a tensor onto a leaf spec, worked out once.

    Args:
        spec: a leaf of fastprob's or TorchRL's, or any object with a ``project`` method, which is
            then asked on every call. ``None`` has no projection.

    Returns:
        A callable from a tensor to a new one (or the same, where there is nothing to do), or
        ``None`` for no spec. An unbounded spec gives a cast to its dtype, as TorchRL's ``project``.

    Raises:
        TypeError: if ``spec`` is a composite, or has no ``project``.
        ValueError: if a spec of TorchRL's cannot be met: a NaN bound, ``low > high``, a mask that
            leaves nothing valid.
    """
    if spec is None:
        return None
    if _is_composite(spec):
        raise TypeError("expected a leaf spec, got a composite: use projection_plan")
    if not _is_spec(spec) and not callable(getattr(spec, "project", None)):
        raise TypeError(f"expected a spec, or an object with a project method, got {spec!r}")
    return _Masked(spec) if hasattr(spec, "mask") else _make(spec)


def projection_plan(spec: Any) -> tuple[tuple[Key, Projection], ...]:
    """The projections of all leaves of a composite spec, under their full keys.

    Args:
        spec: a composite of fastprob's or TorchRL's.

    Returns:
        Pairs of key and projection in the order of the spec. Leaves that are ``None``, and the key
        ``"_"``, are left out.
    """
    if not _is_composite(spec):
        raise TypeError(f"expected a composite spec, got {type(spec).__name__}: use projection_for")
    plan = []
    for key in spec.keys(True, True):
        key = unravel_key(key)
        projection = None if key == "_" else projection_for(spec[key])
        if projection is not None:
            plan.append((key, projection))
    return tuple(plan)


def as_composite(spec: Any, out_keys: Sequence[Any]) -> Any:
    """The spec of a module as a composite with exactly the module's out-keys.

    Args:
        spec: a composite, which may lack keys (they get ``None``); a leaf, for the only out-key;
            or ``None``. Of fastprob's or TorchRL's, and so is the result. It is cloned.
        out_keys: keys that the module samples.

    Returns:
        A ``Composite`` whose leaves are ``out_keys``.

    Raises:
        TypeError: if ``spec`` is no spec.
        RuntimeError: if a leaf is given for several out-keys, or ``spec`` has other keys.
    """
    names = unravel_key_list(list(out_keys))
    if spec is None:
        return Composite(dict.fromkeys(names))
    if not _is_spec(spec):
        raise TypeError(
            "expected a spec of fastprob.specs or torchrl.data, got "
            f"{type(spec).__module__}.{type(spec).__name__}"
        )
    spec = spec.clone()
    if not _is_composite(spec):
        if len(names) != 1:
            raise RuntimeError(
                f"one spec cannot serve the out-keys {names}: give a Composite with a spec, or "
                "None, for each"
            )
        composite: Any = Composite if isinstance(spec, Spec) else _torchrl("Composite")
        spec = composite({names[0]: spec})
    elif "_" in list(spec.keys()) and spec["_"] is not None:
        warnings.warn('the spec of the key "_" is ignored', stacklevel=2)
    found = unravel_key_list(list(spec.keys(True, True)))
    extra = [key for key in found if key not in names]
    if extra:
        raise RuntimeError(
            f"spec keys and out_keys do not match: the spec has {found}, the out-keys are {names}. "
            f"Take {extra} out of the spec, or add them to out_keys."
        )
    for key in names:
        if key not in found:
            spec[key] = None
    return spec
