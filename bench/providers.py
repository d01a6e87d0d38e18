"""The ways to run one module: eager, compiled, graphed, exported; and the roof of a copy.

Names of providers, as they stand in tables and result files:

    upstream, fastprob                         eager
    ... compiled                               torch.compile
    ... reduce-overhead                        torch.compile(mode="reduce-overhead"); GPU
    ... graph                                  upstream: tensordict's CudaGraphModule;
                                               fastprob: CudaGraphPolicy; GPU
    fastprob exported                          export_policy and load_policy
    hand                                       the same maths on bare tensors
    copy roof                                  as many bytes copied, and nothing else
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType
from torch import Tensor, nn

from bench.gate import Provider

UPSTREAM, FASTPROB = "upstream", "fastprob"
SIDES = (UPSTREAM, FASTPROB)
COMPILED = tuple(f"{side} compiled" for side in SIDES)
REDUCED = tuple(f"{side} reduce-overhead" for side in SIDES)
GRAPHED = tuple(f"{side} graph" for side in SIDES)
EXPORTED = "fastprob exported"
HAND = "hand"
ROOF = "copy roof"
NAMES = (
    *("upstream", "upstream compiled", "upstream reduce-overhead", "upstream graph"),
    *("fastprob", "fastprob compiled", "fastprob reduce-overhead", "fastprob graph"),
    *(EXPORTED, HAND, ROOF),
)

# Inputs take turns until together they are several times the last-level cache: 33 MB here, 50 MB
# on an H100, 60 MB of an H200. A small batch fits many times over; a rollout's own would be
# as warm.
CACHE_BYTES = 200e6
MOST_COPIES = 8


class Missing(RuntimeError):
    """A provider that this device, or this version of a package, does not have."""


def copies(bytes_each: float) -> int:
    """Returns how many batches take turns, from 2 to ``MOST_COPIES``."""
    return int(min(MOST_COPIES, max(2, -(-CACHE_BYTES // max(bytes_each, 1)))))


def batches(inputs: Mapping[str, Any], rows: int) -> list[TensorDict]:
    """Returns equal tensordicts, each with memory of its own, that take turns."""
    data = TensorDict(dict(inputs), batch_size=[rows])
    return [data.clone() for _ in range(copies(data.bytes()))]


def in_turn(call: Callable[[Any], Any], inputs: Sequence[Any]) -> Callable[[], Any]:
    """Returns a call without arguments that takes the inputs in turn."""
    take = itertools.cycle(inputs).__next__
    return lambda: call(take())


def fresh_compiler() -> None:
    """Forgets what was compiled: all cases share one code object, recompiled 8 times at most."""
    torch.compiler.reset()


def warm_up(provider: Provider) -> None:
    """Makes the calls that are no measure of the later ones.

    They fill caches, and a compiled module guards on the entries that it has written, for each of
    the inputs that take turns.
    """
    for _ in range(2 * MOST_COPIES + 4):
        provider.call()


def forms(
    make: Callable[[str], nn.Module],
    inputs: Sequence[TensorDict],
    read: Callable[[Any], dict[str, Tensor]],
    kind: InteractionType,
    sides: Sequence[str] = SIDES,
) -> dict[str, Callable[[], Provider]]:
    """Returns a maker for each way to run a module that takes a tensordict and returns it.

    Args:
        make: builds the module of one side.
        inputs: equal tensordicts that take turns.
        read: takes the named results out of the tensordict returned.
        kind: the module's interaction type, which an exported policy fixes.
        sides: which sides there are.
    """
    cuda = inputs[0].device is not None and inputs[0].device.type == "cuda"

    def provider(module: Callable[[TensorDict], Any], same_draw: bool) -> Provider:
        # On a CPU, the noise is that of torch's generator in a fixed order.
        return Provider(in_turn(module, inputs), read, same_draw and not cuda)

    def compiled(side: str, mode: str | None) -> Provider:
        module = torch.compile(make(side), dynamic=False, mode=mode)
        # fastprob draws compiled what it draws in eager mode; Inductor has normals of its own.
        same_draw = side == FASTPROB
        if mode is None:
            return provider(module, same_draw)

        def call(data: TensorDict) -> Any:
            torch.compiler.cudagraph_mark_step_begin()
            return module(data)

        return provider(call, same_draw)

    def graphed(side: str) -> Provider:
        if not cuda:
            raise Missing("CUDA graphs need a GPU")
        if side == UPSTREAM:
            from tensordict.nn import CudaGraphModule

            made = provider(CudaGraphModule(make(side), warmup=5), same_draw=False)
            # torch's checks of arguments wait for the device, which no capture can. A replay runs
            # no Python, and makes none either.
            checks = torch.distributions.Distribution._validate_args
            torch.distributions.Distribution.set_default_validate_args(False)
            try:
                warm_up(made)
            finally:
                torch.distributions.Distribution.set_default_validate_args(checks)
            return made
        import fastprob

        policy = getattr(fastprob, "CudaGraphPolicy", None)
        if policy is None:
            raise Missing("this fastprob has no CudaGraphPolicy")
        return provider(policy(make(side)), same_draw=False)

    makers: dict[str, Callable[[], Provider]] = {}
    for side in sides:
        makers[side] = lambda side=side: provider(make(side), same_draw=True)
        makers[f"{side} compiled"] = lambda side=side: compiled(side, None)
        makers[f"{side} reduce-overhead"] = lambda side=side: compiled(side, "reduce-overhead")
        makers[f"{side} graph"] = lambda side=side: graphed(side)
    if FASTPROB in sides:
        makers[EXPORTED] = lambda: provider(
            exported(make(FASTPROB), inputs[0], kind), same_draw=True
        )
    return makers


def exported(module: nn.Module, example: TensorDict, kind: InteractionType) -> Any:
    """Exports a policy into a file and loads it back.

    Raises:
        Missing: if this fastprob cannot.
    """
    import fastprob

    export = getattr(fastprob, "export_policy", None)
    if export is None:
        raise Missing("this fastprob has no export_policy")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "policy.pt2"
        export(module, example.clone(), kind, path)
        return fastprob.load_policy(path)  # type: ignore[attr-defined]


def copy_roof(moved: float, device: str) -> Callable[[], Tensor]:
    """Returns a copy that moves so many bytes, half of them read and half written.

    No kernel that reads its inputs and writes its outputs once can be faster.
    """
    size = max(1, int(moved) // 2)
    pairs = [
        tuple(torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
        for _ in range(copies(2 * size))
    ]
    return in_turn(lambda pair: pair[1].copy_(pair[0]), pairs)
