"""Runs `tests/kernels` in Triton's interpreter, in two processes of their own."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from subprocess import PIPE, CompletedProcess, Popen

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("1/2", "2/2")


@pytest.fixture(scope="module")
def done() -> dict[str, CompletedProcess[str]]:
    """The parts, run side by side: 738 s on two cores with other work."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/kernels", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = {}
    try:
        for part in PARTS:
            env = environment | {"KERNELS_PART": part}
            started[part] = Popen(command, cwd=ROOT, env=env, stdout=PIPE, stderr=PIPE, text=True)
        ended = {part: process.communicate(timeout=1800) for part, process in started.items()}
    finally:
        for process in started.values():
            process.kill()
    return {
        part: CompletedProcess(command, started[part].returncode, *output)
        for part, output in ended.items()
    }


@pytest.mark.parametrize("part", PARTS)
def test_kernels_in_the_interpreter(done, part):
    # No test at all is status 5.
    assert done[part].returncode == 0, done[part].stdout[-20000:] + done[part].stderr[-4000:]
    print(done[part].stdout.splitlines()[-1])


def test_the_parts_are_the_whole(done):
    found = [re.search(r"(\d+) passed, (\d+) deselected", run.stdout) for run in done.values()]
    assert all(found)
    (passed, left_out), (others_passed, others_left_out) = (
        tuple(map(int, m.groups())) for m in found
    )
    assert (left_out, others_left_out) == (others_passed, passed)
