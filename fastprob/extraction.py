"""Recognises `..., NormalParamExtractor, probabilistic module` in a sequence, to run both as one.

The kernel that draws maps the network's raw output to loc and scale on its way; both still appear
in the tensordict. Where the kernels do not serve a call, the modules run one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from tensordict.nn.utils import biased_softplus
from torch import Tensor, nn

from fastprob import backend
from fastprob.distributions.normal import ExtractedNormal, IndependentNormal
from fastprob.distributions.tanh_normal import ExtractedTanhNormal, TanhNormal
from fastprob.io import Items
from fastprob.modules import ProbabilisticTensorDictModule
from fastprob.ops.extractor import EXP, SOFTPLUS, Mapping

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Extraction:
    """The last two modules of a sequence, where the first ends with a NormalParamExtractor.

    Attributes:
        module: what gives loc and scale.
        head: the probabilistic module.
    """

    __slots__ = ("head", "module")

    def __init__(self, module: TensorDictModule, head: ProbabilisticTensorDictModule) -> None:
        self.module, self.head = module, head

    @classmethod
    def of(cls, modules: list[Any]) -> Extraction | None:
        """The last two of some modules, or None where they are no such pair."""
        if len(modules) < 2:
            return None
        module, head = modules[-2:]
        if type(module) is not TensorDictModule or not isinstance(
            head, ProbabilisticTensorDictModule
        ):
            return None
        if _extractor(module.module) is None or len(module.out_keys) != 2:
            return None
        return cls(module, head)

    def _fits(self) -> bool:
        """Whether both are, in this moment, of the plain kind that one kernel can stand for.

        Looked at in every call: hooks and attributes of either may have been set meanwhile.
        """
        module, head = self.module, self.head
        keywords = [k if isinstance(k, str) else k[-1] for k in head.dist_keys]
        named = dict(zip(keywords, head.in_keys, strict=True))
        extractor = _extractor(module.module)
        return (
            extractor is not None
            and named == {"loc": module.out_keys[0], "scale": module.out_keys[1]}
            and _plain(head)
            and type(head).get_dist is ProbabilisticTensorDictModule.get_dist
            and "get_dist" not in head.__dict__
            and module._kwargs is None
            and module.method is None
            and module.inplace is True
            and not _hooked(module)
            and not _hooked(head)
            and not _hooked(module.module)
            and not _hooked(extractor)
        )

    def __call__(self, tensordict: Any, **kwargs: Any) -> Any:
        """Makes the calls of both modules.

        Args:
            tensordict: what the modules before them have given.
            **kwargs: those of the head's call.

        Returns:
            the tensordict that was written to; None where nothing was done.
        """
        module = self.module
        inputs = [tensordict.get(key, None) for key in module.in_keys]
        first = inputs[0] if inputs else None
        if (
            not isinstance(first, Tensor)
            or not backend.serves(first)
            or torch.is_autocast_enabled(first.device.type)
            or not self._fits()
        ):
            return None
        extractor: Any = _extractor(module.module)
        raw: Any = inputs
        if extractor is not module.module:
            layers: Any = module.module
            for layer in list(layers)[:-1]:
                raw = layer(*raw) if isinstance(raw, (list, tuple)) else layer(raw)
        if isinstance(raw, (list, tuple)) and len(raw) == 1:
            (raw,) = raw
        mapping = mapping_of(extractor)
        if (
            mapping is None
            or not isinstance(raw, Tensor)
            or raw.dim() == 0
            or raw.shape[-1] % 2
            or not backend.serves(raw)
        ):
            # The network has run; what is left is done by the modules themselves.
            made = extractor(*raw) if isinstance(raw, (list, tuple)) else extractor(raw)
            for key, value in zip(module.out_keys, made, strict=True):
                tensordict.set(key, value)
            return self.head(tensordict, **kwargs)
        if self.head._build is IndependentNormal:
            dist = ExtractedNormal(raw, mapping)
        else:
            given = self.head.distribution_kwargs
            named = {k: given[k] for k in ("low", "high", "safe_tanh") if k in given}
            dist = ExtractedTanhNormal(raw, mapping, **named)

        def parameters() -> Items:
            return [(module.out_keys[0], dist.loc), (module.out_keys[1], dist.scale)]

        return self.head._sample(dist, tensordict, parameters=parameters, **kwargs)


def _plain(head: ProbabilisticTensorDictModule) -> bool:
    """Whether a head builds a distribution that the kernels can make of a raw output."""
    kwargs = head.distribution_kwargs
    if head._build is IndependentNormal:
        return not kwargs
    if head._build is not TanhNormal or not isinstance(kwargs, dict):
        return False
    given = set(kwargs)
    # upscale is of no effect without tanh_loc.
    return (
        given <= {"low", "high", "safe_tanh", "tanh_loc", "upscale", "event_dims"}
        and not kwargs.get("tanh_loc")
        and kwargs.get("event_dims") in (None, 1)
    )


def _extractor(module: Any) -> NormalParamExtractor | None:
    """The NormalParamExtractor that a module is, or that a sequence of layers ends with."""
    if type(module) is nn.Sequential and len(module):
        module = module[-1]
    return module if type(module) is NormalParamExtractor else None


def _hooked(module: Any) -> bool:
    return any(module.__dict__.get(name) for name in _HOOKS)


def mapping_of(extractor: NormalParamExtractor) -> Mapping | None:
    """How an extractor maps the scale, None where the kernels know no such mapping."""
    mapping, floor = extractor.scale_mapping, float(extractor.scale_lb)  # type: ignore[arg-type]
    if type(mapping) is biased_softplus:
        if _hooked(mapping):
            return None
        return Mapping(SOFTPLUS, float(mapping.bias), float(mapping.min_val), floor)
    if mapping is nn.functional.softplus:
        return Mapping(SOFTPLUS, 0.0, 0.0, floor)
    return Mapping(EXP, 0.0, 0.0, floor) if mapping is torch.exp else None
