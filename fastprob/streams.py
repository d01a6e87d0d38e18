"""Streams of noise that modules own, and how ranks and workers get streams of their own.

A `Stream` is what a module's `generator=` names. Draws from it are made by `fastprob.rng`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from tensordict import NonTensorData, unravel_key
from tensordict.tensorclass import is_non_tensor
from tensordict.utils import NestedKey
from torch import Tensor, nn

from fastprob.backend import is_exporting as _is_exporting
from fastprob.counter import CounterStream, SeedCounter

_is_compiling = torch.compiler.is_compiling
_ops = torch.ops.fastprob


# The streams of all modules by the number that their handle holds.
_streams: WeakValueDictionary[int, Stream] = WeakValueDictionary()
_numbers = itertools.count()
_SEED_BYTES = 8


def generator_of(handle: Tensor, device: torch.device) -> torch.Generator:
    """The generator of the stream with a handle, on a device."""
    return _streams[int(handle)].on(device)


class Seeded:
    """The noise of a seed tensor in a graph that is being made, without looking at the seed.

    Attributes:
        state: state of a torch generator, uint8, after the draws made so far.
    """

    def __init__(self, seed: Tensor) -> None:
        self.state = _ops.seeded.default(seed)

    def next_seed(self) -> Tensor:
        """The seed of the next call, int64, a scalar."""
        return _ops.next_seed.default(self.state)


def next_seed(generator: torch.Generator) -> Tensor:
    """The seed of the next call, int64, a scalar on the generator's device; it is advanced."""
    return torch.randint(
        0, 2**62, (), generator=generator, dtype=torch.int64, device=generator.device
    )


