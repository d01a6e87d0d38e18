"""``python -m bench graphs``: policies and rollouts as CUDA graphs.

On a GPU: a call of a policy eager, compiled and as a graph, upstream's ``CudaGraphModule`` (which
waits for the device at every call) around upstream's module beside ``CudaGraphPolicy`` around
fastprob's; and the steps a second of rollouts. Results are checked before anything is timed.

Without a GPU there is no graph to be timed. What is measured then is the host's part that does not
depend on one: how long a call takes to find its graph, on the stand-in of the tests, and what the
same object adds to an eager call where there is no device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import (
    CudaGraphModule,
    InteractionType,
    NormalParamExtractor,
    TensorDictModule,
    set_interaction_type,
)
from torch import nn

import fastprob
from bench import results
from bench.console import make_console, make_progress, make_table
from bench.envs import CartPole, Pendulum, TensorEnv
from bench.gate import WrongResult
from bench.implementations import implementation
from bench.timing import CudaMeter, Timings, interleave, ratio
from fastprob.graphs import RecordingBackend

BATCHES = (1, 64, 4096, 65536)
ENVS = (1, 4096, 65536)
OBSERVATION, ACTION, HIDDEN = 8, 4, 64
# Seconds for one batch; a call takes 10 to 500 us.
BUDGET_S, QUICK_S = 1.0, 0.2
STEPS = 64
# Only here: a compilation takes 10 s.
COMPILED_BATCH = 4096


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where a result was wrong, else 0."""
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = args.out or (None if args.quick else results.default_folder(device))
    before = torch.distributions.Distribution._validate_args
    # Argument checks look at values, which no graph can hold; upstream's are on by default.
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad(), set_interaction_type(InteractionType.RANDOM):
            payload = on_a_gpu(args.quick) if device == "cuda" else on_a_cpu(args.quick)
    except WrongResult as error:
        make_console().print(f"[red]wrong result, nothing timed:[/] {error}")
        return 1
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)
    payload = {"environment": results.environment(device), **payload}
    if folder is not None:
        path = results.write(folder / "graphs.json", payload)
        make_console().print(f"written: {results.shown(path)}")
    return 0


