"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from bench import options

DESCRIPTION = """\
fastprob beside upstream (tensordict and TorchRL), on this machine.

With no command, the main job: trains a PPO policy on gymnasium's Pendulum-v1 with upstream's actor
and with fastprob's, seed by seed; checks that the first batch and the final returns agree; prints
the time spent in the actor and in all; writes curves (PNG) and figures (JSON). Under 4 minutes on
2 cores.
"""

EPILOG = """\
examples:
  python -m bench                    the main job, results in bench/results/cpu/
  python -m bench --quick            the same, shortened for CI (< 30 s), nothing written
  python -m bench calls              times of single calls, and the targets met and missed
  python -m bench calls --null       upstream against itself: the error of the timer
  python -m bench loops              PPO and SAC, eager (three seeds a side), then compiled
  python -m bench gpu --out DIR      on a machine with a GPU: tests, then all its figures
  python -m bench report             write README.md's tables from the result files

The exit status is 0 only where every check of correctness passed; a missed speed target is printed
and does not change it.
"""


# A GPU machine has neither; what it is for needs neither.
OPTIONAL = ("gymnasium", "matplotlib")


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
        module: has ``run(args: argparse.Namespace) -> int``, the exit status. Imported when the
            command runs: torch and TorchRL take 4 s.
        help: one line for the list of commands.
        options: adds the command's own options; they stand in ``bench.options``.
    """

    module: str
    help: str
    options: Callable[[argparse.ArgumentParser], None] = options.add_common_arguments


COMMANDS: dict[str, Command] = {
    "compiled": Command(
        "bench.compiled", "compiled calls, upstream beside fastprob, and one ahead of time"
    ),
    "opaque": Command(
        "bench.opaque", "whether compiled graphs should hold a family's operator or Inductor's code"
    ),
    "matrix": Command(
        "bench.matrix",
        "what compiles in one graph and equals eager mode, upstream beside fastprob",
        options.add_matrix_arguments,
    ),
    "calls": Command(
        "bench.calls",
        "times of single module calls, upstream beside fastprob",
        options.add_calls_arguments,
    ),
    "loops": Command(
        "bench.loops.compare",
        "three training loops, upstream beside fastprob",
        options.add_loops_arguments,
    ),
    "scaling": Command(
        "bench.scaling",
        "cost over batch size and over the width of a row, upstream beside fastprob",
        options.add_scaling_arguments,
    ),
    "gpu": Command(
        "bench.gpu",
        "all that needs a GPU, in 8 minutes, the tests first",
        options.add_gpu_arguments,
    ),
    "graphs": Command(
        "bench.graphs", "policies and rollouts as CUDA graphs; without a GPU, the host's part"
    ),
    "report": Command(
        "bench.report", "write README.md's tables from bench/results/", options.add_report_arguments
    ),
    "kernels": Command(
        "bench.kernels", "Triton kernels against a copy; without a GPU, their machine code"
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Parses the command line and runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_train_arguments(parser)
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, command in COMMANDS.items():
        text = command.help[0].upper() + command.help[1:] + "."
        command.options(commands.add_parser(name, help=command.help, description=text))
    args = parser.parse_args(argv)
    module = COMMANDS[args.command].module if args.command else "bench.train"
    try:
        return importlib.import_module(module).run(args)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        print(f"this needs {error.name}, which is not installed: pip install -e '.[bench]'")
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
