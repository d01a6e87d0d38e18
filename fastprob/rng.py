"""Random streams: where the noise comes from.

Without a generator the noise comes from torch's default generator of the device, drawn by the same
ATen calls in the same order and of the same sizes as `torch.distributions` uses, so that
`torch.manual_seed` gives the same noise here and upstream. With a `torch.Generator` the same calls
draw from it, which leaves the global state alone without saving and restoring it.

Under `torch.compile` the same calls are made by operators that the compiler does not look into, so
that eager and compiled draw the same numbers. Each draw has three overloads:

| overload  | draws from                                                                      |
|-----------|---------------------------------------------------------------------------------|
| `default` | torch's default generator                                                       |
| `source`  | the generator of a `Stream`, looked up when the graph runs, and advanced        |
| `state`   | a generator's state, a tensor; the state after the draw is its second output    |
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from tensordict import NonTensorData, unravel_key
from tensordict.tensorclass import is_non_tensor
from tensordict.utils import NestedKey
from torch import Tensor, nn

from fastprob import lowering, native
from fastprob.backend import is_exporting as _is_exporting
from fastprob.counter import Counter, CounterStream, SeedCounter
from fastprob.reference import philox

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
    if generator is not None and isinstance(generator, Counter):
        return _on(like, generator).standard_normal(shape, _floats(like))
    if _is_compiling():
        return _compiled_normal(shape, like, generator)
    if generator is None and shape == like.shape:
        return standard_normal_like(like)
    if not like.dtype.is_floating_point:
        raise _needs_floats(like)
    if native.kernel is not None and native.serves(like):
        return native.normal_(torch.empty(shape, dtype=like.dtype, device=like.device), generator)
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
    if native.kernel is not None and native.serves(like):
        return native.normal_(torch.empty_like(like, memory_format=_contiguous))
    try:
        # 3.5 us on a 16 x 8 tensor, where torch.randn(shape, dtype=, device=) takes 6.9.
        return torch.randn_like(like, memory_format=_contiguous)
    except RuntimeError:
        if like.dtype.is_floating_point:
            raise
        raise _needs_floats(like) from None


def normal_filler(generator: torch.Generator | None) -> Callable[[Tensor], Tensor]:
    """What draws standard normal noise into a buffer, in place, and returns the buffer.

    Not for a `CounterStream`, of which two draws do not continue each other.
    """
    return lambda buffer: native.normal_(buffer, generator)


def counted(generator: Any) -> bool:
    """Whether the noise comes from a `CounterStream`."""
    return generator is not None and isinstance(generator, Counter)


def _on(like: Tensor, stream: Counter) -> Counter:
    """The stream, if it draws where `like` is."""
    if stream.device != like.device:
        raise ValueError(
            f"the CounterStream is on {stream.device} and the parameters are on {like.device}; "
            "move the stream there, or the module that holds it"
        )
    return stream


def _floats(like: Tensor) -> torch.dtype:
    if not like.dtype.is_floating_point:
        raise _needs_floats(like)
    return like.dtype


def _needs_floats(like: Tensor) -> TypeError:
    return TypeError(
        f"random sampling needs floating-point parameters, got dtype {like.dtype}; "
        "convert them, for instance with .float()"
    )


def exponential(shape: torch.Size, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Exponential noise of rate 1, `shape`, in the dtype of `like` and on its device."""
    if isinstance(generator, Counter):
        return -torch.log(_on(like, generator).uniform(shape, like.dtype))
    if _is_compiling() and _opaque(generator, like):
        return draw_compiled(_ops.exponential, generator, list(shape), like)
    return _buffer(shape, like).exponential_(1.0, generator=generator)


