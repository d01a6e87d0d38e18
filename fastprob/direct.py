"""The straight line through a module call, for the commonest call of a rollout.

A random draw and its log-probability from an IndependentNormal policy, `[B, A]` in fp32 or fp64 on
a CPU, without gradients: five tensor operations. Building the distribution and going through its
layers took 1.3 times as long again at 16 x 8, so this call is written out in one frame, which takes
0.5 times as long. What it does is what `ProbabilisticTensorDictModule.forward` does, and everything
out of the ordinary is left to that.

A graph that `torch.compile` makes holds the same operations either way, but guards whatever it was
traced through: functions, modules and attributes. Traced through this file, a call of Inductor's
code at 16 x 8 checks them in 2.4 us in place of 5.9, of 28 in all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch import distributions as D

from fastprob import backend, native
from fastprob import interaction as _interaction
from fastprob import io as _io
from fastprob import keys as _keys
from fastprob.distributions import IndependentNormal, TanhNormal
from fastprob.distributions._base import RANDOM
from fastprob.ops.projection import Clamp, clamp
from fastprob.reference._chunks import PIECE
from fastprob.reference._reduce import (
    WIDEST,
    functorch_level,
    kept_vectors,
    outside_transforms,
    vectors,
)
from fastprob.reference.normal import HALF_LOG_2PI
from fastprob.reference.tanh_normal import sample_score as tanh_sample_score
from fastprob.rng import DRAWS
from fastprob.rng import TOKEN as _token

_standard_normal = DRAWS.standard_normal.default
_only_normal = DRAWS.standard_normal.alone
_types = _interaction._mode
_skipping = _io._skip_existing
_aggregation = _keys._aggregate_switch

if hasattr(_types, "get_thread_mode"):

    def _modes() -> tuple[Any, Any, Any]:
        """The interaction type, whether calls skip what exists, and whether scores are summed."""
        return _interaction.current_type(), _io.skips_existing(), _keys.aggregate_mode()

else:

    def _modes() -> tuple[Any, Any, Any]:
        """The same from the switches themselves, which saves a graph 12 guards."""
        return _types._mode, _skipping._mode, _aggregation._mode


_grad_enabled = torch.is_grad_enabled
_contiguous = torch.contiguous_format
_Distribution = D.Distribution


def _settled_projection(module: Any, sample: str) -> tuple[Any, ...]:
    """Whether a value is projected; width, numbers and dtype of a clamp, None for anything else.

    A graph that is traced through the module and its spec has 60 guards more, which take 10 of 37
    us a call at 16 x 8.
    """
    found = (module._projections or {}).get(sample)
    if type(found) is Clamp and type(module)._project.__module__ == "fastprob.safe":
        spec = tuple(module._spec[sample].shape)
        if len(spec) == 1 and spec[0] > 1:
            return True, spec[0], found.low, found.high, found.dtype
    return module._projections is not None, None, None, None, None


def _graph() -> str:
    """What is being made: an `"export"`, the `"whole"` graph of this call, or a `"part"` of one.

    A graph that begins with the call of the module ends with it as well, and holds one draw; not so
    where another module's call, or what builds its distribution, is on the way.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import TracingContext

    from fastprob.modules import ProbabilisticTensorDictModule

    if backend.is_exporting():
        return "export"
    root = InstructionTranslator.current_tx().f_code
    # `forward` and `trace`, nothing in between.
    straight = len(TracingContext.extract_stack()) == 2
    first = root is ProbabilisticTensorDictModule.forward.__code__
    return "whole" if first and straight and outside_transforms() else "part"


# As for `outside_transforms`.
_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _in_code(settings: tuple[Any, ...], written: str) -> Callable[[], tuple[Any, ...]]:
    """A function with the settings among the constants of its code.

    A graph guards a function that it was traced through by one comparison, of its code, which all
    modules of the same settings share; attributes it guards one by one.

    Args:
        settings: str, bool, int, float, `torch.dtype` or None each.
        written: their repr: 0.0 and -0.0 are equal.
    """
    code = (lambda: "settings").__code__
    constants = tuple(settings if c == "settings" else c for c in code.co_consts)
    return FunctionType(code.replace(co_consts=constants), globals())


