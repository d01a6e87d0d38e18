"""Measurements of fastprob beside upstream, with a correctness gate in front of every figure.

Run from the root of the checkout:

    python -m bench             train PPO on Pendulum-v1 with upstream's actor, then fastprob's
    python -m bench calls       time single module calls, every provider side by side
    python -m bench scaling     cost over batch size and over the width of a row
    python -m bench loops       three training loops, upstream beside fastprob, eager and compiled
    python -m bench compiled    compiled calls, upstream beside fastprob, and one ahead of time
    python -m bench matrix      what compiles in one graph and equals eager mode
    python -m bench graphs      policies and rollouts as CUDA graphs; without a GPU, the host's part
    python -m bench kernels     Triton kernels against a copy; without a GPU, their machine code
    python -m bench gpu         all that needs a GPU, in 8 minutes
    python -m bench report      write README.md's tables from the result files
    pytest bench --benchmark-only    the cases of ``calls`` under pytest-benchmark

The way of a figure: ``cases`` (what is measured: ``problems`` x ``families`` x ``providers``) ->
``gate`` (is the result right?) -> ``timing`` (how long does it take?) -> ``calls`` and the other
commands (tables) -> ``results`` (JSON) -> ``report`` (README.md).
Importing this package imports neither torch nor matplotlib.
"""
