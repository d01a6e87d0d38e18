"""The options of each command.

They stand apart from the commands since torch and TorchRL take 4 s to import: ``--help`` and a
mistyped option need neither.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The main job's options."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="one seed, two short iterations, the first-batch check only: under 30 s, for CI",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument(
        "--seeds",
        type=int,
        help="how many seeds each actor trains with; their spread is the yardstick of the returns"
        " (default: 3, with --quick 1)",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument(
        "--null", action="store_true", help="upstream in both roles: tests the checks themselves"
    )
    _add_out(parser, "folder of the JSON and the PNG")


def add_calls_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``calls``."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help="16x8 only, some families, short, nothing compiled: under 25 s, for CI",
    )
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument(
        "--case",
        action="append",
        metavar="NAME",
        help="only this case; may be repeated; a wrong name lists the right ones",
    )
    parser.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="only this provider, such as 'upstream compiled'; may be repeated",
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        metavar="ROWSxWIDTH",
        help="only this shape of each case; may be repeated",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="begin no further case after this many seconds, and say which are left out",
    )
    _add_device(parser)
    parser.add_argument(
        "--null",
        action="store_true",
        help="upstream in both roles: what the ratios then are off 1 is the error of the timer",
    )
    _add_out(parser, "folder of the JSON")


def add_loops_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``loops``."""
    add_common_arguments(parser)
    parser.add_argument("--loop", action="append", metavar="NAME", help="only this loop")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument(
        "--seeds", type=int, help="seeds a side (default: 3, and 1 compiled; with --quick 1)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--compile",
        action="store_true",
        help="only with policies and losses compiled (default: eager, then compiled)",
    )
    form.add_argument("--eager", action="store_true", help="only as they are (so is --quick)")
    parser.add_argument(
        "--cudagraphs", action="store_true", help="capture policies and updates; needs a GPU"
    )
    parser.add_argument(
        "--mujoco",
        action="store_true",
        help="a short HalfCheetah-v5 in place of the others, for its speed, into"
        " loops-mujoco.json; needs gymnasium[mujoco]",
    )
    _add_device(parser)


def add_scaling_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``scaling``."""
    add_common_arguments(parser)
    _add_device(parser)


def add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``gpu``."""
    add_common_arguments(parser)
    parser.add_argument(
        "--part",
        choices=("gate", "calls", "kernels", "graphs", "loops"),
        help="only this part",
    )


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``report``."""
    parser.add_argument("--quick", action="store_true", help="print the tables, write nothing")
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where README.md is out of date"
    )


def add_matrix_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``matrix``."""
    add_common_arguments(parser)
    parser.add_argument(
        "--strength",
        type=int,
        default=3,
        help="cells in which every combination of this many choices occurs (default: 3)",
    )
    parser.add_argument("--full", action="store_true", help="the whole product: hours")
    parser.add_argument(
        "--unless-recorded",
        action="store_true",
        help="the whole product, unless it has passed and is on record for fastprob's code and the "
        "versions as they are: then cells that hold every triple",
    )
    parser.add_argument("--side", choices=("upstream", "fastprob"), help="only this side")
    parser.add_argument(
        "--backend", default="aot_eager", help="of torch.compile (default: aot_eager)"
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(1, 1),
        metavar="I/N",
        help="run only the Ith of N parts of the cells, beside other processes; what all of them "
        "have found so far is summed up",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help="stop each side after so long; the next run goes on, and 0 only sums up",
    )
    parser.add_argument(
        "--state",
        type=Path,
        default=Path("bench/out/matrix"),
        help="folder of the outcomes, which later runs of the same code go on from "
        "(default: bench/out/matrix)",
    )


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What every command has: ``--quick``, ``--threads`` and ``--out``."""
    parser.add_argument("--quick", action="store_true", help="shortened for CI, nothing written")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    _add_out(parser, "folder of the results")


def _shape(text: str) -> tuple[int, int]:
    rows, _, width = text.partition("x")
    try:
        return int(rows), int(width)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected ROWSxWIDTH such as 4096x8, got {text}"
        ) from None


def _shard(text: str) -> tuple[int, int]:
    index, _, count = text.partition("/")
    try:
        found = int(index), int(count)
    except ValueError:
        found = (0, 0)
    if not 1 <= found[0] <= found[1]:
        raise argparse.ArgumentTypeError(f"expected I/N with 1 <= I <= N such as 2/4, got {text}")
    return found


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes the GPU where there is one (default: auto)",
    )


def _add_out(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        help=f"{what} (default: bench/results/<device>; a run that is cut short by another option"
        " writes only where --out says)",
    )
