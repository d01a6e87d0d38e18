"""What a graph refuses."""

from __future__ import annotations


class GraphError(RuntimeError):
    """A call that cannot become, or cannot use, a CUDA graph; the message names what is in the way.

    The policy or function itself is untouched, and can go on being called without a graph.
    """