class Straight:
    """What of a module's configuration the straight call needs, settled once.

    Attributes:
        loc: key of the mean.
        scale: key of the standard deviation.
        sample: key of the value.
        score: key of the log-probability.
        squashed: whether it is a TanhNormal, which is straight in graphs alone.
        aggregate: whether the module was made to write the sum of composites' log-probabilities.
        random: whether the module draws where `set_interaction_type` says nothing.
        projects: whether the value is projected.
        width: where that is a clamp to two numbers, the size of the event that its spec has; else
            None.
        low: the lower one.
        high: the upper one.
        dtype: type of the values that are clamped without a conversion.
        settings: gives all of these, for graphs.
    """

    # In the order in which they are given.
    _SETTINGS = (
        "loc", "scale", "sample", "score", "squashed", "aggregate", "random",
        "projects", "width", "low", "high", "dtype",
    )  # fmt: skip
    __slots__ = (*_SETTINGS, "settings")
    loc: str
    scale: str
    sample: str
    score: str
    squashed: bool
    aggregate: bool
    random: bool

    def __init__(self, *settings: Any) -> None:
        for name, value in zip(self._SETTINGS, settings, strict=True):
            setattr(self, name, value)
        self.settings = _in_code(settings, repr(settings))

    def __reduce__(self) -> tuple[Any, ...]:
        return Straight, self.settings()

    @classmethod
    def of(cls, module: Any) -> Straight | None:
        """The straight call of a module, or None where it has none."""
        keywords = [k if isinstance(k, str) else k[-1] for k in module.dist_keys]
        if (
            (module._build is not IndependentNormal and module._build is not TanhNormal)
            or sorted(keywords) != ["loc", "scale"]
            or not module.return_log_prob
            or module.num_samples is not None
            or module._stream is not None
            or len(module._out_keys) != 1
        ):
            return None
        named = dict(zip(keywords, module.in_keys, strict=True))
        keys = named["loc"], named["scale"], module._out_keys[0], module._lp.only
        if not all(type(k) is str for k in keys):
            return None
        squashed = module._build is TanhNormal
        modes = module._lp.aggregate, module.default_interaction_type is RANDOM
        return cls(*keys, squashed, *modes, *_settled_projection(module, keys[2]))

    def run(self, module: Any, tensordict: Any) -> bool:
        """Makes the call, if it is one of those. Not for calls that are being compiled.

        Args:
            module: the module called.
            tensordict: a `TensorDict`, which is written to.

        Returns:
            whether the call was made; if not, nothing was changed.
        """
        interaction, skips, sums = _modes()
        if (
            _grad_enabled()
            or functorch_level() is not None
            or skips
            or module.distribution_kwargs
            or _Distribution._validate_args
            or bool(sums) is not self.aggregate
            or (not self.random if interaction is None else interaction is not RANDOM)
            or tensordict._is_locked
            or backend.mode == "triton"
        ):
            return False
        entries = tensordict._tensordict
        loc, scale = entries.get(self.loc), entries.get(self.scale)
        if type(loc) is not Tensor or type(scale) is not Tensor:
            return False
        shape, dtype = loc.shape, loc.dtype
        if (
            len(shape) != 2
            or scale.shape != shape
            or scale.dtype is not dtype
            or (dtype is not torch.float32 and dtype is not torch.float64)
            or not loc.is_cpu
            or not scale.is_cpu
        ):
            return False
        rows, n = shape
        batch_size, device = tensordict._batch_size, tensordict._device
        if (
            rows == 0  # a product with no rows has the shape of its offset
            or n == 0
            or n > WIDEST
            or rows * n >= 2 * PIECE
            or (batch_size and batch_size != shape[:1])
            or (device is not None and device.type != "cpu")
        ):
            return False
        key = (n, -HALF_LOG_2PI, -1, dtype)
        offset, weights = kept_vectors.get(key) or vectors(*key)
        if native.kernel is None or rows * n < native.LEAST:
            noise = torch.randn_like(loc, memory_format=_contiguous)
        else:
            noise = native.normal_(torch.empty_like(loc, memory_format=_contiguous))
        energy = torch.log(scale).addcmul_(noise, noise, value=0.5)
        score = torch.addmv(offset, energy, weights)
        # In the memory of the noise: a third tensor takes 1.4 times as long at 32768 x 8, where it
        # comes in fresh pages.
        value = torch.addcmul(loc, noise, scale, out=noise)
        if module._projections is not None:
            ((_, value),) = module._project([(self.sample, value)])
        # What TensorDict.set does with a checked entry of an unlocked tensordict.
        entries[self.sample] = value
        entries[self.score] = score
        return True

    def dist(self, module: Any, tensordict: Any) -> Any:
        """The distribution of a call in a graph that is being made.

        Args:
            module: the module called.
            tensordict: a `TensorDict`.

        Returns:
            the distribution; None where the general way is to build it, or to say what is wrong.
        """
        if module.distribution_kwargs:
            return None
        entries = tensordict._tensordict
        loc, scale = entries.get(self.loc), entries.get(self.scale)
        if not isinstance(loc, Tensor) or not isinstance(scale, Tensor):
            return None
        return TanhNormal(loc, scale) if self.squashed else IndependentNormal(loc, scale)

    def trace(self, module: Any, tensordict: Any) -> bool:
        """Makes the call in a graph that is being made, if it is one of those.

        Also with gradients, and with any number of batch dimensions.

        Args:
            module: the module called.
            tensordict: a `TensorDict`, which is written to.

        Returns:
            whether the call was made; if not, nothing was changed.
        """
        settings = self.settings()
        loc_key, scale_key, sample, score_key, squashed, aggregate, random = settings[:7]
        interaction, skips, sums = _modes()
        graph = _graph()
        if (
            graph == "export"
            or skips
            or module.distribution_kwargs
            or _Distribution._validate_args
            or (not sums) is aggregate
            or (not random if interaction is None else interaction is not RANDOM)
            or tensordict._is_locked
            or tensordict._device is not None
            or backend.mode == "triton"
        ):
            return False
        entries = tensordict._tensordict
        loc, scale = entries.get(loc_key), entries.get(scale_key)
        if not isinstance(loc, Tensor) or not isinstance(scale, Tensor):
            return False
        shape = loc.shape
        batch_size = tensordict._batch_size
        ndim = len(batch_size)
        if (
            loc.ndim <= ndim
            or scale.shape != shape
            or scale.dtype is not loc.dtype
            or not loc.is_cpu
            or not scale.is_cpu
            or shape[:ndim] != batch_size
        ):
            return False
        if graph == "whole":
            noise = _only_normal(shape, loc)
        else:
            noise = _standard_normal(shape, loc, _token)
        if squashed:
            value, score = tanh_sample_score(loc, scale, noise, 1.0, 0.0, 0.0, True, 1)
        else:
            value = loc.addcmul(noise, scale)
            # No addcmul, as in `reference.normal.score_noise`.
            energy = scale.log() + 0.5 * (noise * noise)
            score = energy.sum(-1).mul(-1).add(-HALF_LOG_2PI * shape[-1])
        projects, width, low, high, dtype = settings[7:]
        if width is not None and width == shape[-1] and loc.dtype is dtype:
            value = clamp(value, low, high) if value.requires_grad else value.clamp(low, high)
        elif projects:
            ((_, value),) = module._project([(sample, value)])
        entries[sample] = value
        entries[score_key] = score
        return True
