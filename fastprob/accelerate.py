"""`accelerate`: fastprob's modules in place of upstream's, in a policy that is built already.

A module is replaced by giving the object another class and the state that goes with it, as FSDP
and `torch.nn.utils.parametrize` do. Whoever holds the module keeps it: its parent, a collector, a
loss that keeps it outside its children, an optimiser's parameters, a hook. Nothing is copied, and a
module that is reached on two ways is replaced once.

TorchRL is never imported here: where its classes exist, they have been.
"""

from __future__ import annotations

import logging
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch
from tensordict.nn import probabilistic as _upstream
from torch import nn

from fastprob.keys import LogProbKeys
from fastprob.modules import ProbabilisticTensorDictModule
from fastprob.safe import SafeProbabilisticModule, SafeProbabilisticTensorDictSequential
from fastprob.sequential import ProbabilisticTensorDictSequential
from fastprob.streams import Stream

_log = logging.getLogger("fastprob")
_Policy = TypeVar("_Policy", bound=nn.Module)

_UPSTREAM = (
    _upstream.ProbabilisticTensorDictModule,
    _upstream.ProbabilisticTensorDictSequential,
)
_OURS = (ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential)
_TORCHRL = "torchrl.modules.tensordict_module"

# What a subclass may define for itself: fastprob's classes run without it, or leave it in force.
_FREE = frozenset(
    {
        "__abstractmethods__",
        "__annotate__",
        "__annotate_func__",
        "__annotations__",
        "__annotations_cache__",
        "__dict__",
        "__doc__",
        "__firstlineno__",
        "__init__",
        "__module__",
        "__orig_bases__",
        "__parameters__",
        "__qualname__",
        "__repr__",
        "__static_attributes__",
        "__weakref__",
        "_abc_impl",
    }
)


@dataclass(frozen=True)
class Entry:
    """What became of one probabilistic module.

    Attributes:
        path: where it stands in the policy, `""` being the policy itself.
        was: its class before.
        now: its class after, the same where it was left alone.
        reason: why it was left alone; `""` where it was replaced.
    """

    path: str
    was: type
    now: type
    reason: str = ""

    def __str__(self) -> str:
        where = self.path or "the policy itself"
        if self.reason:
            return f"left alone {where}, {self.was.__name__}: {self.reason}"
        return f"replaced {where}, {self.was.__name__}, by {self.now.__name__}"


@dataclass(frozen=True)
class Report:
    """What `accelerate` did.

    Attributes:
        replaced: the modules that are fastprob's now, in the order of the policy.
        left_alone: the other probabilistic modules, each with a reason.
    """

    replaced: tuple[Entry, ...]
    left_alone: tuple[Entry, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.replaced + self.left_alone))


class _LeftAlone(Exception):
    """Why a module cannot be replaced."""


