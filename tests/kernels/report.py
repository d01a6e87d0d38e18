"""Prints what the kernels' machine code is made of: `python -m tests.kernels.report [NAME]`."""

from __future__ import annotations

import sys

from tests.kernels import machine
from tests.test_codegen import CASES


def main(wanted: str = "") -> None:
    """Prints a line for each case whose name contains `wanted`."""
    print(f"{'kernel':48} {'bytes/el':>8} {'slots/el':>8} {'limit':>6} {'regs':>5} {'roof':>5}")
    for case in CASES:
        if wanted not in case.name:
            continue
        code = machine.looked_at(case, "sm_90")
        limit = "" if case.slots is None else f"{case.slots:g}"
        slots = roof = ""
        if case.counted:
            slots = f"{machine.slots_per_element(case, code):.1f}"
            roof = f"{machine.roof(case, code):.0%}"
        print(
            f"{case.name:48} {case.bytes:8.2f} {slots:>8} {limit:>6} {code.registers:5} {roof:>5}"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
