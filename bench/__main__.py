"""The command line of the benchmarks."""

from __future__ import annotations

import argparse

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

The exit status is 0 only where every check of correctness passed; a missed speed target is printed
and does not change it.
"""


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
    calls_parser = commands.add_parser(
        "calls",
        help="times of single module calls, upstream beside fastprob",
        description="Times single module calls. Each provider's result is checked first.",
    )
    options.add_calls_arguments(calls_parser)
    args = parser.parse_args(argv)
    if args.command == "calls":
        from bench import calls

        return calls.run(args)
    from bench import train

    return train.run(args)


if __name__ == "__main__":
    raise SystemExit(main())
