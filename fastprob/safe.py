"""SafeProbabilisticModule and SafeProbabilisticTensorDictSequential."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import distributions as D
from torch import nn

from fastprob.distributions._base import EMPTY, Fused
from fastprob.io import Items, write
from fastprob.modules import ProbabilisticTensorDictModule
from fastprob.sequential import ProbabilisticTensorDictSequential
from fastprob.specs import Composite, as_composite, fits, projection_plan
from fastprob.specs.plan import _is_composite

_is_compiling = torch.compiler.is_compiling


class _HasSpec:
    """`random` for modules with a `spec`, a composite one."""

    spec: Any
    out_keys: Any

    def random(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes a random element of the spec under the first sampled key.

        Args:
            tensordict: where it is written; its batch size gives the leading dimensions.

        Returns:
            the same tensordict.

        Raises:
            RuntimeError: if the first key has no spec.
        """
        key = self.out_keys[0]
        spec = self.spec[key] if key in self.spec.keys(True, True) else None
        if spec is None:
            raise RuntimeError(
                f"{type(self).__name__}.random needs a spec for {key!r}; pass spec= to the module"
            )
        tensordict.set(key, spec.rand(tensordict.batch_size))
        return tensordict

    def random_sample(self, tensordict: TensorDictBase) -> TensorDictBase:
        """The same as `random`."""
        return self.random(tensordict)


