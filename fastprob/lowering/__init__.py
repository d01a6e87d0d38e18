"""What Inductor makes of fastprob's operators in a graph, on a CPU.

- **Draws** become ATen's own fill of a buffer that Inductor plans itself. `rng` registers a draw as
  an operator in Python, which a compiler does not look into. Called from compiled code, such an
  operator costs several times what ATen takes for a small draw. Where Inductor compiles for a CPU
  in Python, a draw from torch's default generator becomes `buffer.normal_()` instead: the same call
  as in eager mode, so that the noise is the same. A large one goes to the kernel of `native`, which
  draws the same numbers faster.
- **A Normal's score of given values** and its gradients go to the kernel of `native_normal` where
  the batch is large, and become the formula, for Inductor to fuse with what is around, where it is
  small.
- **The largest of a row, and a categorical's draw without gradients,** are ATen's or eager mode's
  operations where the batch is large and the row fills no vectors, and else the formula.
- **A clamp with a gradient** stays what Inductor would make of it, but the backward pass compares
  the value again: a mask of bools, which Inductor keeps otherwise, it writes and reads one by one.

Everything here stands on Inductor's internals, and is left out where they are not as expected: the
operator then runs as it is.
"""

from fastprob.lowering._categorical import offer_categorical
from fastprob.lowering._clamp import offer_clamp
from fastprob.lowering._draws import offer
from fastprob.lowering._functions import offer_kept
from fastprob.lowering._normal import offer_score

__all__ = ["enabled", "offer", "offer_categorical", "offer_clamp", "offer_kept", "offer_score"]

# Whether graphs hold the operators of scores, modes and draws' scores that Inductor lowers, or is
# faster with as they are; `python -m bench opaque` compares both. Draws are operators either way.
enabled = True
