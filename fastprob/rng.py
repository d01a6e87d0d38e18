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
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastprob import lowering, native
from fastprob.backend import is_exporting as _is_exporting
from fastprob.counter import Counter, SeedCounter
from fastprob.reference import philox
from fastprob.streams import Seeded, Stream, fold_in, generator_of, next_seed

__all__ = [
    "DRAWS",
    "TOKEN",
    "bernoulli",
    "counted",
    "dirichlet",
    "draw_compiled",
    "exponential",
    "fold_in",
    "global_stream_from",
    "multinomial",
    "normal_filler",
    "register_draw",
    "standard_normal",
    "standard_normal_like",
    "uniform",
]

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


# Every draw from a stream that outlives the call declares that it writes to this tensor, though
# none does. That is what tells a compiler that two equal draws are two draws, and in which order
# they come: with the tag `nondeterministic_seeded` alone, Inductor gave two heads of the same
# parameters one noise where gradients were wanted, and drew the noise of three heads in the order
# 1, 3, 2. It costs 1.4 of 27.9 us a call, which the straight call's graph of one draw does without.
TOKEN = torch.zeros((), dtype=torch.int64, device="cpu")


def _generator_at(state: Tensor) -> torch.Generator:
    generator = torch.Generator(device=state.device)
    generator.set_state(state.cpu())
    return generator


def _seeded_impl(seed: Tensor) -> Tensor:
    return torch.Generator(device=seed.device).manual_seed(int(seed)).get_state().to(seed.device)


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
        return impl(generator_of(args[-2], like.device), *args[:-2])

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
    lambda state: next_seed(_generator_at(state)),
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