def make_policy(
    side: str, device: str, inputs: int = OBSERVATION, actions: int = ACTION, discrete: bool = False
) -> Any:
    """An MLP of two hidden layers and a scored random draw, of either side."""
    impl = implementation(side)
    torch.manual_seed(0)
    layers = [nn.Linear(inputs, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()]
    last: list[nn.Module] = [nn.Linear(HIDDEN, actions if discrete else 2 * actions)]
    if not discrete:
        last.append(NormalParamExtractor())
    keys = ["logits"] if discrete else ["loc", "scale"]
    net = TensorDictModule(nn.Sequential(*layers, *last), ["observation"], keys)
    head = impl.SafeProbabilisticModule(
        in_keys=keys,
        out_keys=["action"],
        distribution_class=impl.OneHotCategorical if discrete else impl.IndependentNormal,
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    )
    return impl.SafeProbabilisticTensorDictSequential(net, head).to(device)


def observations(batch: int, device: str) -> TensorDict:
    return TensorDict(
        observation=torch.randn(batch, OBSERVATION, device=device), batch_size=[batch]
    )


def check(graph: Callable[[Any], Any], policy: Callable[[Any], Any], given: TensorDict) -> None:
    """Compares calls of a graph with eager ones, in turn under both interaction types.

    Raises:
        WrongResult: where they differ.
    """
    for seed, kind in enumerate(("random", "mode", "random", "mode", "random")):
        with set_interaction_type(kind):
            torch.manual_seed(seed)
            expected = policy(given.clone())
            torch.manual_seed(seed)
            found = graph(given.clone())
        for key in expected.keys(True, True):
            if not torch.allclose(found[key], expected[key], rtol=1e-4, atol=1e-5):
                raise WrongResult(f"{key!r} of a graph under {kind!r} is not that of eager mode")


# ------------------------------------------------------------------------------------- without GPU


def on_a_cpu(quick: bool) -> dict[str, Any]:
    """Times the look-up of a graph, and a direct call through ``CudaGraphPolicy``."""
    console = make_console()
    console.print(
        "No GPU here, so that there is no graph to be timed. Below: the CPU time in which a call\n"
        "finds its graph (goal: 5 µs), on the stand-in of the tests, whose own replays say nothing"
        "\nabout a GPU; and an eager call with and without the object around it."
    )
    policy = make_policy("fastprob", "cpu")
    recorded = fastprob.CudaGraphPolicy(policy, backend=RecordingBackend())
    direct = fastprob.CudaGraphPolicy(policy)
    given = observations(16, "cpu")
    check(recorded, policy, given)
    check(direct, policy, given)

    def look_up() -> None:
        parts, _, watch = recorded._look(given, None, {})
        entry = recorded._table.find(parts)
        if entry is None or entry.places != watch.places():
            raise WrongResult("a call did not find its graph")

    timings = interleave(
        {
            "look-up of a graph": look_up,
            "walk over parameters()": lambda: [p.data_ptr() for p in policy.parameters()],
            "fastprob": lambda: policy(given),
            "fastprob, CudaGraphPolicy without a GPU": lambda: direct(given),
        },
        budget_s=QUICK_S if quick else 3 * BUDGET_S,
    )
    table = make_table("An MLP of 3 layers and its head, 16x8, CPU time", ("call",), ("µs",))
    for name, timing in timings.items():
        table.add_row(name, f"{timing.quantiles.p50:.2f}")
    console.print(table)
    return {
        "unit": "microseconds of CPU time per call",
        "stand-in": True,
        "results": {name: timing.quantiles.as_dict() for name, timing in timings.items()},
    }


# ---------------------------------------------------------------------------------------- with GPU


def on_a_gpu(quick: bool) -> dict[str, Any]:
    """Times calls and rollouts."""
    console = make_console()
    batches = BATCHES[1:3] if quick else BATCHES
    envs = [(env, n) for env in (Pendulum, CartPole) for n in (ENVS[:1] if quick else ENVS)]
    calls, rollouts = {}, []
    with make_progress(console) as progress:
        task = progress.add_task("graphs", total=len(batches) + len(envs))
        for batch in batches:
            progress.update(task, description=f"calls of {batch} rows")
            calls[batch] = time_calls(batch, quick)
            progress.advance(task)
        for env, count in envs:
            progress.update(task, description=f"rollout of {count} {env.__name__}")
            rollouts.append(time_rollout(env, count, quick))
            progress.advance(task)
    table = make_table(
        "A policy's call, µs: at the clock / on the host / on the device",
        ("provider",),
        tuple(str(batch) for batch in calls),
    )
    for name in dict.fromkeys(name for timings in calls.values() for name in timings):
        cells = [_cell(timings.get(name)) for timings in calls.values()]
        table.add_row(name, *cells)
    console.print(table)
    graph, ours = "upstream graph", "fastprob graph"
    for batch, timings in calls.items():
        console.print(
            f"{batch}: upstream graph ÷ fastprob graph "
            f"{ratio(timings[graph], timings[ours]).p50:.2f} (goal at ≤ 4096: ≥ 3), upstream "
            f"÷ fastprob graph {ratio(timings['upstream'], timings[ours]).p50:.1f} (≥ 20)"
        )
    table = make_table("Rollouts, steps a second", ("environment",), ("count", "eager", "graph"))
    for row in rollouts:
        rates = (f"{row[name]:,.0f}" for name in ("eager", "graph"))
        table.add_row(row["environment"], str(row["count"]), *rates)
    console.print(table)
    return {
        "unit": "microseconds per call; environment steps per second",
        "stand-in": False,
        "results": {
            str(batch): {name: timing.as_dict() for name, timing in timings.items()}
            for batch, timings in calls.items()
        },
        "rollouts": rollouts,
    }


def time_calls(batch: int, quick: bool) -> dict[str, Timings]:
    """Times a policy's call at one batch size, every way of making it."""
    policies = {side: make_policy(side, "cuda") for side in ("upstream", "fastprob")}
    given = observations(batch, "cuda")
    graph = fastprob.CudaGraphPolicy(policies["fastprob"])
    handed = fastprob.CudaGraphPolicy(policies["fastprob"], clone_outputs=False)
    check(graph, policies["fastprob"], given)
    check(handed, policies["fastprob"], given)
    calls: dict[str, Callable[[Any], Any]] = {
        "upstream": policies["upstream"],
        "fastprob": policies["fastprob"],
        "upstream graph": CudaGraphModule(policies["upstream"], warmup=5),
        "fastprob graph": graph,
        "fastprob graph, handed over": handed,
    }
    if batch == COMPILED_BATCH and not quick:
        for side, policy in policies.items():
            calls[f"{side} compiled"] = torch.compile(policy, dynamic=False)
    bound = {name: _bound(call, given.clone()) for name, call in calls.items()}
    for call in bound.values():
        for _ in range(8):
            call()
    return interleave(bound, budget_s=QUICK_S if quick else BUDGET_S, meter=CudaMeter())


def _bound(call: Callable[[Any], Any], given: TensorDict) -> Callable[[], Any]:
    return lambda: call(given)


def time_rollout(make: type[TensorEnv], count: int, quick: bool) -> dict[str, Any]:
    """Steps a second of an eager loop and of a graph."""
    env = make(device="cuda")
    discrete = make is CartPole
    sizes = (4, 2) if discrete else (3, 1)
    policy = make_policy("fastprob", "cuda", *sizes, discrete=discrete)
    collect = fastprob.rollout(env.step, policy, STEPS)
    root = env.reset([count])

    def eager() -> Any:
        now, data = root, []
        for _ in range(STEPS):
            transition, now = env.step(policy(now.copy()))
            data.append(transition)
        return torch.stack(data, 1)

    torch.manual_seed(0)
    expected = eager()
    torch.manual_seed(0)
    found, _ = collect(root)
    if not torch.allclose(found["observation"], expected["observation"], rtol=1e-3, atol=1e-3):
        raise WrongResult(f"a rollout of {make.__name__} is not that of a loop")
    rates = {}
    for name, call in (("eager", eager), ("graph", lambda: collect(root))):
        call()
        best = float("inf")
        for _ in range(2 if quick else 5):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        rates[name] = STEPS * count / best
    return {"environment": make.__name__, "count": count, **rates}


def _cell(timing: Timings | None) -> str:
    if timing is None:
        return ""
    kinds = (timing.us, timing.host_us, timing.device_us)
    return " / ".join(f"{sorted(us)[len(us) // 2]:.1f}" for us in kinds if us)
