"""Measurements of fastprob beside upstream, with a correctness gate in front of every figure.

Run from the root of the checkout:

    python -m bench             train PPO on Pendulum-v1 with upstream's actor, then fastprob's
    python -m bench calls       time single module calls, upstream beside fastprob
    pytest bench --benchmark-only    the same cases under pytest-benchmark

The way of a figure: ``cases`` (what is measured) -> ``gate`` (is the result right?) ->
``timing`` (how long does it take?) -> ``calls`` / ``train`` (tables) -> ``results`` (JSON).
Importing this package imports neither torch nor matplotlib.
"""
