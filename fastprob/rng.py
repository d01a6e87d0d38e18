"""Random streams: where the noise comes from.

Without a generator the noise comes from torch's default generator of the device, drawn by the same
ATen calls in the same order and of the same sizes as `torch.distributions` uses, so that
`torch.manual_seed` gives the same noise here and upstream. With a `torch.Generator` the same calls
draw from it, which leaves the global state alone without saving and restoring it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from tensordict import NonTensorData, unravel_key
from tensordict.tensorclass import is_non_tensor
from tensordict.utils import NestedKey
from torch import Tensor

_is_compiling = torch.compiler.is_compiling
_contiguous = torch.contiguous_format


def standard_normal(
    shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Standard normal noise.

    Args:
        shape: shape of the noise.
        like: tensor that gives dtype and device.
        generator: source of the noise; the device's default generator where it is None.

    Returns:
        `shape`, contiguous, in the dtype of `like` and on its device.

    Raises:
        TypeError: if the dtype of `like` is not a floating-point one.
    """
    if _is_compiling():
        return _compiled_normal(shape, like, generator)
    if generator is None and shape == like.shape:
        return standard_normal_like(like)
    if not like.dtype.is_floating_point:
        raise _needs_floats(like)
    return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)


def standard_normal_like(like: Tensor) -> Tensor:
    """Standard normal noise of the shape of `like`, from torch's default generator.

    Args:
        like: tensor that gives shape, dtype and device.

    Returns:
        noise, contiguous.

    Raises:
        TypeError: if the dtype of `like` is not a floating-point one.
    """
    if _is_compiling():
        return _compiled_normal(like.shape, like, None)
    try:
        # 3.5 us on a 16 x 8 tensor, where torch.randn(shape, dtype=, device=) takes 6.9.
        return torch.randn_like(like, memory_format=_contiguous)
    except RuntimeError:
        if like.dtype.is_floating_point:
            raise
        raise _needs_floats(like) from None