@overload
def accelerate(policy: _Policy) -> _Policy: ...
@overload
def accelerate(policy: _Policy, *, return_report: Literal[False]) -> _Policy: ...
@overload
def accelerate(policy: _Policy, *, return_report: Literal[True]) -> tuple[_Policy, Report]: ...
def accelerate(policy: Any, *, return_report: bool = False) -> Any:
    """Replaces the probabilistic modules of a policy by fastprob's, in place.

    Takes modules of tensordict's and TorchRL's classes, `ProbabilisticActor` among them, wherever
    they stand: in a sequence, an actor-critic operator, or a loss, also one that holds its actor
    outside its children. They keep what they have settled: keys, log-prob keys, default interaction
    type, sample shape, generator, spec, projection, distribution and its keywords, parameters,
    buffers, hooks, `state_dict`, training flag. They also keep being instances of their classes.

    Left alone are subclasses that change what a call does, since fastprob's call would not ask
    them, and modules that fastprob cannot run. What was done is logged to the logger `"fastprob"`,
    at level INFO.

    Args:
        policy: any module. It is changed.
        return_report: whether the report is returned as well.

    Returns:
        the same object; with `return_report`, and the report.

    Raises:
        TypeError: if `policy` is no `torch.nn.Module`.

    Warns:
        UserWarning: if nothing was replaced.

    Examples:
        >>> import torch
        >>> from tensordict import nn as tdnn
        >>> import fastprob
        >>> policy = tdnn.ProbabilisticTensorDictSequential(
        ...     tdnn.TensorDictModule(torch.nn.Linear(3, 2), ["observation"], ["loc"]),
        ...     tdnn.ProbabilisticTensorDictModule(
        ...         in_keys=["loc"],
        ...         out_keys=["action"],
        ...         distribution_class=torch.distributions.Normal,
        ...         distribution_kwargs={"scale": 1.0},
        ...     ),
        ... )
        >>> policy, report = fastprob.accelerate(policy, return_report=True)
        >>> print(report)
        replaced the policy itself, ProbabilisticTensorDictSequential, by ProbabilisticTensorDictSequential
        replaced module.1, ProbabilisticTensorDictModule, by ProbabilisticTensorDictModule
    """  # noqa: E501
    if not isinstance(policy, nn.Module):
        raise TypeError(
            f"accelerate takes a torch.nn.Module, got {type(policy).__name__}; for a collector or "
            "a trainer, pass the policy that it holds"
        )
    replaced: list[Entry] = []
    left_alone: list[Entry] = []
    # The list first: a switch of class takes attributes away that the walk goes through.
    for path, module in list(_walk(policy)):
        if not isinstance(module, _UPSTREAM):
            continue
        was = type(module)
        try:
            _replace(module)
        except _LeftAlone as why:
            left_alone.append(Entry(path, was, was, str(why)))
        else:
            replaced.append(Entry(path, was, type(module)))
    report = Report(tuple(replaced), tuple(left_alone))
    for entry in report.replaced + report.left_alone:
        _log.info("accelerate: %s", entry)
    if not replaced:
        found = "; ".join(map(str, left_alone)) or "it has no probabilistic module"
        warnings.warn(
            f"accelerate found nothing to replace in this {type(policy).__name__}: {found}",
            UserWarning,
            stacklevel=2,
        )
    return (policy, report) if return_report else policy