class Stream:
    """The source of a module's noise, as its `generator=` argument names it.

    Attributes:
        generator: a generator that the module holds, or None.
        seed: seed of a generator that is made at the first call, on the device of the parameters.
        key: where the tensordict holds the generator or the seed, or None.
        handle: by which a compiled graph finds this stream when it runs: int64, a scalar on the
            CPU. A graph takes it as an input, so that one graph serves any number of modules.
    """

    def __init__(
        self,
        generator: torch.Generator | CounterStream | None = None,
        seed: int | None = None,
        key: NestedKey | None = None,
    ) -> None:
        self.generator: Any = generator
        self.seed = seed
        self.key = key
        # A state that was loaded before there was a generator.
        self._loaded: Tensor | None = None
        # Kept apart: what a compiler reads it guards on, and a seed's generator is made by a call.
        self.counted = isinstance(generator, CounterStream)
        self._register()

    def _register(self) -> None:
        number = next(_numbers)
        self.handle = torch.tensor(number, dtype=torch.int64, device="cpu")
        _streams[number] = self

    def __getstate__(self) -> dict[str, Any]:
        generator, loaded = self.generator, self._loaded
        return {
            "generator": _Portable.of(generator)
            if isinstance(generator, torch.Generator)
            else generator,
            "seed": self.seed,
            "key": self.key,
            "counted": self.counted,
            "_loaded": None if loaded is None else bytes(loaded.tolist()),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is a stream of its own: it starts where the first is, and goes its own way.
        self.__dict__.update(state)
        if isinstance(self.generator, _Portable):
            # A shallow copy comes here with the portable one itself.
            self.generator = self.generator.generator
        if isinstance(self._loaded, bytes):
            self._loaded = _as_state(self._loaded)
        self._register()

    def on(self, device: torch.device) -> torch.Generator:
        """The generator, made on `device` if there was only a seed so far."""
        generator = self.generator
        if generator is None:
            assert self.seed is not None
            generator = torch.Generator(device=device).manual_seed(self.seed)
            if self._loaded is not None:
                _restore(generator, self._loaded)
                self._loaded = None
            self.generator = generator
        return generator

    def move(self, device: torch.device) -> None:
        """Has a seed's generator go on at another device, from a seed that it draws itself."""
        generator = self.generator
        if self.seed is None or generator is None or generator.device == device:
            return
        self.seed = int(next_seed(generator))
        self.generator = None

    def state(self) -> Tensor | None:
        """What resumes this stream bit by bit, uint8.

        None where the tensordict holds it, or a `CounterStream`, which saves itself.
        """
        if self.key is not None or isinstance(self.generator, CounterStream):
            return None
        if self.generator is not None:
            return self.generator.get_state().clone()
        if self._loaded is not None:
            return self._loaded.clone()
        assert self.seed is not None
        return _as_state((self.seed % 2**64).to_bytes(_SEED_BYTES, "little"))

    def load(self, state: Tensor) -> None:
        """Resumes at what `state()` gave.

        Raises:
            ValueError: if it is no such tensor, or that of a generator of another device.
        """
        if not isinstance(state, Tensor) or state.dtype is not torch.uint8 or state.ndim != 1:
            raise ValueError(f"the state of a stream is a vector of uint8, got {state!r}")
        state = state.detach().cpu().clone()
        if state.numel() == _SEED_BYTES:
            seed = int.from_bytes(bytes(state.tolist()), "little")
            if self.seed is None:
                assert self.generator is not None
                self.generator.manual_seed(seed)
            else:
                self.seed, self.generator, self._loaded = seed, None, None
        elif self.generator is None:
            self._loaded = state
        else:
            _restore(self.generator, state)

    def fold(self, index: int, made: dict[int, torch.Generator]) -> None:
        """Replaces this stream by the one that `fold_in` gives for an index.

        Args:
            index: of the rank or worker.
            made: the new generators of the streams before, by the `id` of the old one: streams that
                share a generator go on sharing one.

        Raises:
            ValueError: if the tensordict holds the seed: that one is to be folded.
        """
        if self.key is not None:
            raise ValueError(
                f"the tensordict holds the seed of this module under {self.key!r}; fold the index "
                f"into it: tensordict[{self.key!r}] = fold_in(tensordict[{self.key!r}], index)"
            )
        if self.seed is not None:
            self.seed = fold_in(self.seed, index)
            self.generator = self._loaded = None
            return
        old = self.generator
        if id(old) not in made:
            if isinstance(old, CounterStream):
                # In place: it is a child of the modules that it serves.
                with torch.no_grad():
                    old.state.copy_(old.fold_in(index).state)
                made[id(old)] = old  # type: ignore[assignment]
            else:
                made[id(old)] = fold_in(old, index)
        self.generator = made[id(old)]

    @classmethod
    def read(cls, value: Any) -> Stream | None:
        """Reads the `generator=` argument.

        Raises:
            TypeError: if it is no generator, int or key.
        """
        if value is None:
            return None
        if isinstance(value, (torch.Generator, CounterStream)):
            return cls(generator=value)
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(seed=value)
        if isinstance(value, (str, tuple)):
            return cls(key=unravel_key(value))
        raise TypeError(
            "generator must be a torch.Generator, a CounterStream, an int seed, a key of the "
            f"tensordict, or None; got {type(value).__name__}"
        )

    def open(
        self, tensordict: Any, in_keys: Sequence[NestedKey]
    ) -> tuple[torch.Generator | None, bool | None]:
        """The generator for one call.

        Args:
            tensordict: the input of the call.
            in_keys: keys of the parameters, whose device a seed's generator takes.

        Returns:
            the generator, or None for torch's default one; and what the key held: True for a
            tensor seed, False for an int, None for anything that needs no successor.

        Raises:
            ValueError: if the key holds a tensor of several elements.
            TypeError: if the key holds something that is no generator and no seed.
        """
        if self.key is None:
            if self.counted:
                return self.generator, None
            if _is_exporting():
                raise RuntimeError(
                    "an exported graph draws from torch's default generator, or from a "
                    "CounterStream that it carries, and cannot take the generator= of this module "
                    "along; leave it out, or give a CounterStream"
                )
            if _is_compiling():
                # Stands for its generator: the graph looks it up when it runs.
                return self, None  # type: ignore[return-value]
            generator = self.generator
            if generator is None:
                generator = self.on(_device_of(tensordict, in_keys))
            return generator, None
        value = tensordict.get(self.key, None)
        if value is None:
            return None, None
        if is_non_tensor(value):
            value = value.data
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"the generator key {self.key!r} must hold one seed, got a tensor of shape "
                    f"{tuple(value.shape)}"
                )
            if not value.is_cpu:
                return SeedCounter(value), True  # type: ignore[return-value]
            if _is_compiling():
                if _is_exporting():
                    raise RuntimeError(
                        f"an exported graph cannot draw from the seed under {self.key!r}; leave "
                        "generator= out, or give a CounterStream"
                    )
                return Seeded(value), True  # type: ignore[return-value]
            return torch.Generator(device=value.device).manual_seed(int(value)), True
        if _is_compiling() and not isinstance(value, bool):
            raise RuntimeError(
                f"the generator key {self.key!r} holds a {type(value).__name__}, which would "
                "become a constant of the graph under torch.compile. Put a scalar tensor there: "
                "torch.tensor(seed)."
            )
        if isinstance(value, torch.Generator):
            return value, None
        if isinstance(value, int) and not isinstance(value, bool):
            device = _device_of(tensordict, in_keys)
            return torch.Generator(device=device).manual_seed(value), False
        raise TypeError(
            f"the generator key {self.key!r} must hold a torch.Generator, an int or a scalar "
            f"tensor, got {type(value).__name__}"
        )

    def close(
        self, tensordicts: Sequence[Any], generator: torch.Generator, was_tensor: bool
    ) -> None:
        """Writes the seed of the next call under the key of each of the tensordicts."""
        assert self.key is not None
        if isinstance(generator, (Seeded, SeedCounter)):
            seed = generator.next_seed()
        else:
            seed = next_seed(generator)
        for tensordict in tensordicts:
            batch_size = tensordict.batch_size
            tensordict.set(
                self.key,
                seed.expand(batch_size)
                if was_tensor
                else NonTensorData(int(seed), batch_size=batch_size),
            )


