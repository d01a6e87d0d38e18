"""An interleaved timer for machines whose speed drifts.

On a shared machine the clock of a core changes by tens of percent within seconds. Two providers
timed one after the other then differ by the drift, not by their code. Here all providers of a
case run in short blocks, round after round in a changing order, and what is compared is the
ratio within a round: the drift is in both its terms and cancels. The median of those ratios
ignores the rounds that another process disturbed.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

# A block of 2 ms is 20 times the cost of a context switch, and short enough that a round of four
# providers sees one clock speed.
BLOCK_S = 2e-3


@dataclass(frozen=True)
class Quantiles:
    """The 20th, 50th and 80th percentile of a sample, in the unit of the sample."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Quantiles:
        """Takes the percentiles by linear interpolation between order statistics.

        Raises:
            ValueError: if the sample is empty.
        """
        if not sample:
            raise ValueError("quantiles of an empty sample; expected at least one value")
        ordered = sorted(sample)

        def at(q: float) -> float:
            position = q * (len(ordered) - 1)
            low = int(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (position - low)

        return cls(at(0.2), at(0.5), at(0.8))

    def as_dict(self, digits: int = 3) -> dict[str, float]:
        """Returns the percentiles rounded, for JSON."""
        return {k: round(getattr(self, k), digits) for k in ("p20", "p50", "p80")}


@dataclass
class Timings:
    """What one provider took in each round.

    Attributes:
        inner: calls in the block of one round.
        us: microseconds per call, one entry for each round. On a GPU at the clock, with the calls
            back to back and the device waited for once at the end of the block.
        host_us: on a GPU, until the calls have returned, which is before the device has finished.
        device_us: on a GPU, between two events with the queue filled ahead: what the kernels take.
    """

    inner: int
    us: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    device_us: list[float] = field(default_factory=list)

    @property
    def quantiles(self) -> Quantiles:
        """Percentiles over rounds, in microseconds per call."""
        return Quantiles.of(self.us)

    def as_dict(self) -> dict[str, Any]:
        """Returns the percentiles and how many calls they come from, for JSON."""
        return {
            **self.quantiles.as_dict(),
            **({"host": Quantiles.of(self.host_us).as_dict()} if self.host_us else {}),
            **({"device": Quantiles.of(self.device_us).as_dict()} if self.device_us else {}),
            "rounds": len(self.us),
            "inner": self.inner,
        }


def ratio(numerator: Timings, denominator: Timings) -> Quantiles:
    """Percentiles of the ratio of two providers, taken round by round."""
    return Quantiles.of([a / b for a, b in zip(numerator.us, denominator.us, strict=True)])


class CpuMeter:
    """Times blocks of calls that are done when they return.

    Args:
        clock: in nanoseconds.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.clock = clock

    def inner(self, call: Callable[[], object], block_s: float) -> int:
        """Returns how many calls fill a block, from the fastest of five.

        One is enough where it takes 50 blocks, 0.1 s: no hiccup is as long.
        """
        best = float("inf")
        for _ in range(5):
            begin = self.clock()
            call()
            best = min(best, self.clock() - begin)
            if best > 50e9 * block_s:
                break
        return max(1, round(block_s * 1e9 / max(best, 1.0)))

    def block(self, call: Callable[[], object], timing: Timings) -> None:
        """Runs one block, and notes its time."""
        begin = self.clock()
        for _ in range(timing.inner):
            call()
        timing.us.append((self.clock() - begin) / 1e3 / timing.inner)


class CudaMeter:
    """Times blocks of calls that go on on a GPU after they have returned.

    Args:
        cuda: ``torch.cuda``; a test passes another.
        clock: of the host, in nanoseconds.
    """

    # The driver holds 1,024 launches; a call of upstream makes up to 30. Beyond it, the host
    # waits for the device, and its own time is no longer seen.
    MOST = 32

    def __init__(self, cuda: Any = None, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        if cuda is None:
            import torch

            cuda = torch.cuda
        self.cuda, self.clock = cuda, clock

    def inner(self, call: Callable[[], object], block_s: float) -> int:
        """Returns how many calls fill a block, from the fastest of five; at most ``MOST``."""
        best = float("inf")
        for _ in range(5):
            self.cuda.synchronize()
            begin = self.clock()
            call()
            self.cuda.synchronize()
            best = min(best, self.clock() - begin)
        return min(self.MOST, max(1, round(block_s * 1e9 / max(best, 1.0))))

    def block(self, call: Callable[[], object], timing: Timings) -> None:
        """Runs two blocks: one at the clock, and one with the device held back at its start."""
        cuda, clock, inner = self.cuda, self.clock, timing.inner
        cuda.synchronize()
        begin = clock()
        for _ in range(inner):
            call()
        returned = clock()
        cuda.synchronize()
        done = clock()
        timing.us.append((done - begin) / 1e3 / inner)
        timing.host_us.append((returned - begin) / 1e3 / inner)
        first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        # The device sleeps while the host fills its queue, so that between the events it never
        # waits for the host. 2 cycles a nanosecond; no GPU's clock is faster.
        cuda._sleep(2 * (returned - begin) + 20_000)
        first.record()
        for _ in range(inner):
            call()
        last.record()
        last.synchronize()
        timing.device_us.append(first.elapsed_time(last) * 1e3 / inner)


def interleave(
    calls: dict[str, Callable[[], object]],
    *,
    budget_s: float,
    min_rounds: int = 15,
    max_rounds: int = 400,
    block_s: float = BLOCK_S,
    clock: Callable[[], int] = time.thread_time_ns,
    meter: CpuMeter | CudaMeter | None = None,
    seed: int = 0,
) -> dict[str, Timings]:
    """Times several calls in interleaved rounds.

    Args:
        calls: what to time, by name. Each has been called before, so that nothing is set up or
            compiled inside a timed block.
        budget_s: rounds are run until this many seconds have passed.
        min_rounds: at least this many rounds, over the budget if need be.
        max_rounds: at most this many rounds.
        block_s: the length of one provider's block in a round, in seconds.
        clock: a clock in nanoseconds. The default counts the CPU time of the calling thread: the
            same as seconds at the clock on an idle machine, and without the time that another
            process or the progress bar took. Calls that use several threads need
            ``time.perf_counter_ns``.
        meter: in place of the clock, for calls on a device.
        seed: of the order of the providers, which changes from round to round.

    Returns:
        The timings by name; entry ``i`` of each comes from the same round.
    """
    meter = meter or CpuMeter(clock)
    # A device is waited for, which takes no CPU time of this thread.
    spent = clock if isinstance(meter, CpuMeter) else meter.clock
    timings = {name: Timings(meter.inner(call, block_s)) for name, call in calls.items()}
    order = list(calls)
    shuffle = random.Random(seed).shuffle
    enabled = gc.isenabled()
    gc.collect()
    # A collection inside a block of 2 ms costs more than the block.
    gc.disable()
    try:
        start = spent()
        for done in range(max_rounds):
            if done >= min_rounds and (spent() - start) > budget_s * 1e9:
                break
            shuffle(order)
            for name in order:
                call, timing = calls[name], timings[name]
                # The first call after another provider's block finds cold caches.
                call()
                meter.block(call, timing)
    finally:
        if enabled:
            gc.enable()
    return timings
