"""A backend of ``torch.compile`` that compiles equal graphs once.

Cells of the matrix that differ in how a module is called mostly compute the same: two of three
graphs are those of an earlier cell of the family, and need not go through AOT autograd again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses import FakeTensor

# Arguments whose text says all of them. One of any other type may hold a state.
_PLAIN = (bool, int, float, str, type(None), type(...), torch.dtype, torch.device, torch.layout)
_PLAIN += (torch.memory_format,)


class Remembering:
    """Compiles a graph with another backend, unless an equal one was compiled before.

    Graphs are equal where their operators, arguments and constants are, and the types, shapes,
    strides, dtypes, devices, aliases and requests for gradients of their inputs. Dynamo traces each
    call all the same, and makes its guards. A graph with a sub-graph or an attribute of its own, or
    an input that is no plain tensor, is compiled each time.

    A cell of a Normal takes 0.85 of the time that way, of a Beta 0.78 and of a TruncatedNormal 0.62
    (72 cells of each, in one run).

    Args:
        backend: name of the backend that compiles.
        most: graphs that are remembered, those used last; a compiled graph is kept with its code.

    Attributes:
        compiled: number of graphs that the backend has compiled.
        remembered: number of graphs that were taken from before.
    """

    def __init__(self, backend: str, most: int = 64) -> None:
        self._compile: Callable[..., Any] = lookup_backend(backend)
        self._most = most
        self._known: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
        self.compiled = 0
        self.remembered = 0

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Returns what runs the graph on tensors like ``inputs``, as dynamo asks of a backend."""
        key = _key(graph, inputs)
        if key in self._known:
            self._known.move_to_end(key)
            self.remembered += 1
            return self._known[key]
        made = self._compile(graph, inputs)
        self.compiled += 1
        if key is not None:
            self._known[key] = made
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        return made


def _key(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """What a compiled graph depends on, without names; None where that cannot be told."""
    if not all(type(x) in (Tensor, torch.nn.Parameter, FakeTensor) for x in inputs):
        return None
    places = {node: i for i, node in enumerate(graph.graph.nodes)}
    try:
        nodes = tuple(_node(node, places) for node in graph.graph.nodes)
    except _Untold:
        return None
    storages = [x.untyped_storage()._cdata for x in inputs]
    of_inputs = tuple(
        (
            type(x),
            x.shape,
            x.stride(),
            x.storage_offset(),
            x.dtype,
            x.device,
            x.requires_grad,
            x.is_leaf,
            storages.index(storage),
        )
        for x, storage in zip(inputs, storages, strict=True)
    )
    return nodes, of_inputs, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


class _Untold(Exception):
    pass


def _node(node: fx.Node, places: dict[fx.Node, int]) -> Any:
    if node.op == "placeholder":
        # Named after the caller's variables.
        return node.op
    if node.op in ("get_attr", "call_module"):
        raise _Untold
    return node.op, node.target, _told(node.args, places), _told(node.kwargs, places)


def _told(x: Any, places: dict[fx.Node, int]) -> Any:
    """A hashable form of an argument, nodes by their place."""
    if isinstance(x, fx.Node):
        return "node", places[x]
    if isinstance(x, (tuple, list)):
        return type(x).__name__, *(_told(item, places) for item in x)
    if isinstance(x, dict):
        return "dict", *((key, _told(item, places)) for key, item in x.items())
    if isinstance(x, slice):
        return "slice", *(_told(item, places) for item in (x.start, x.stop, x.step))
    if type(x) in _PLAIN:
        # By its text: 1, 1.0 and True are equal, and so are 0.0 and -0.0.
        return repr(x)
    raise _Untold