def normal_filler(generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    """What draws standard normal noise into a buffer, in place, and returns the buffer."""
    return lambda buffer: buffer.normal_(generator=generator)


def _needs_floats(like: Tensor) -> TypeError:
    return TypeError(
        f"random sampling needs floating-point parameters, got dtype {like.dtype}; "
        "convert them, for instance with .float()"
    )


def exponential(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Exponential noise of rate 1, `shape`, in the dtype of `like` and on its device."""
    if torch.compiler.is_compiling():
        refuse_generator_under_compile(generator)
        if like.device.type == "cpu":
            return torch.ops.fastprob.exponential(list(shape), like)
    return _buffer(shape, like).exponential_(1.0, generator=generator)


def uniform(
    shape: torch.Size,
    like: Tensor,
    generator: torch.Generator | None,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Uniform noise in `[low, high)`, `shape`, in the dtype of `like` and on its device."""
    if torch.compiler.is_compiling():
        refuse_generator_under_compile(generator)
        if like.device.type == "cpu":
            return torch.ops.fastprob.uniform(list(shape), like, low, high)
    return _buffer(shape, like).uniform_(low, high, generator=generator)


def bernoulli(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """1 with probability `probs` and 0 otherwise, of the shape and dtype of `probs`."""
    if torch.compiler.is_compiling():
        refuse_generator_under_compile(generator)
        if probs.device.type == "cpu":
            return torch.ops.fastprob.bernoulli(probs)
    return torch.bernoulli(probs, generator=generator)


def _buffer(shape: torch.Size, like: Tensor) -> Tensor:
    """Memory for an in-place draw, contiguous."""
    if shape == like.shape:
        # vmap batches what is made like a batched tensor, and only that can be drawn into.
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def refuse_generator_under_compile(generator: torch.Generator | None) -> None:
    """Raises where a compiled graph would have to carry a generator.

    Raises:
        RuntimeError: under `torch.compile`, if `generator` is not None.
    """
    if generator is not None and torch.compiler.is_compiling():
        raise RuntimeError(
            "generator= is not supported under torch.compile yet: a compiled graph would ignore it "
            "and draw from the global stream. Call the module eagerly, or leave generator out and "
            "use torch.manual_seed."
        )


def _compiled_normal(shape, like: Tensor, generator: torch.Generator | None) -> Tensor:
    refuse_generator_under_compile(generator)
    if like.device.type == "cpu":
        return torch.ops.fastprob.standard_normal(list(shape), like)
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def _normal_impl(size, like):
    return torch.randn(size, dtype=like.dtype, device=like.device)


def _exponential_impl(size, like):
    return torch.empty(size, dtype=like.dtype, device=like.device).exponential_()


def _uniform_impl(size, like, low, high):
    return torch.empty(size, dtype=like.dtype, device=like.device).uniform_(low, high)


def _fake(size, like, low=0.0, high=1.0):
    return torch.empty(size, dtype=like.dtype, device=like.device)


# Inductor's own normal generator is scalar on a CPU (56 ms where ATen takes 2.9 for 65536 x 16) and
# draws other numbers than eager mode; an opaque operator keeps both the speed and the stream.
_library = torch.library.Library("fastprob", "FRAGMENT")
_OPERATORS: tuple[tuple[str, str, Any, Any], ...] = (
    ("standard_normal", "(SymInt[] size, Tensor like) -> Tensor", _normal_impl, _fake),
    ("exponential", "(SymInt[] size, Tensor like) -> Tensor", _exponential_impl, _fake),
    (
        "uniform",
        "(SymInt[] size, Tensor like, float low, float high) -> Tensor",
        _uniform_impl,
        _fake,
    ),
    ("bernoulli", "(Tensor probs) -> Tensor", torch.bernoulli, torch.empty_like),
)
for _name, _schema, _impl, _fake_impl in _OPERATORS:
    _library.define(_name + _schema, tags=(torch.Tag.nondeterministic_seeded,))
    _library.impl(_name, _impl, "CompositeExplicitAutograd")
    # Noise has no gradient, whatever it is made like. Autograd's own fallback would mark it as part
    # of the graph, and warn in the backward pass.
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fastprob::{_name}", _fake_impl, lib=_library)


@contextlib.contextmanager
def global_stream_from(generator: torch.Generator | None) -> Iterator[None]:
    """Runs a block with torch's default generator set to the state of `generator`.

    For distributions that fastprob does not know: they draw from the default generator only. The
    generator takes over the state that the block leaves behind, and the default generator gets its
    own state back.

    Args:
        generator: the stream to draw from; None leaves everything as it is.

    Raises:
        RuntimeError: under `torch.compile`, if `generator` is not None.
    """
    if generator is None:
        yield
        return
    refuse_generator_under_compile(generator)
    device = generator.device
    default = (
        torch.default_generator
        if device.type == "cpu"
        else torch.cuda.default_generators[device.index or 0]
    )
    outer = default.get_state()
    default.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(default.get_state())
        default.set_state(outer)


class Stream:
    """The source of a module's noise, as its `generator=` argument names it.

    Attributes:
        generator: a generator that the module holds, or None.
        seed: seed of a generator that is made at the first call, on the device of the parameters.
        key: where the tensordict holds the generator or the seed, or None.
    """

    __slots__ = ("generator", "key", "seed")

    def __init__(
        self,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        key: NestedKey | None = None,
    ) -> None:
        self.generator = generator
        self.seed = seed
        self.key = key

    def __reduce__(self) -> tuple:
        generator = None if self.generator is None else _Portable.of(self.generator)
        return _restore, (generator, self.seed, self.key)

    @classmethod
    def read(cls, value: Any) -> Stream | None:
        """Reads the `generator=` argument.

        Raises:
            TypeError: if it is no generator, int or key.
        """
        if value is None:
            return None
        if isinstance(value, torch.Generator):
            return cls(generator=value)
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(seed=value)
        if isinstance(value, (str, tuple)):
            return cls(key=unravel_key(value))
        raise TypeError(
            "generator must be a torch.Generator, an int seed, a key of the tensordict, or None; "
            f"got {type(value).__name__}"
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
            if self.generator is None:
                assert self.seed is not None
                device = _device_of(tensordict, in_keys)
                self.generator = torch.Generator(device=device)
                self.generator.manual_seed(self.seed)
            return self.generator, None
        value = tensordict.get(self.key, None)
        if value is None:
            return None, None
        if is_non_tensor(value):
            value = value.data
        if isinstance(value, torch.Generator):
            return value, None
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(
                    f"the generator key {self.key!r} must hold one seed, got a tensor of shape "
                    f"{tuple(value.shape)}"
                )
            return torch.Generator(device=value.device).manual_seed(int(value)), True
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
        seed = torch.randint(
            0, 2**62, (), generator=generator, dtype=torch.int64, device=generator.device
        )
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
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    return generator


def _restore(
    generator: torch.Generator | _Portable | None, seed: int | None, key: NestedKey | None
) -> Stream:
    # A shallow copy comes here with the portable one itself.
    if isinstance(generator, _Portable):
        generator = generator.generator
    return Stream(generator, seed, key)


def _device_of(tensordict: Any, keys: Sequence[NestedKey]) -> torch.device:
    for key in keys:
        value = tensordict.get(key, None)
        if isinstance(value, Tensor):
            return value.device
    return torch.device("cpu")