class SafeProbabilisticModule(_HasSpec, ProbabilisticTensorDictModule):
    """A probabilistic module whose values are projected onto a spec.

    The projection comes after scoring: the log-probability is that of the drawn value. It does not
    look at the values to decide anything, so that it stops no GPU and works under `vmap`.

    Args:
        in_keys: as for `ProbabilisticTensorDictModule`.
        out_keys: likewise.
        spec: spec of the sampled value, or a composite of one for each sampled key; fastprob's or
            TorchRL's.
        safe: whether values are projected onto the spec.
        **kwargs: those of `ProbabilisticTensorDictModule`.

    Raises:
        RuntimeError: if `safe` is set without a spec, or the keys of the spec are not sampled keys.
        TypeError: if `spec` is no spec.

    Source: the documentation of TorchRL's `SafeProbabilisticModule`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from fastprob import SafeProbabilisticModule
        >>> from fastprob.specs import Bounded
        >>> head = SafeProbabilisticModule(
        ...     in_keys=["loc", "scale"],
        ...     out_keys=["action"],
        ...     spec=Bounded(low=-1, high=1, shape=()),
        ...     safe=True,
        ...     distribution_class=torch.distributions.Normal,
        ... )
        >>> head(TensorDict(loc=torch.tensor([-3.0, 0.5]), scale=torch.ones(2), batch_size=[2]))[
        ...     "action"
        ... ]
        tensor([-1.0000,  0.5000])
    """

    def __init__(
        self,
        in_keys: NestedKey | Sequence[NestedKey] | dict[str, NestedKey],
        out_keys: NestedKey | Sequence[NestedKey] | None = None,
        spec: Any = None,
        *,
        safe: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(in_keys, out_keys, **kwargs)
        if spec is not None and _is_composite(spec) and "_" in list(spec.keys()):
            warnings.warn('the entry "_" of the spec is ignored', UserWarning, stacklevel=2)
        self.safe = safe
        self._set_spec(as_composite(spec, self._out_keys))

    @property
    def spec(self) -> Any:
        """The composite spec, one entry for each sampled key."""
        return self._spec

    @spec.setter
    def spec(self, spec: Any) -> None:
        if not _is_composite(spec):
            raise RuntimeError(
                f"spec must be a Composite with the keys {self._out_keys}, got "
                f"{type(spec).__name__}; wrap it as Composite({{key: spec}})"
            )
        self._set_spec(as_composite(spec, self._out_keys))

    def _set_spec(self, spec: Any) -> None:
        plan = projection_plan(spec)
        if self.safe and all(spec[k] is None for k in spec.keys(True, True)):
            raise RuntimeError(
                f"{type(self).__name__} got safe=True without a spec to project onto; pass spec=, "
                "or safe=False"
            )
        self._spec = spec
        self._projections = dict(plan) if self.safe else None
        self._fitting: dict[NestedKey, torch.Size] = {}

    def _carry(self, dist: D.Distribution) -> bool:
        keys = self._out_keys
        projections = self._projections
        if not isinstance(dist, Fused) or len(keys) != 1 or not projections:
            return False
        projection = projections.get(keys[0])
        if projection is None or not dist.carry(projection):
            return False
        shape = (self.num_samples or EMPTY) + dist.batch_shape + dist.event_shape
        if _is_compiling():
            self._check_fit(keys[0], shape)
        elif self._fitting.get(keys[0]) != shape:
            self._check_fit(keys[0], shape)
            self._fitting[keys[0]] = shape
        return True

    def _project(self, items: Items, kind: Any = None) -> Items:
        projections = self._projections
        assert projections is not None
        fitting = self._fitting
        projected: Items = []
        for key, value in items:
            projection = projections.get(key)
            if projection is not None:
                shape = value.shape
                if _is_compiling():
                    # What is kept would be a condition of the graph, and its first call change it.
                    self._check_fit(key, shape)
                elif fitting.get(key) != shape:
                    self._check_fit(key, shape)
                    fitting[key] = shape
                if kind is None or getattr(projection, "covers", None) != kind:
                    value = projection(value)
            projected.append((key, value))
        return projected

    def _check_fit(self, key: NestedKey, shape: torch.Size) -> None:
        spec = self._spec[key]
        if not fits(spec, shape):
            raise ValueError(
                f"{type(self).__name__} got a value of shape {tuple(shape)} under {key!r}, "
                f"which does not fit its spec of shape {tuple(spec.shape)}: the trailing "
                "dimensions of the value must be those of the spec"
            )

    def to(self, *args: Any, **kwargs: Any) -> SafeProbabilisticModule:
        """Moves the module and its spec."""
        super().to(*args, **kwargs)
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        if device is not None and any(v is not None for v in self._spec.values()):
            self._set_spec(self._spec.to(device))
        return self


class SafeProbabilisticTensorDictSequential(_HasSpec, ProbabilisticTensorDictSequential):
    """A probabilistic sequence with a spec, put together from those of its modules.

    Args:
        *modules: as for `ProbabilisticTensorDictSequential`.
        partial_tolerant: likewise.
        **kwargs: likewise.

    Source: the documentation of TorchRL's `SafeProbabilisticTensorDictSequential`.
    """

    @property
    def spec(self) -> Any:
        """The composite spec of all out-keys; None for those that no module has a spec for.

        Put together anew at every access, unless a composite was set.
        """
        given = self.__dict__.get("_spec")
        if given is not None:
            return given
        merged: Any = None
        entries: dict[NestedKey, Any] = {}
        for module in self._modules_now():
            entries.update(dict.fromkeys(module.out_keys))
            own = getattr(module, "spec", None)
            if own is None or not _is_composite(own):
                continue
            if merged is None or type(merged) is Composite:
                merged = own
            entries.update({k: own[k] for k in own.keys(True, True)})
        kind = Composite if merged is None else type(merged)
        spec = kind()
        for key, value in entries.items():
            spec[key] = value
        return spec

    @spec.setter
    def spec(self, spec: Any) -> None:
        if not _is_composite(spec):
            raise RuntimeError(
                f"spec must be a Composite with the keys {self.out_keys}, got "
                f"{type(spec).__name__}; wrap it as Composite({{key: spec}})"
            )
        self.__dict__["_spec"] = spec

    def to(self, *args: Any, **kwargs: Any) -> SafeProbabilisticTensorDictSequential:
        """Moves the modules and their specs."""
        for module in self._modules_now():
            if isinstance(module, _HasSpec):
                module.to(*args, **kwargs)  # type: ignore[attr-defined]
        # Past TorchRL's, in a class that derives from it: it sets the spec that it moves.
        nn.Module.to(self, *args, **kwargs)
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)  # type: ignore[attr-defined]
        given = self.__dict__.get("_spec")
        if device is not None and given is not None:
            self.spec = given.to(device)
        return self

    def random(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes a random element of the spec of the last module's first sampled key.

        Args:
            tensordict: where it is written; its batch size gives the leading dimensions.

        Returns:
            the same tensordict.

        Raises:
            RuntimeError: if that key has no spec.
        """
        last = self._last_module
        key = last.out_keys[0]
        spec = self.spec
        leaf = spec[key] if key in spec.keys(True, True) else None
        if leaf is None:
            raise RuntimeError(
                f"{type(self).__name__}.random needs a spec for {key!r}; give its last module one"
            )
        write(tensordict, [(key, leaf.rand(tensordict.batch_size))], self)
        return tensordict
