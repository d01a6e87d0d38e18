"""The run of a case on one side: the module, its input, and what was seen of two calls."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from typing import Any

import tensordict.nn as td_nn
import torch
import torchrl.data as rl_data
import torchrl.modules as rl
from tensordict import NonTensorData, TensorDict, is_tensor_collection, unravel_key
from tensordict.nn import set_composite_lp_aggregate, set_interaction_type, set_skip_existing
from tensordict.tensorclass import is_non_tensor
from torch import Tensor

import fastprob
from fastprob import distributions as F
from fastprob import specs
from tests._fuzz.cases import Case, as_tuple
from tests._fuzz.families import MODE, RANDOM, Draw

UPSTREAM, FASTPROB = "upstream", "fastprob"
MODULES = {
    ("tensordict", UPSTREAM): td_nn.ProbabilisticTensorDictModule,
    ("tensordict", FASTPROB): fastprob.ProbabilisticTensorDictModule,
    ("torchrl", UPSTREAM): rl.SafeProbabilisticModule,
    ("torchrl", FASTPROB): fastprob.SafeProbabilisticModule,
}
SEQUENCES = {
    ("tensordict", UPSTREAM): td_nn.ProbabilisticTensorDictSequential,
    ("tensordict", FASTPROB): fastprob.ProbabilisticTensorDictSequential,
    ("torchrl", UPSTREAM): rl.SafeProbabilisticTensorDictSequential,
    ("torchrl", FASTPROB): fastprob.SafeProbabilisticTensorDictSequential,
}


@dataclasses.dataclass
class Seen:
    """What one side did.

    Attributes:
        error: what it raised, or None.
        built: whether the module was built.
        calls: the result of each of two calls: batch size, entries, and which object it is.
        left: the entries that the input had after the calls.
        global_state: torch's random state afterwards.
        state: that of the generator that was passed in.
        out_keys: of the module.
        module: what was called.
        result: the tensordict of the last call.
    """

    error: BaseException | None = None
    built: bool = False
    calls: list = dataclasses.field(default_factory=list)
    left: dict = dataclasses.field(default_factory=dict)
    global_state: Any = None
    state: Any = None
    out_keys: Any = None
    module: Any = None
    result: Any = None


def parameters(case: Case) -> list[dict[str, Tensor]]:
    source = Draw(torch.Generator().manual_seed(case.seed), case.dtype, case.even)
    found = [f.params(source, case.batch, case.event) for f in case.families]
    if case.grad:
        for params in found:
            for value in params.values():
                if value.dtype.is_floating_point:
                    value.requires_grad_()
    return found


def key_of(case: Case, name: str) -> Any:
    """The entry of a parameter; under `mapping` its last part is not the keyword."""
    last = f"p_{name}" if case.mapping else name
    return ("deep", last) if case.nested else last


def inputs(case: Case) -> tuple[TensorDict, Any]:
    """The tensordict, and the in-keys."""
    td = TensorDict({"obs": torch.arange(math.prod(case.batch)).view(case.batch)}, case.batch)
    params = parameters(case)
    if case.composite:
        tree = TensorDict({}, case.batch)
        for name, values in zip(case.component_names, params, strict=True):
            tree[name] = TensorDict(values, case.batch)
        names = ["params"]
        td[key_of(case, "params")] = tree
    else:
        names = list(params[0])
        for name, value in params[0].items():
            td[key_of(case, name)] = value
    if case.mapping:
        return td, {n: key_of(case, n) for n in names}
    return td, [key_of(case, n) for n in names]


def options(case: Case, side: str) -> list[dict]:
    """`distribution_kwargs` of each family."""
    found = []
    for name, family, variant in zip(case.names, case.families, case.variants, strict=True):
        kwargs = dict(family.kwargs[variant])
        if side == UPSTREAM and name.startswith("tanh") and case.dtype is not torch.float32:
            # RULE: TorchRL works with numbers as bounds in float32: 1e-8 off in float64. With
            # tensors it works in their dtype, as fastprob does with both.
            for bound in kwargs.keys() & {"low", "high"}:
                kwargs[bound] = torch.tensor(kwargs[bound], dtype=case.dtype)
        found.append(kwargs)
    return found


def distribution(case: Case, side: str) -> tuple[Any, dict]:
    """`distribution_class` and `distribution_kwargs`."""
    own = side == FASTPROB and case.given == "own"
    classes = [
        f.ours if own and f.ours is not None else f.upstream(case.library) for f in case.families
    ]
    kwargs = options(case, side)
    if not case.composite:
        return classes[0], kwargs[0]
    names = case.component_names
    composite: dict[str, Any] = {"distribution_map": dict(zip(names, classes, strict=True))}
    if any(kwargs):
        composite["extra_kwargs"] = dict(zip(names, kwargs, strict=True))
    if case.name_map:
        composite["name_map"] = dict(zip(names, case.sample_keys, strict=True))
    return F.CompositeDistribution if own else td_nn.CompositeDistribution, composite


def spec_of(case: Case, side: str) -> Any:
    if case.spec is None:
        return None
    source = specs if side == FASTPROB and case.spec == "fastprob" else rl_data
    kind = case.families[0].spec
    if kind == "categorical":
        return source.Categorical(case.event if case.wide else max(1, case.event - 1))
    if kind == "one_hot":
        # TorchRL's default is bool, so that an int64 value is always projected.
        return source.OneHot(case.event, **({"dtype": torch.int64} if case.wide else {}))
    bound = 1e4 if case.wide else 0.3
    return source.Bounded(-bound, bound, shape=(case.event,), dtype=case.dtype)


def repeats(case: Case) -> bool:
    """Whether fastprob repeats a deterministic value."""
    return case.interaction is not RANDOM and bool(case.shape)


def build(case: Case, side: str, library: str | None = None) -> tuple[Any, Any]:
    """The module, and the generator that was handed to it."""
    _, in_keys = inputs(case)
    kind, kwargs = distribution(case, side)
    config: dict[str, Any] = {
        "in_keys": in_keys,
        "distribution_class": kind,
        "distribution_kwargs": kwargs,
        "return_log_prob": case.log_prob,
        "num_samples": case.num_samples,
        "cache_dist": case.cache,
    }
    if not case.composite:
        config["out_keys"] = [case.out_key]
    if case.default_type is not None:
        config["default_interaction_type"] = case.default_type
    elif side == UPSTREAM:
        # RULE: the default is MODE, upstream's DETERMINISTIC.
        config["default_interaction_type"] = MODE
    if case.log_prob_key == "list":
        config["log_prob_keys"] = [f"lp{i}" for i, _ in enumerate(case.sample_keys)]
    elif case.log_prob_key is not None:
        config["log_prob_key"] = case.log_prob_key
    elif side == UPSTREAM and case.aggregate is None and not case.composite:
        # RULE: the default key of one log-probability, where the switch was never used.
        config["log_prob_key"] = "sample_log_prob"
    if side == UPSTREAM and repeats(case):
        # RULE: deterministic values are repeated num_samples times, see `repeated`.
        config["num_samples"] = None
    generator = None
    if case.generator == "object":
        config["generator"] = generator = torch.Generator().manual_seed(case.seed + 1)
    elif case.generator == "int":
        config["generator"] = case.seed + 1
    elif case.generator is not None:
        config["generator"] = "rng"
    library = library or case.library
    if library == "torchrl":
        config["spec"] = spec_of(case, side)
        config["safe"] = case.safe
    module = MODULES[library, side](**config)
    if case.sequence:
        keys = list(in_keys.values()) if isinstance(in_keys, dict) else in_keys
        copy = td_nn.TensorDictModule(
            lambda *given: tuple(x.clone() for x in given),
            in_keys=[("raw", *as_tuple(k)) for k in keys],
            out_keys=keys,
        )
        module = SEQUENCES[library, side](copy, module)
    return module, generator


@contextlib.contextmanager
def settings(case: Case, side: str):
    """The switches of one run; upstream's warnings are its own."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        if side == UPSTREAM:
            warnings.simplefilter("ignore")
        else:
            # It says that it picks a stand-in for DETERMINISTIC, as upstream does.
            warnings.filterwarnings("ignore", message=".*has no deterministic_sample")
        stack.enter_context(set_composite_lp_aggregate(case.aggregate))
        if case.global_type is not None:
            stack.enter_context(set_interaction_type(case.global_type))
        yield