class _Portable:
    """A generator in a pickle, as bytes.

    torch pickles the state of a generator as a tensor. In a message to another process that is a
    file in shared memory, which is gone before the process has opened it: torch 2.13 cannot send a
    generator to a spawned worker.
    """

    __slots__ = ("__weakref__", "generator")

    # Those of the pickle that is being written: modules that share a generator go on sharing one.
    _current: ClassVar[WeakValueDictionary[int, _Portable]] = WeakValueDictionary()

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    @classmethod
    def of(cls, generator: torch.Generator) -> _Portable:
        """The one object that stands for `generator`."""
        return cls._current.setdefault(id(generator), cls(generator))

    def __reduce__(self) -> tuple:
        state = bytes(self.generator.get_state().tolist())
        return _generator, (str(self.generator.device), state)


def _generator(device: str, state: bytes) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.set_state(_as_state(state))
    return generator


def _as_state(state: bytes) -> Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _device_of(tensordict: Any, keys: Sequence[NestedKey]) -> torch.device:
    for key in keys:
        value = tensordict.get(key, None)
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")


def _restore(generator: torch.Generator, state: Tensor) -> None:
    if state.numel() == _SEED_BYTES:
        generator.manual_seed(int.from_bytes(bytes(state.tolist()), "little"))
        return
    try:
        generator.set_state(state)
    except (RuntimeError, TypeError) as err:
        raise ValueError(
            f"a state of {state.numel()} bytes is not that of a generator on {generator.device}: "
            f"{err}"
        ) from err


# ranks and workers ------------------------------------------------------------------------------

_GOLDEN = 0x9E3779B97F4A7C15
_LOW = 0xFFFFFFFF


def fold_in(source: Any, index: int) -> Any:
    """The stream of one rank or worker, from a seed that all of them share.

    Different indices never give the same stream: torch's CPU generator takes the low 32 bits of a
    seed and ignores the others, and these are a one-to-one function of the index. To fold in a rank
    and a worker, use `rank * workers_per_rank + worker`; folding twice may meet by chance.

    Args:
        source: an int seed; a tensor of int64 seeds, of any shape and on any device, which is not
            looked at; a `torch.Generator`, whose initial seed counts; a `CounterStream`; or a
            module, whose streams and those of its children are replaced in place.
        index: of the rank or worker, from 0 to 2^32 - 1.

    Returns:
        a seed of 63 bits, likewise as a tensor, a new generator or stream on the same device, or
        the module itself. The int and the tensor of a seed give the same.

    Raises:
        ValueError: if the index is out of range, or a module's seed is in the tensordict.
        TypeError: if the source is none of these.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), for the
    64-bit mixing function.
    """
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index <= _LOW:
        raise ValueError(f"index must be an int from 0 to 2^32 - 1, got {index!r}")
    if isinstance(source, CounterStream):
        return source.fold_in(index)
    if isinstance(source, nn.Module):
        # A stream may serve several modules: folded once.
        streams = {id(s): s for s in (vars(m).get("_stream") for m in source.modules()) if s}
        made: dict[int, torch.Generator] = {}
        for stream in streams.values():
            stream.fold(index, made)
        return source
    if isinstance(source, torch.Generator):
        seed = fold_in(source.initial_seed(), index)
        return torch.Generator(device=source.device).manual_seed(seed)
    if isinstance(source, Tensor) and source.dtype is torch.int64:
        return _fold(source, index)
    if isinstance(source, int) and not isinstance(source, bool):
        return _fold(source, index)
    raise TypeError(
        "fold_in takes an int seed, an int64 tensor of seeds, a generator or a module, got "
        + (f"a tensor of {source.dtype}" if isinstance(source, Tensor) else type(source).__name__)
    )


def _fold(seed: Any, index: int) -> Any:
    key = _mix64(_wrap(seed + _signed(_GOLDEN)))
    low = (key & _LOW) ^ index
    # Shifts that xor and odd factors, modulo 2^32: each is one-to-one.
    low = ((low ^ (low >> 16)) * 0x7FEB352D) & _LOW
    low = ((low ^ (low >> 15)) * 0x846CA68B) & _LOW
    low = low ^ (low >> 16)
    high = _mix64(key ^ _signed((index + 1) * _GOLDEN))
    return (_shift(high, 33) << 32) | low


def _mix64(x: Any) -> Any:
    x = _wrap((x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9))
    x = _wrap((x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB))
    return x ^ _shift(x, 31)


def _shift(x: Any, bits: int) -> Any:
    """A shift to the right that fills with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(x: Any) -> Any:
    """Modulo 2^64, as tensors do by themselves."""
    return x if isinstance(x, Tensor) else _signed(x)


def _signed(x: int) -> int:
    """The int64 with the low 64 bits of `x`."""
    return (x + 2**63) % 2**64 - 2**63
