"""The composite spec: one spec per key of a tensordict."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import indent
from typing import Any, TypeAlias, overload

import torch
from tensordict import TensorDict, TensorDictBase, unravel_key

from fastprob.specs.base import Spec, as_device, as_shape, new_shape

Key: TypeAlias = "str | tuple[str, ...]"

_NO_DEFAULT = object()


class Composite(Spec):
    """One spec per key; keys may nest, and a value of ``None`` leaves a key unbounded.

    Args:
        specs: a mapping from keys (strings, or tuples for nested ones) to specs, ``None``, or
            mappings, which become nested composites.
        shape: leading shape of every leaf, the batch size of the tensordicts.
        device: device of all leaves; ``None`` leaves each on its own.
        batch_size: another name for ``shape``.
        **kwargs: more keys and specs.

    Raises:
        ValueError: if the shape of a leaf does not begin with ``shape``, or its device is another.
        TypeError: if a value is no spec.
    """

    device: torch.device | None  # type: ignore[assignment]

    def __init__(
        self,
        specs: Mapping[Any, Any] | Composite | None = None,
        /,
        *,
        shape: Any = None,
        device: Any = None,
        batch_size: Any = None,
        **kwargs: Any,
    ):
        if shape is not None and batch_size is not None:
            raise TypeError("Composite: expected shape or batch_size, got both")
        shape = batch_size if shape is None else shape
        self.shape = as_shape(() if shape is None else shape)
        self.device = None if device is None else as_device(device)
        self._specs: dict[str, Any] = {}
        if specs is not None and not hasattr(specs, "items"):
            raise TypeError(f"Composite: expected a mapping of specs, got {type(specs).__name__}")
        for key, spec in [*(() if specs is None else specs.items()), *kwargs.items()]:
            self[key] = spec

    @property
    def dtype(self) -> None:  # type: ignore[override]
        """None: each leaf has its own."""
        return None

    @property
    def batch_size(self) -> torch.Size:
        """See ``shape``."""
        return self.shape

    # Access by key ------------------------------------------------------------------------------

    def _resolve(self, key: Any) -> tuple[str, ...]:
        if not isinstance(key, (str, tuple)):
            raise TypeError(f"expected a key, a string or a tuple of strings, got {key!r}")
        key = unravel_key(key)
        return (key,) if isinstance(key, str) else key

    def __getitem__(self, key: Any) -> Any:
        node: Any = self
        for part in self._resolve(key):
            if not isinstance(node, Composite) or part not in node._specs:
                raise KeyError(f"no key {key!r}; the spec has {self.keys(True, True)}")
            node = node._specs[part]
        return node

    def __setitem__(self, key: Any, spec: Any) -> None:
        first, *rest = self._resolve(key)
        if rest:
            child = self._specs.get(first)
            if not isinstance(child, Composite):
                child = Composite(shape=self.shape, device=self.device)
            child[tuple(rest)] = spec
            self._specs[first] = child
        else:
            self._specs[first] = self._fit(first, spec)

    def _fit(self, key: str, spec: Any) -> Any:
        if spec is None:
            return None
        if isinstance(spec, Mapping):
            return Composite(spec, shape=self.shape, device=self.device)
        if not isinstance(spec, Spec):
            raise TypeError(
                f"expected a spec of fastprob.specs, None or a dict for {key!r}, got "
                f"{type(spec).__module__}.{type(spec).__name__}"
            )
        if spec.shape[: self.ndim] != self.shape:
            if isinstance(spec, Composite) and self.shape[: spec.ndim] == spec.shape:
                return Composite(spec, shape=self.shape, device=spec.device)
            raise ValueError(
                f"expected a spec for {key!r} whose shape begins with that of the composite, "
                f"{tuple(self.shape)}, got {tuple(spec.shape)}"
            )
        if self.device is not None and spec.device != self.device:
            if spec.device is None:
                return spec.to(self.device)
            raise ValueError(
                f"expected a spec for {key!r} on {self.device}, the device of the composite, got "
                f"one on {spec.device}"
            )
        return spec

    def __delitem__(self, key: Any) -> None:
        *head, last = self._resolve(key)
        node = self[tuple(head)] if head else self
        if not isinstance(node, Composite) or last not in node._specs:
            raise KeyError(f"no key {key!r}; the spec has {self.keys(True, True)}")
        del node._specs[last]

    def __contains__(self, key: Any) -> bool:
        try:
            self[key]
        except KeyError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    @overload
    def get(self, key: Any) -> Any: ...
    @overload
    def get(self, key: Any, default: Any) -> Any: ...
    def get(self, key: Any, default: Any = _NO_DEFAULT) -> Any:
        """The spec of ``key``; ``default``, if given, where there is none."""
        if default is _NO_DEFAULT or key in self:
            return self[key]
        return default

    def set(self, key: Any, spec: Any) -> Composite:
        """Sets the spec of ``key`` and returns the composite."""
        self[key] = spec
        return self

    def update(self, specs: Mapping[Any, Any] | Composite) -> Composite:
        """Sets several specs; nested composites are merged. Returns the composite."""
        for key, spec in specs.items():
            if key in self and isinstance(self[key], Composite) and hasattr(spec, "items"):
                self[key].update(spec)
            else:
                self[key] = spec
        return self

    def items(self, include_nested: bool = False, leaves_only: bool = False) -> list[Any]:
        """Keys and specs, in the order they were set.

        Args:
            include_nested: also those of nested composites, under tuple keys.
            leaves_only: leave out the composites themselves. ``None`` counts as a leaf.
        """
        found: list[Any] = []
        for key, spec in self._specs.items():
            if include_nested and isinstance(spec, Composite):
                for sub, leaf in spec.items(True, leaves_only):
                    found.append(((key, *((sub,) if isinstance(sub, str) else sub)), leaf))
            if not (leaves_only and isinstance(spec, Composite)):
                found.append((key, spec))
        return found

    def keys(self, include_nested: bool = False, leaves_only: bool = False) -> list[Key]:
        """See :meth:`items`."""
        return [key for key, _ in self.items(include_nested, leaves_only)]

    def values(self, include_nested: bool = False, leaves_only: bool = False) -> list[Any]:
        """See :meth:`items`."""
        return [spec for _, spec in self.items(include_nested, leaves_only)]

    def is_empty(self, recurse: bool = False) -> bool:
        """Whether there is no key or, with ``recurse``, no leaf but ``None``."""
        if recurse:
            return all(spec is None for spec in self.values(True, True))
        return not self._specs

    # Values -------------------------------------------------------------------------------------

    def _tensordict(self, values: dict[str, Any], shape: Any) -> TensorDict:
        return TensorDict(values, batch_size=(*shape, *self.shape), device=self.device)

    def rand(  # type: ignore[override]
        self, shape: Any = (), *, generator: torch.Generator | None = None
    ) -> TensorDict:
        """Draws a tensordict of batch size ``[*shape, *spec.shape]``."""
        shape = as_shape(shape or ())
        drawn = {k: s.rand(shape, generator=generator) for k, s in self.items() if s is not None}
        return self._tensordict(drawn, shape)

    def zero(self, shape: Any = ()) -> TensorDict:  # type: ignore[override]
        """Zeros in a tensordict of batch size ``[*shape, *spec.shape]``."""
        shape = as_shape(shape or ())
        return self._tensordict(
            {key: spec.zero(shape) for key, spec in self.items() if spec is not None}, shape
        )

    def zeros(self, shape: Any = ()) -> TensorDict:  # type: ignore[override]
        """See :meth:`zero`."""
        return self.zero(shape)

    def is_in(self, value: Any) -> bool:
        """Whether every key that has a spec is there and in it; other keys do not matter."""
        for key, spec in self.items():
            if spec is None or (isinstance(spec, Composite) and spec.is_empty(recurse=True)):
                continue
            item = value.get(key, None)
            if item is None or not spec.is_in(item):
                return False
        return True

    def project(self, value: TensorDictBase) -> TensorDictBase:  # type: ignore[override]
        """A shallow copy of the tensordict with each key projected; absent keys are left out.

        TorchRL writes into the given tensordict instead.
        """
        out = value.copy()
        for key, spec in self.items(include_nested=True, leaves_only=True):
            item = out.get(key, None)
            if spec is not None and item is not None:
                out.set(key, spec.project(item))
        return out

    # The spec as a whole ------------------------------------------------------------------------

    def _map(self, shape: Any, device: Any, change: Any) -> Composite:
        specs = {key: None if spec is None else change(spec) for key, spec in self._specs.items()}
        return type(self)(specs, shape=shape, device=device)

    def clone(self) -> Composite:
        """A deep copy."""
        return self._map(self.shape, self.device, lambda spec: spec.clone())

    def to(self, dest: Any) -> Composite:
        """The spec with all leaves on another device, or of another dtype."""
        if dest is None:
            return self
        device = self.device if isinstance(dest, torch.dtype) else as_device(dest)
        return self._map(self.shape, device, lambda spec: spec.to(dest))

    def expand(self, *shape: Any) -> Composite:
        """The spec with more dims in front of every leaf, or with leading 1s made larger."""
        size = new_shape(shape)
        self._check_expand(size)
        return self._map(
            size, self.device, lambda spec: spec.expand(*size, *spec.shape[self.ndim :])
        )

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is type(self)
            and self.shape == other.shape
            and self.device == other.device
            and self._specs == other._specs
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        lines = [f"{key}: {spec!r}" for key, spec in self._specs.items()]
        lines.append(f"shape={tuple(self.shape)}, device={self.device}")
        return "Composite(\n" + indent(",\n".join(lines), "    ") + ")"