def entries(td: Any) -> dict[Any, Any]:
    found = {}
    for key, value in td.items(True, is_leaf=_is_leaf):
        found[unravel_key(key)] = value.data if is_non_tensor(value) else value
    return {k: v for k, v in found.items() if not is_tensor_collection(v)}


def _is_leaf(kind: type) -> bool:
    return not issubclass(kind, TensorDict)


def observe(case: Case, side: str, library: str | None = None, change: Any = None) -> Seen:
    """Runs a case on one side.

    Args:
        case: the configuration.
        side: `UPSTREAM` or `FASTPROB`.
        library: whose module is run, where it is not that of the case.
        change: what is done to the module before it is called, for the tests of this file.
    """
    seen = Seen()
    with settings(case, side):
        try:
            module, generator = build(case, side, library)
            if change is not None:
                module = change(module)
            seen.built = True
            seen.module = module
            td, in_keys = inputs(case)
            keys = list(in_keys.values()) if isinstance(in_keys, dict) else in_keys
            if case.generator == "key_generator":
                generator = torch.Generator().manual_seed(case.seed + 1)
                td["rng"] = NonTensorData(generator, batch_size=case.batch)
            elif case.generator == "key_int":
                td["rng"] = NonTensorData(case.seed + 1, batch_size=case.batch)
            elif case.generator == "key_tensor":
                td["rng"] = torch.full(case.batch, case.seed + 1)
            if case.present:
                for key, family in zip(case.sample_keys, case.families, strict=True):
                    event = (case.event,) if family.event else ()
                    td[key] = torch.full((*case.batch, *event), 7.0)
                if case.log_prob:
                    for key in set(module.out_keys) - {
                        unravel_key(k) for k in keys + case.sample_keys
                    }:
                        td[key] = torch.full((*case.batch, 1), 7.0)
            if case.sequence:
                for key in keys:
                    td[("raw", *as_tuple(key))] = td[key]
                td = td.exclude(*keys)
            seen.out_keys = list(module.out_keys)
            torch.manual_seed(case.seed)
            for _ in range(2):
                out = {
                    None: None,
                    "same": TensorDict({"kept": torch.zeros(case.batch)}, case.batch),
                    "empty": TensorDict(),
                }[case.out]
                with set_skip_existing(True) if case.skip else contextlib.nullcontext():
                    if case.with_tensors:
                        result = module(*(td[k] for k in module.in_keys))
                    elif out is None:
                        result = module(td)
                    else:
                        result = module(td, tensordict_out=out)
                if is_tensor_collection(result):
                    seen.result = result
                    same = "input" if result is td else "out" if result is out else "new"
                    seen.calls.append((same, tuple(result.batch_size), entries(result)))
                else:
                    result = result if isinstance(result, tuple) else (result,)
                    seen.calls.append(("tensors", (), dict(enumerate(result))))
            seen.left = entries(td)
            seen.global_state = torch.get_rng_state()
            seen.state = None if generator is None else generator.get_state()
        except Exception as error:
            seen.error = error
    return seen
