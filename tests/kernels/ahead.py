"""Compiles what `tests/test_codegen.py` looks at, from its last case to its first.

`python -m tests.kernels.ahead`, which `tests/conftest.py` starts, fills Triton's cache beside the
tests, and from the other end: whoever comes second finds what the other has compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from tests import test_codegen as codegen
from tests.kernels import machine


def work() -> list[Callable[[], object]]:
    """What the tests compile, in their order."""

    def of(case: machine.Case, target: str) -> Callable[[], object]:
        return lambda: machine.compiled(case, target)

    found = [of(case, "sm_90") for case in codegen.CASES]
    found += [of(case, target) for case in codegen.NVIDIA for target in ("sm_80", "sm_100")]
    found += [of(case, "gfx942") for case in codegen.EVERYWHERE]
    found += [of(codegen.few_rows(case), "sm_90") for case in codegen.COUNTED]
    return found


if __name__ == "__main__":
    os.nice(5)
    for compile_one in reversed(work()):
        compile_one()
