"""Where results are written, and the record of the machine they come from."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "tensordict", "torchrl", "gymnasium", "mujoco", "triton", "numpy")


def pick_device(wanted: str) -> str | None:
    """Returns ``"cpu"`` or ``"cuda"`` for an option; None where a GPU is wanted and none is there.

    Args:
        wanted: ``"auto"``, ``"cpu"`` or ``"cuda"``.
    """
    import torch

    if wanted == "cpu" or torch.cuda.is_available():
        return "cpu" if wanted == "cpu" else "cuda"
    return "cpu" if wanted == "auto" else None


def default_folder(device: str = "cpu") -> Path:
    """Returns the folder of a device's results inside the checkout.

    Args:
        device: ``"cpu"``, or ``"cuda"`` for the GPU that is there, whose folder has its name.
    """
    if device != "cpu":
        import torch

        device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return ROOT / "bench" / "results" / device


def environment(device: str = "cpu") -> dict[str, Any]:
    """Describes the run: device, versions, commit, date and command."""
    import torch

    return {
        "device": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": COMMIT,
        "uncommitted_changes": CHANGED,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
    }


def write(path: Path, payload: dict[str, Any]) -> Path:
    """Writes one result file, its folder included, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(payload, indent=1) + "\n")
    return path


def shown(path: Path) -> str:
    """Returns a path as it is best printed: relative to the checkout where it lies inside."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git(*args: str) -> str | None:
    """Returns what git says about the checkout, or None where there is no git or no commit."""
    try:
        done = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# At import: where others work on the checkout, a long run ends on another commit than it measured.
COMMIT = _git("rev-parse", "HEAD")
# Results are written into the checkout, so they do not count as a change of it.
CHANGED = bool(_git("status", "--porcelain", "--", "fastprob", "kernels", "bench/*.py"))
