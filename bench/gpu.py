"""``python -m bench gpu --out DIR``: everything that needs a GPU, in 8 minutes.

The correctness gate (``pytest -m gpu``) comes first; where it is red, nothing is timed. Then calls,
kernels against the copy roof, graphs, and a short loop. Each part runs in a process of its own, so
that a kernel that brings the device down ends its own part only. Needs torch, triton, tensordict,
torchrl and pytest; rich, matplotlib and gymnasium are used where they are there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import results

# Calls at the shapes of a rollout and of the roof, of the families that the goals name.
CASES = ("normal", "tanh_normal", "safe_normal", "categorical", "normal_train", "ppo_minibatch")
CASES += ("objective_sac", "objective_ppo", "sequential")


@dataclass(frozen=True)
class Part:
    """One part: a command of this project, and how long it may take.

    Attributes:
        command: arguments of Python; ``--out`` is added where ``writes``.
        limit_s: it is stopped after this many seconds, and counts as failed.
        writes: whether it writes result files.
    """

    command: tuple[str, ...]
    limit_s: float
    writes: bool = True


def gate_files(root: Path = results.ROOT) -> list[str]:
    """The test files that have tests for a GPU.

    The others are not even collected: some import what the GPU machine does not have.
    """

    def marked(path: Path) -> bool:
        # A conftest marks all tests of its folder.
        texts = [p.read_text("utf-8") for p in (path, path.parent / "conftest.py") if p.is_file()]
        return any("mark.gpu" in text for text in texts)

    files = sorted((root / "tests").rglob("test_*.py"))
    return [str(path.relative_to(root)) for path in files if marked(path)]


def parts() -> dict[str, Part]:
    """The parts by name, in their order; 480 s in all."""
    bench = ("-m", "bench")
    chosen = [word for name in CASES for word in ("--case", name)]
    # minversion: the machine's pytest is what it is.
    pytest = ("-m", "pytest", "-q", "-m", "gpu", "-o", "minversion=7", "-p", "no:cacheprovider")
    loop = ("--loop", "ppo_tanhnormal", "--seeds", "1", "--device", "cuda")
    made = {
        "gate": Part((*pytest, *gate_files()), 150, writes=False),
        "calls": Part((*bench, "calls", "--device", "cuda", "--limit", "130", *chosen), 160),
        "kernels": Part((*bench, "kernels"), 60),
        "graphs": Part((*bench, "graphs"), 60),
        "loops": Part((*bench, "loops", *loop, "--cudagraphs"), 50),
    }
    from bench.__main__ import COMMANDS

    return {name: part for name, part in made.items() if name == "gate" or name in COMMANDS}


def run(args: argparse.Namespace) -> int:
    """Runs the command; returns 1 where a part failed, else 0."""
    import torch

    if not torch.cuda.is_available():
        print("no GPU here: nothing was run")
        return 0
    folder = args.out or results.default_folder("cuda")
    chosen = {name: part for name, part in parts().items() if args.part in (None, name)}
    done = run_parts(chosen, folder, quick=args.quick)
    payload = {"environment": results.environment("cuda"), "parts": done}
    print(f"written: {results.shown(results.write(folder / 'gpu.json', payload))}")
    return 1 if any(part["status"] != "ok" for part in done) else 0


def run_parts(chosen: dict[str, Part], folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Runs the parts one after another; none after a red gate.

    Returns:
        name, status and seconds of each.
    """
    done: list[dict[str, Any]] = []
    for name, part in chosen.items():
        if done and done[0]["part"] == "gate" and done[0]["status"] != "ok":
            done.append({"part": name, "status": "left out: the gate is red", "seconds": 0.0})
            continue
        command = [sys.executable, *part.command]
        if part.writes:
            command += ["--out", str(folder.resolve())] + ["--quick"] * quick
        print(f"\n=== {name}", flush=True)
        begin = time.perf_counter()
        status = _status(command, part.limit_s)
        done.append({"part": name, "status": status, "seconds": time.perf_counter() - begin})
    print("\npart      seconds  status")
    for part in done:
        part["seconds"] = round(part["seconds"], 1)
        print(f"{part['part']:8} {part['seconds']:8.1f}  {part['status']}")
    return done


def _status(command: Sequence[str], limit_s: float) -> str:
    try:
        code = subprocess.run(command, cwd=results.ROOT, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    # 5: pytest found no test.
    return "ok" if code == 0 else f"failed ({code})"
