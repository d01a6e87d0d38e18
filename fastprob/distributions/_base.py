"""The base of fastprob's distributions: one call gives a value and its score."""

from __future__ import annotations

from typing import Any

import torch
from tensordict.nn import InteractionType
from torch import Tensor
from torch import distributions as D

from fastprob import rng
from fastprob.reference._reduce import plain_tensors_only

RANDOM: InteractionType = InteractionType.RANDOM  # type: ignore[assignment]
MODE: InteractionType = InteractionType.MODE  # type: ignore[assignment]
MEDIAN: InteractionType = InteractionType.MEDIAN  # type: ignore[assignment]
MEAN: InteractionType = InteractionType.MEAN  # type: ignore[assignment]
DETERMINISTIC: InteractionType = InteractionType.DETERMINISTIC  # type: ignore[assignment]

EMPTY = torch.Size()


class Fused(D.Distribution):
    """A distribution that draws and scores in one operation.

    A family implements `_draw` (random) and `_point` (mode, median, mean, deterministic); the
    public methods of `torch.distributions` and the modules all go through these two. Shapes are
    worked out when asked for: building a family's object is a handful of attribute writes, where
    `torch.distributions.Normal` takes 12.6 us with validation and 3.8 us without.
    """

    # What every value is that the distribution itself gives, in the words of the projections'
    # `covers`; None where that is not known. Such a value needs no projection onto a spec of the
    # same kind, which for int64 one-hot vectors at 16 x 8 was a third of a safe call.
    _kind: tuple | None = None

    # What the kernels clamp a value to after they have scored it, see `carry`.
    _bounds_of_value: Any = None

    # What log_prob and entropy share in a graph that is compiled, for a distribution that was made
    # in that graph; one from outside of it must not take a graph's results with it.
    _traced: dict[str, Any] | None = None

    def _draw(
        self,
        shape: torch.Size,
        generator: torch.Generator | None,
        score: bool,
        pathwise: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Draws, and scores what was drawn.

        Args:
            shape: leading sample dimensions.
            generator: source of the noise; None for the device's default one.
            score: whether the log-probability is wanted.
            pathwise: whether gradients flow through the value into the parameters.

        Returns:
            value `[*shape, *batch, *event]` and log-probability `[*shape, *batch]`, or None.
        """
        raise NotImplementedError

    def _point(self, interaction: InteractionType, score: bool) -> tuple[Tensor, Tensor | None]:
        """The value of a deterministic interaction type, and its log-probability if wanted.

        Raises:
            NotImplementedError: if the distribution has no such value.
        """
        raise NotImplementedError

    def take(
        self,
        interaction: InteractionType,
        shape: torch.Size = EMPTY,
        generator: torch.Generator | None = None,
        score: bool = False,
        pathwise: bool = True,
        n_empirical_estimate: int = 1000,
    ) -> tuple[Any, Any]:
        """A value by the interaction type, and its log-probability.

        Args:
            interaction: how the value is chosen.
            shape: leading sample dimensions; deterministic values are repeated along them.
            generator: source of the noise; None for the device's default one.
            score: whether the log-probability is wanted.
            pathwise: whether gradients flow through a random value into the parameters. Families
                without a reparameterization ignore it.
            n_empirical_estimate: draws for the mean of a component that has no closed form.

        Returns:
            value `[*shape, *batch, *event]`, and log-probability `[*shape, *batch]` or None.
        """
        if interaction is RANDOM:
            return self._draw(shape, generator, score, pathwise)
        value, log_prob = self._point(interaction, score)
        if shape:
            value = value.expand(shape + value.shape)
            if log_prob is not None:
                log_prob = log_prob.expand(shape + log_prob.shape)
        return value, log_prob

    # torch.distributions interface ----------------------------------------------------------

    def rsample(self, sample_shape: Any = EMPTY) -> Tensor:
        """Draws with gradients into the parameters, `[*sample, *batch, *event]`."""
        return self._draw(torch.Size(sample_shape or ()), None, False, True)[0]

    def sample(self, sample_shape: Any = EMPTY) -> Tensor:
        """Draws without gradients, `[*sample, *batch, *event]`."""
        with torch.no_grad():
            return self._draw(torch.Size(sample_shape or ()), None, False, False)[0]

    def rsample_and_log_prob(
        self, sample_shape: Any = EMPTY, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws and scores the same draw, with pathwise gradients.

        Args:
            sample_shape: leading sample dimensions.
            generator: source of the noise; None for the device's default one.

        Returns:
            value `[*sample, *batch, *event]` and log-probability `[*sample, *batch]`.
        """
        check_generator(generator)
        value, log_prob = self._draw(torch.Size(sample_shape or ()), generator, True, True)
        assert log_prob is not None
        return value, log_prob

    def sample_and_log_prob(
        self, sample_shape: Any = EMPTY, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws and scores the same draw; the value is detached, the score is not.

        Args:
            sample_shape: leading sample dimensions.
            generator: source of the noise; None for the device's default one.

        Returns:
            value `[*sample, *batch, *event]` and log-probability `[*sample, *batch]`.
        """
        check_generator(generator)
        value, log_prob = self._draw(torch.Size(sample_shape or ()), generator, True, False)
        assert log_prob is not None
        return value, log_prob

    @property
    def mode(self) -> Tensor:
        return self._point(MODE, False)[0]

    @property
    def median(self) -> Tensor:
        return self._point(MEDIAN, False)[0]

    @property
    def mean(self) -> Tensor:
        return self._point(MEAN, False)[0]

    @property
    def deterministic_sample(self) -> Tensor:
        return self._point(DETERMINISTIC, False)[0]

    def carry(self, projection: Any) -> bool:
        """Takes a projection over into the kernel that gives the value.

        Args:
            projection: one of `fastprob.ops.projection`.

        Returns:
            whether values of `_draw` and `_point` are projected from now on; if not, the caller
            projects them.
        """
        return False

    def _checks(self, like: Tensor) -> bool:
        """Whether arguments are to be checked: torch's switch, on CPU, in plain eager mode.

        Under `torch.vmap` a look at the values is an error, so nothing is checked there.
        """
        # What is no tensor is for torch's own check to refuse.
        checked = bool(self._validate_args) and getattr(like, "is_cpu", True)
        return checked and plain_tensors_only()


def reject(name: str, argument: str, value: Tensor, wanted: str, bad: Tensor) -> ValueError:
    """The error for a parameter with elements outside its domain.

    Args:
        name: the distribution.
        argument: the parameter's name.
        value: the parameter.
        wanted: what its elements must be.
        bad: which elements are not, a boolean tensor of the shape of `value`.
    """
    count = int(bad.sum())
    first = tuple(bad.nonzero()[0].tolist())
    return ValueError(
        f"{name} expects {argument} to be {wanted}, but {count} of {value.numel()} elements of the "
        f"{argument} of shape {tuple(value.shape)} are not: the first is {value[first].item()} at "
        f"index {first}"
    )


def check_generator(generator: Any) -> None:
    """Raises if a draw is given anything else than a generator or None.

    Raises:
        TypeError: naming what was given.
    """
    if generator is None or isinstance(generator, torch.Generator) or rng.counted(generator):
        return
    raise TypeError(
        f"argument 'generator' must be a torch.Generator or a CounterStream, got {generator!r}"
    )


def check_real(name: str, argument: str, value: Tensor) -> None:
    """Raises if `value` holds a NaN.

    Raises:
        ValueError: naming the first NaN.
    """
    # One reduction on the way of a good input: a sum is NaN wherever an element is. Opposite
    # infinities also give one, so the exact test decides.
    total = value.detach().sum()
    if total != total:
        bad = value.isnan()
        if bad.any():
            raise reject(name, argument, value, "real, not NaN", bad)


def check_positive(name: str, argument: str, value: Tensor) -> None:
    """Raises if `value` has an element that is NaN or not above 0.

    Raises:
        ValueError: naming the first such element.
    """
    # min() hands a NaN on, and NaN > 0 is false: one reduction finds both.
    if value.numel() and not value.detach().min() > 0:
        raise reject(name, argument, value, "greater than 0", ~(value > 0))


def broadcast(name: str, **tensors: Any) -> list[Tensor]:
    """Broadcasts parameters to one shape and dtype; numbers take those of the tensors.

    Raises:
        ValueError: if the shapes do not broadcast, naming them.
    """
    first = next((t for t in tensors.values() if isinstance(t, Tensor)), None)
    if first is None:
        values = [torch.as_tensor(v, dtype=torch.get_default_dtype()) for v in tensors.values()]
    else:
        values = [
            v
            if isinstance(v, Tensor)
            else torch.as_tensor(v, dtype=first.dtype, device=first.device)
            for v in tensors.values()
        ]
    dtype = values[0].dtype
    for v in values[1:]:
        dtype = torch.promote_types(dtype, v.dtype)
    devices = {v.device for v in values if v.ndim}
    if len(devices) > 1:
        given = ", ".join(f"{k} on {v.device}" for k, v in zip(tensors, values, strict=True))
        raise ValueError(f"the parameters of {name} must be on one device, got {given}")
    try:
        values = torch.broadcast_tensors(*values)
    except RuntimeError:
        given = ", ".join(
            f"{k} of shape {tuple(v.shape)}" for k, v in zip(tensors, values, strict=True)
        )
        raise ValueError(
            f"the parameters of {name} must have shapes that broadcast together, got {given}"
        ) from None
    return [v if v.dtype is dtype else v.to(dtype) for v in values]
