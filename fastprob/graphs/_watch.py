"""What a captured graph depends on besides its inputs, looked at in every call.

A graph reads parameters from where they were when it was captured, and repeats the branches that
Python took. So each call compares the places of parameters and buffers, the modules themselves,
their training flags and the configuration of the probabilistic ones with what they were. In the
commonest case nothing has changed, and what runs in every call is made of functions that loop in C:
2.2 us for an MLP of two layers and its head, where a walk over `parameters()` alone takes 10.5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, zip_longest
from operator import itemgetter
from typing import Any

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

Settings = dict[tuple[int, ...], tuple[int, list[Any]]]

_from_iterable = chain.from_iterable
_values = dict.values
_address = Tensor.data_ptr
_training = itemgetter("training")

# Attributes of a probabilistic module, fastprob's or tensordict's, or of a sequence around it, that
# decide what a call does. They are compared by identity.
_CONFIGURATION = (
    "_build",
    "_distribution_class",
    "_in_keys",
    "_log_prob_key",
    "_log_prob_keys",
    "_lp",
    "_num_samples",
    "_out_keys",
    "_out_keys_apparent",
    "_projections",
    "_return_log_prob",
    "_select_before_return",
    "_spec",
    "_stream",
    "cache_dist",
    "default_interaction_type",
    "dist_keys",
    "distribution_class",
    "distribution_kwargs",
    "inplace",
    "n_empirical_estimate",
    "num_samples",
    "partial_tolerant",
    "return_composite",
    "return_log_prob",
    "safe",
)


class Watch:
    """Looks at modules and optimizers on behalf of the graphs that were captured with them.

    Args:
        watched: modules and optimizers.
        settings: numbers that earlier watches gave to states of the configuration, by the
            identities of its values; and these values, so that no others get their identities.
    """

    def __init__(self, watched: Iterable[Any], settings: Settings) -> None:
        watched = list(watched)
        roots = [root for root in watched if isinstance(root, nn.Module)]
        self._streams = list(_streams(roots))
        # A counter-based stream is a module: its state is a buffer.
        roots += [v for s in self._streams for v in vars(s).values() if isinstance(v, nn.Module)]
        self.modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self.optimizers = [o for o in watched if isinstance(o, torch.optim.Optimizer)]
        # A module without children that gets one as a rule loses a parameter to it, which shows.
        self._children = [m._modules for m in self.modules if len(m._modules) > 0]
        self._dicts = [m.__dict__ for m in self.modules]
        # The wrapper that torch.compile puts around a module has no flag of its own.
        self._flagged = [d for d in self._dicts if "training" in d]
        self._tensors = [d for m in self.modules for d in (m._parameters, m._buffers) if len(d) > 0]
        self._loose = list(self._loose_tensors())
        self._getters = list(self._configuration_getters())
        self._structure = self._structure_now()
        self._state: tuple[list[Any], ...] | None = None
        self._number = 0
        self._settings = settings

    def _loose_tensors(self) -> Iterator[tuple[dict, Any]]:
        """Tensors that a module holds outside its parameters and buffers: `(holder, name)`.

        `TensorDict.to_module` puts tensors there that are no parameters, and distributions' keyword
        arguments may be tensors.
        """
        for attributes in self._dicts:
            kwargs = attributes.get("distribution_kwargs")
            for holder in (attributes, kwargs if type(kwargs) is dict else {}):
                yield from ((holder, k) for k, v in holder.items() if isinstance(v, Tensor))

    def _configuration_getters(self) -> Iterator[tuple[Callable[[Any], tuple], dict]]:
        for module, attributes in zip(self.modules, self._dicts, strict=True):
            if not isinstance(module, TensorDictModuleBase):
                continue
            names = [name for name in _CONFIGURATION if name in attributes]
            if len(names) > 1:  # of one name, an itemgetter gives no tuple
                yield itemgetter(*names), attributes
            kwargs = attributes.get("distribution_kwargs")
            if type(kwargs) is dict and len(kwargs) > 0:
                first, *_ = kwargs
                yield itemgetter(first, *kwargs), kwargs
        for stream in self._streams:
            # Loading a state, or folding an index in, gives a stream another generator.
            yield itemgetter("generator", "generator"), vars(stream)

    def _structure_now(self) -> list[Any]:
        return list(_from_iterable(map(_values, self._children)))

    def configuration(self) -> int | None:
        """A number for the training flags and configuration in force.

        Returns:
            the same for the same state, to be part of a graph's key; None where a module was
            replaced or removed, so that there have to be a new watch and new graphs.
        """
        try:
            state = (
                list(_from_iterable(map(_values, self._children))),
                list(map(_training, self._flagged)),
                [get(holder) for get, holder in self._getters],
            )
            # Identical elements count as equal without being looked at: 0.1 us for 40 of them.
            if state == self._state:
                return self._number
        except Exception:
            # An attribute is gone, or two values cannot be compared, as tensors cannot.
            return self._look_closely()
        return self._look_closely()

    def _look_closely(self) -> int | None:
        if any(a is not b for a, b in zip_longest(self._structure_now(), self._structure)):
            return None
        try:
            values = [get(holder) for get, holder in self._getters]
        except KeyError:
            return None
        flags = list(map(_training, self._flagged))
        ids = tuple(map(id, (*flags, *_from_iterable(values))))
        self._number, _ = self._settings.setdefault(ids, (len(self._settings), values))
        self._state = (list(self._structure), flags, values)
        return self._number

    def places(self) -> list[Any]:
        """Where every tensor lies that a graph reads without having been given it."""
        try:
            places: list[Any] = list(map(_address, _from_iterable(map(_values, self._tensors))))
        except TypeError:
            # A layer without a bias has None in its place.
            tensors = _from_iterable(map(_values, self._tensors))
            places = [None if t is None else t.data_ptr() for t in tensors]
        if self._loose:
            places.extend(_place(holder.get(name)) for holder, name in self._loose)
        if self.optimizers:
            for optimizer in self.optimizers:
                places.extend(_optimizer_places(optimizer))
        return places

    def held(self) -> list[Tensor]:
        """Aliases of those tensors, which keep their memory from being given to others.

        Without them a parameter that has moved away and a new one could have the same address.
        """
        tensors = [t for d in self._tensors for t in d.values() if t is not None]
        tensors.extend(t for h, n in self._loose if isinstance(t := h.get(n), Tensor))
        for optimizer in self.optimizers:
            tensors.extend(t for t in _optimizer_values(optimizer) if isinstance(t, Tensor))
        return [t.detach() for t in tensors]

    def buffers(self) -> list[Tensor]:
        """Buffers, which an eager run may change."""
        return [b for m in self.modules for b in m._buffers.values() if b is not None]

    def device(self) -> torch.device | None:
        """The device of the first parameter or buffer, None where there is none."""
        for tensors in self._tensors:
            for tensor in tensors.values():
                if tensor is not None:
                    return tensor.device
        return None

    def generators(self) -> list[torch.Generator]:
        """Generators that the modules hold, themselves or in a stream."""
        holders = [*self._dicts, *map(vars, self._streams)]
        found = (v for h in holders for v in h.values() if isinstance(v, torch.Generator))
        return list({id(g): g for g in found}.values())

    def stream_keys(self) -> list[Any]:
        """Keys of the tensordict under which streams look for a generator or a seed."""
        return [k for s in self._streams if (k := getattr(s, "key", None)) is not None]

    def settle_streams(self, device: torch.device) -> None:
        """Makes the generators of streams that have only a seed so far, as their first draw does.

        Inside a capture none can be made, and afterwards the key would be another one.
        """
        for stream in self._streams:
            if getattr(stream, "seed", None) is not None and stream.generator is None:
                stream.on(device)

    def compiled(self) -> bool:
        """Whether a module, or a function that a module calls, is one of `torch.compile`."""
        return any(
            m._compiled_call_impl is not None
            or any(hasattr(v, "_torchdynamo_orig_callable") for v in m.__dict__.values())
            for m in self.modules
        )


def _streams(roots: list[nn.Module]) -> Iterator[Any]:
    """The streams of probabilistic modules."""
    for root in roots:
        for module in root.modules():
            stream = vars(module).get("_stream")
            if stream is not None and hasattr(stream, "__dict__"):
                yield stream


def _place(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, Tensor) else value


def _optimizer_values(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name != "params":
                yield value
    for state in optimizer.state.values():
        yield from state.values()


def _optimizer_places(optimizer: torch.optim.Optimizer) -> Iterator[Any]:
    """Where the state lies, and the hyperparameters that are no tensors and so part of a graph."""
    return map(_place, _optimizer_values(optimizer))