def _walk(root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, parents first, with its path.

    Attributes that are no children are followed as well, and what stands in their lists and
    dictionaries: TorchRL's losses keep their networks there, so as not to list the parameters.
    """
    seen = {id(root)}
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        path, value = todo.pop()
        if isinstance(value, nn.Module):
            yield path, value
            # The children's names are those of state_dict: without "_modules".
            below = list(value._modules.items())
            below += [(k, v) for k, v in vars(value).items() if k != "_modules"]
        elif isinstance(value, dict):
            below = list(value.items())
        else:
            below = list(enumerate(value))
        for name, child in reversed(below):
            if isinstance(child, (nn.Module, list, tuple, dict)) and id(child) not in seen:
                seen.add(id(child))
                todo.append((f"{path}.{name}" if path else str(name), child))


def _replace(module: Any) -> None:
    """Makes a module fastprob's, or leaves it exactly as it is.

    Raises:
        _LeftAlone: with the reason.
    """
    if isinstance(module, _OURS):
        raise _LeftAlone("it is fastprob's already")
    was, state = type(module), vars(module)
    base, target = _known(was)
    _check_overrides(module, base, target)
    kept = dict(state)
    hooks = [(held, dict(held)) for k, held in state.items() if k.startswith("_forward_hooks")]
    try:
        now = _accelerated(was, target)
        if isinstance(module, _upstream.ProbabilisticTensorDictModule):
            _switch_head(module, now)
        else:
            _switch_sequence(module, now)
    except Exception as err:
        # Plain Python: neither the class nor the state may be left half-way.
        object.__setattr__(module, "__class__", was)
        state.clear()
        state.update(kept)
        for held, before in hooks:
            held.clear()
            held.update(before)
        if isinstance(err, _LeftAlone):
            raise
        raise _LeftAlone(f"{type(err).__name__}: {err}") from err


def _known(cls: type) -> tuple[type, type]:
    """The upstream class that `cls` is or derives from, the most derived, and fastprob's for it."""
    pairs: dict[type, type] = {
        _upstream.ProbabilisticTensorDictModule: ProbabilisticTensorDictModule,
        _upstream.ProbabilisticTensorDictSequential: ProbabilisticTensorDictSequential,
    }
    for place, name, ours in (
        ("probabilistic", "SafeProbabilisticModule", SafeProbabilisticModule),
        (
            "probabilistic",
            "SafeProbabilisticTensorDictSequential",
            SafeProbabilisticTensorDictSequential,
        ),
        ("actors", "ProbabilisticActor", SafeProbabilisticTensorDictSequential),
    ):
        theirs = getattr(sys.modules.get(f"{_TORCHRL}.{place}"), name, None)
        if theirs is not None:
            pairs[theirs] = ours
    return next((base, pairs[base]) for base in cls.__mro__ if base in pairs)


def _check_overrides(module: nn.Module, base: type, target: type) -> None:
    """Raises if the module's class, or the module itself, changes what a call does."""
    plain = nn.Module.__mro__
    known = {"__reduce__", "__reduce_ex__"}
    for cls in (*base.__mro__, *target.__mro__):
        if cls not in plain:
            known.update(vars(cls))
    known -= _FREE
    own = [cls for cls in type(module).__mro__ if cls not in base.__mro__]
    changed = {f"{cls.__name__}.{name}" for cls in own for name in vars(cls) if name in known}
    for name in vars(module):
        if name in known and isinstance(getattr(base, name, None), types.FunctionType):
            changed.add(f"{name} of this object")
    if changed:
        raise _LeftAlone(f"it overrides {', '.join(sorted(changed))}")


# Each upstream class that was met, and the class that is both it and fastprob's.
_MADE: dict[type, type] = {}


def _accelerated(cls: type, target: type) -> type:
    """The class of an accelerated `cls`: fastprob's methods, and an instance of both."""
    if issubclass(target, cls):
        return target

    def body(namespace: dict[str, Any]) -> None:
        namespace.update(
            __module__=__name__,
            __doc__=f"`{cls.__name__}` with the methods of `fastprob.{target.__name__}`.",
            __reduce_ex__=_reduce_ex,
            _accelerated_from=cls,
            _sliced=target,
        )

    made = _MADE.get(cls)
    if made is None:
        made = types.new_class(f"Fast{cls.__name__}", (target, cls), {}, body)
        made = _MADE.setdefault(cls, made)
    return made


def _reduce_ex(self: Any, protocol: Any) -> Any:
    """For copies and pickles: the class by the one that it was made from, which has a name."""
    cls = self._accelerated_from
    if type(self) is not _MADE.get(cls):
        return object.__reduce_ex__(self, protocol)
    return _blank, (cls,), self.__getstate__()


def _blank(cls: type) -> Any:
    """An accelerated `cls` without its state."""
    made: Any = _accelerated(cls, _known(cls)[1])
    return made.__new__(made)


def _switch_head(module: Any, now: type) -> None:
    state = vars(module)
    each, total = state.pop("_log_prob_keys", None), state.pop("_log_prob_key", None)
    aggregate = bool(state.pop("_composite_lp_aggreate_at_init", False))
    generator, key = state.pop("_generator", None), state.pop("_generator_key", None)
    state.pop("_trigger_warning_lpk", None)
    built_by = module.distribution_class
    state.pop("distribution_class", None)
    spec = state.pop("_spec", None)
    projects = _take_projection(module)
    module.__class__ = now
    module.distribution_class = built_by
    module._lp = LogProbKeys.resolved(
        None if aggregate else each, total if aggregate else None, aggregate, now.__name__
    )
    module._stream = None
    if generator is not None or key is not None:
        module._stream = Stream(generator=generator, key=key)
        module._saves_stream = False
    if module.num_samples is not None:
        module.num_samples = torch.Size(module.num_samples)
    if isinstance(module, SafeProbabilisticModule):
        module.safe = projects
        module._set_spec(spec)


def _take_projection(module: nn.Module) -> bool:
    """Removes the hook by which TorchRL projects, and says whether there was one."""
    common = sys.modules.get(f"{_TORCHRL}.common")
    projection = getattr(common, "_forward_hook_safe_action", None)
    hooks = module._forward_hooks
    found = [i for i, hook in hooks.items() if projection is not None and hook is projection]
    if not found:
        return False
    if next(iter(hooks)) != found[0]:
        raise _LeftAlone("one of its forward hooks runs before the projection onto its spec")
    for i in found:
        for held in (hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
            held.pop(i, None)
    return True


def _switch_sequence(module: Any, now: type) -> None:
    state = vars(module)
    state.pop("_det_part", None)
    state.pop("_requires_sample", None)
    spec = state.pop("_spec", None)
    module.__class__ = now
    safe = isinstance(module, SafeProbabilisticTensorDictSequential)
    # fastprob's spec follows the modules, but one that was set since construction is kept.
    if safe and spec is not None and module.spec != spec:
        module.spec = spec