def uniform(
    shape: torch.Size,
    like: Tensor,
    generator: torch.Generator | None,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Uniform noise in `[low, high)`, `shape`, in the dtype of `like` and on its device."""
    if isinstance(generator, Counter):
        unit = _on(like, generator).uniform(shape, like.dtype)
        return unit.mul_(high - low).add_(low).clamp_(low, high)
    if _is_compiling() and _opaque(generator, like):
        return draw_compiled(_ops.uniform, generator, list(shape), like, low, high)
    return _buffer(shape, like).uniform_(low, high, generator=generator)


def bernoulli(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """1 with probability `probs` and 0 otherwise, of the shape and dtype of `probs`."""
    if isinstance(generator, Counter):
        return philox.bernoulli(_on(probs, generator).take(), probs)
    if _is_compiling() and _opaque(generator, probs):
        return draw_compiled(_ops.bernoulli, generator, probs)
    return torch.bernoulli(probs, generator=generator)


def multinomial(probs: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """`count` indices a row with replacement, int64 `[rows, count]`, of weights `[rows, n]`."""
    if isinstance(generator, Counter):
        # By inverse: the first index whose cumulated weight exceeds a part of the whole.
        below = probs.cumsum(-1)
        part = _on(probs, generator).uniform((probs.shape[0], count), probs.dtype)
        index = torch.searchsorted(below, part * below[:, -1:], right=True)
        last = (probs > 0).mul(torch.arange(probs.shape[1], device=probs.device)).amax(-1)
        return torch.minimum(index, last.unsqueeze(-1))
    if _is_compiling() and _opaque(generator, probs):
        return draw_compiled(_ops.multinomial, generator, probs, count)
    return torch.multinomial(probs, count, True, generator=generator)


def dirichlet(concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    """Points of the simplex, of the shape and dtype of `concentration`, without gradients.

    Raises:
        ValueError: if they have other than two parts and the generator is a `CounterStream`.
    """
    if isinstance(generator, Counter):
        if concentration.shape[-1] != 2:
            raise ValueError(
                "a CounterStream draws points of two parts, the Beta's; got a concentration of "
                f"shape {tuple(concentration.shape)}"
            )
        state = _on(concentration, generator).take()
        if _is_compiling():
            # 16 tries, of which eager mode makes as many as are needed, are 3,000 operations.
            return _ops.counted_dirichlet.default(state, concentration)
        return _counted_dirichlet(state, concentration)
    if _is_compiling() and _opaque(generator, concentration):
        return draw_compiled(_ops.dirichlet, generator, concentration)
    return torch._sample_dirichlet(concentration, generator)  # type: ignore[attr-defined]


def _counted_dirichlet(state: Tensor, concentration: Tensor) -> Tensor:
    return torch.stack(philox.beta(state, *concentration.unbind(-1)), -1)


def _buffer(shape: torch.Size, like: Tensor) -> Tensor:
    """Memory for an in-place draw, contiguous."""
    if shape == like.shape:
        # vmap batches what is made like a batched tensor, and only that can be drawn into.
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def _opaque(generator: Any, like: Tensor) -> bool:
    """Whether a draw in a graph is made by an operator that the compiler does not look into.

    An exported graph is to run without fastprob, and names ATen's.
    """
    return (generator is not None or like.is_cpu) and not _is_exporting()


def _compiled_normal(shape: Any, like: Tensor, generator: Any) -> Tensor:
    if _opaque(generator, like):
        return draw_compiled(_ops.standard_normal, generator, list(shape), like)
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def draw_compiled(op: Any, generator: Any, *args: Any) -> Tensor:
    """A draw in a graph that is being made, from one of the three sources."""
    if generator is None:
        return op.default(*args, TOKEN)
    if isinstance(generator, Stream):
        return op.source(*args, generator.handle, TOKEN)
    if isinstance(generator, Seeded):
        value, generator.state = op.state(*args, generator.state)
        return value
    raise RuntimeError(
        "a torch.Generator cannot be handed to a distribution under torch.compile: the graph would "
        "ignore it and draw from the global stream. Give it to the module, as its generator=, or "
        "call the distribution eagerly."
    )


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


# Every draw from a stream that outlives the call declares that it writes to this tensor, though
# none does. That is what tells a compiler that two equal draws are two draws, and in which order
# they come: with the tag `nondeterministic_seeded` alone, Inductor gave two heads of the same
# parameters one noise where gradients were wanted, and drew the noise of three heads in the order
# 1, 3, 2. It costs 1.4 of 27.9 us a call, which the straight call's graph of one draw does without.
TOKEN = torch.zeros((), dtype=torch.int64, device="cpu")


def _random_of(handle: Tensor, device: torch.device) -> torch.Generator:
    return _streams[int(handle)].on(device)


def _generator_at(state: Tensor) -> torch.Generator:
    generator = torch.Generator(device=state.device)
    generator.set_state(state.cpu())
    return generator


def _seeded_impl(seed: Tensor) -> Tensor:
    return torch.Generator(device=seed.device).manual_seed(int(seed)).get_state().to(seed.device)


def _next_seed(generator: torch.Generator) -> Tensor:
    return torch.randint(
        0, 2**62, (), generator=generator, dtype=torch.int64, device=generator.device
    )


def _normal_impl(generator, size, like):
    if native.kernel is not None and native.serves(like):
        return native.normal_(torch.empty(size, dtype=like.dtype, device=like.device), generator)
    return torch.randn(size, dtype=like.dtype, device=like.device, generator=generator)


def _exponential_impl(generator, size, like):
    buffer = torch.empty(size, dtype=like.dtype, device=like.device)
    return buffer.exponential_(generator=generator)


def _uniform_impl(generator, size, like, low, high):
    buffer = torch.empty(size, dtype=like.dtype, device=like.device)
    return buffer.uniform_(low, high, generator=generator)


def _bernoulli_impl(generator, probs):
    return torch.bernoulli(probs, generator=generator)


def _multinomial_impl(generator, probs, count):
    return torch.multinomial(probs, count, True, generator=generator)


def _dirichlet_impl(generator, concentration):
    return torch._sample_dirichlet(concentration, generator)  # type: ignore[attr-defined]


def _fake_like(size, like, low=0.0, high=1.0):
    return torch.empty(size, dtype=like.dtype, device=like.device)


def _fake_indices(probs, count):
    return probs.new_empty((probs.shape[0], count), dtype=torch.int64)


def _fake_same(parameters):
    return torch.empty_like(parameters, memory_format=_contiguous)


# Inductor's own normal generator is scalar on a CPU (56 ms where ATen takes 2.9 for 65536 x 16) and
# draws other numbers than eager mode; an opaque operator keeps both the speed and the stream.
_library = torch.library.Library("fastprob", "FRAGMENT")
_ops = DRAWS = torch.ops.fastprob
_SIZE = "SymInt[] size, Tensor like"
_DRAWS: tuple[tuple[str, str, Any, Any], ...] = (
    ("standard_normal", _SIZE, _normal_impl, _fake_like),
    ("exponential", _SIZE, _exponential_impl, _fake_like),
    ("uniform", _SIZE + ", float low, float high", _uniform_impl, _fake_like),
    ("bernoulli", "Tensor probs", _bernoulli_impl, _fake_same),
    ("multinomial", "Tensor probs, SymInt count", _multinomial_impl, _fake_indices),
    ("dirichlet", "Tensor concentration", _dirichlet_impl, _fake_same),
)


def _register(schema: str, impl: Any, fake: Any, *tags: torch.Tag) -> None:
    name = schema[: schema.index("(")]
    _library.define(schema, tags=tags)
    _library.impl(name, impl, "CompositeExplicitAutograd")
    # Noise has no gradient, whatever it is made like. Autograd's own fallback would mark it as part
    # of the graph, and warn in the backward pass.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"fastprob::{name}", fake, lib=_library)


def register_draw(name: str, arguments: str, impl: Any, fake: Any) -> None:
    """Registers the three overloads of a draw.

    Args:
        name: of the operator.
        arguments: its arguments in a schema, the first tensor of which gives the device.
        impl: what draws, from a generator (None for torch's default one) and these arguments.
        fake: gives an output of the right shape, dtype and device from these arguments.
    """
    seeded = torch.Tag.nondeterministic_seeded

    def default(*args):
        return impl(None, *args[:-1])

    def source(*args):
        like = args[0] if isinstance(args[0], Tensor) else args[1]
        return impl(_random_of(args[-2], like.device), *args[:-2])

    def state(*args):
        generator = _generator_at(args[-1])
        value = impl(generator, *args[:-1])
        return value, generator.get_state().to(args[-1].device)

    def fake_state(*args):
        return fake(*args[:-1]), torch.empty_like(args[-1])

    def fake_default(*args):
        lowering.offer(getattr(_ops, name).default)
        return fake(*args[:-1])

    token = "Tensor(a!) token"
    _register(f"{name}({arguments}, {token}) -> Tensor", default, fake_default, seeded)
    _register(
        f"{name}.source({arguments}, Tensor handle, {token}) -> Tensor",
        source,
        lambda *a: fake(*a[:-2]),
        seeded,
    )
    _register(f"{name}.state({arguments}, Tensor state) -> (Tensor, Tensor)", state, fake_state)


def _fake_seeded(seed):
    return torch.empty(
        torch.Generator(device=seed.device).get_state().shape,
        dtype=torch.uint8,
        device=seed.device,
    )


for _entry in _DRAWS:
    register_draw(*_entry)


def _fake_alone(size, like):
    lowering.offer(_ops.standard_normal.alone)
    return _fake_like(size, like)


# For a graph of one draw, which nothing can merge or put in another order: 0.8 of 24 us a call.
_register(
    f"standard_normal.alone({_SIZE}) -> Tensor",
    lambda size, like: _normal_impl(None, size, like),
    _fake_alone,
    torch.Tag.nondeterministic_seeded,
)
_register(
    "counted_dirichlet(Tensor state, Tensor concentration) -> Tensor",
    _counted_dirichlet,
    lambda state, concentration: _fake_same(concentration),
)
_register("seeded(Tensor seed) -> Tensor", _seeded_impl, _fake_seeded)
_register(
    "next_seed(Tensor state) -> Tensor",
    lambda state: _next_seed(_generator_at(state)),
    lambda state: torch.empty((), dtype=torch.int64, device=state.device),
)


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
    if isinstance(generator, SeedCounter):
        generator = generator.generator()
    if isinstance(generator, Counter):
        raise TypeError(
            "a distribution that fastprob does not know draws from torch's generators, not from a "
            "CounterStream; give a seed or a torch.Generator as generator="
        )
    if _is_compiling():
        raise RuntimeError(
            "a distribution that fastprob does not know draws from torch's default generator, "
            "which a compiled graph cannot exchange for the one given as generator=. Call the "
            "module eagerly, or leave generator out and use torch.manual_seed."
        )
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


# The streams of all modules by the number that their handle holds.
_streams: WeakValueDictionary[int, Stream] = WeakValueDictionary()
_numbers = itertools.count()
_SEED_BYTES = 8


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
        self.seed = int(_next_seed(generator))
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
            seed = _next_seed(generator)
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
