"""Policies compiled ahead of time: one file that runs without tracing, guards or the policy's code.

A `torch.compile` call spends its time around the kernels: the guards, the tensordict, the modules.
A policy that is only to act needs none of them. AOTInductor turns it into a shared library with its
parameters, and what is left of a call is reading the inputs, one call into the library, and writing
the outputs.
"""

from __future__ import annotations

import json
import os
import warnings
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, TensorDictModuleBase
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch import distributions as D

from fastprob.calls import Called
from fastprob.interaction import in_this_thread, read_type
from fastprob.io import write

_ENTRY = "fastprob"
_VERSION = 1


class _Flat(nn.Module):
    """A policy as a function of tensors to tensors, under one interaction type."""

    def __init__(
        self,
        policy: nn.Module,
        in_keys: list[NestedKey],
        out_keys: list[NestedKey],
        batch_ndim: int,
        interaction: InteractionType,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.read, self.written = in_keys, out_keys
        self.batch_ndim = batch_ndim
        self.interaction = interaction

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        td = TensorDict({}, inputs[0].shape[: self.batch_ndim])
        for key, value in zip(self.read, inputs, strict=True):
            td.set(key, value)
        with in_this_thread(self.interaction):
            out = self.policy(td)
        found = []
        for key in self.written:
            value = out.get(key, None)
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"export_policy writes the policy's out_keys, which are tensors; under {key!r} "
                    f"there is {type(value).__name__}"
                )
            # A result that is an input, or another result, needs memory of its own.
            found.append(value.clone() if any(value is x for x in (*inputs, *found)) else value)
        return tuple(found)


def export_program(
    policy: Any,
    example: TensorDictBase,
    interaction_type: InteractionType | str,
    *,
    dynamic_batch: bool = True,
) -> torch.export.ExportedProgram:
    """A policy under one interaction type as a `torch.export` program, from tensors to tensors.

    Args:
        policy: as in `export_policy`.
        example: likewise.
        interaction_type: likewise.
        dynamic_batch: likewise.

    Returns:
        the program. Its inputs are the policy's `in_keys`, its outputs its `out_keys`, in order.

    Raises:
        ValueError: as `export_policy`.
        KeyError: likewise.
    """
    in_keys, out_keys = list(policy.in_keys), list(policy.out_keys)
    inputs = []
    for key in in_keys:
        value = example.get(key, None)
        if not isinstance(value, Tensor):
            raise KeyError(
                f"the example has no tensor under {key!r}, which the policy reads; it has "
                f"{sorted(map(str, example.keys(True, True)))}"
            )
        inputs.append(value.detach().contiguous())
    if not inputs:
        raise ValueError("a policy without in_keys has nothing to export")
    batch = example.batch_size
    flexible = dynamic_batch and len(batch) > 0
    if flexible and batch[0] < 2:
        raise ValueError(
            f"the example's batch size is {tuple(batch)}: torch.export takes a dimension of size 0 "
            "or 1 for a constant. Give an example of 2 or more, or dynamic_batch=False"
        )
    flat = _Flat(
        policy,
        in_keys,
        out_keys,
        len(batch),
        read_type(interaction_type, "interaction_type"),
    )
    flat.train(policy.training)
    shapes = None
    if flexible:
        first = torch.export.Dim("batch")
        shapes = (tuple({0: first} for _ in inputs),)
    # torch's own distributions would have the graph depend on whether their arguments are valid.
    checks = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(False)
    try:
        with torch.no_grad():
            return torch.export.export(flat, tuple(inputs), dynamic_shapes=shapes, strict=False)
    finally:
        D.Distribution.set_default_validate_args(checks)


def export_policy(
    policy: Any,
    example: TensorDictBase,
    interaction_type: InteractionType | str,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
) -> str:
    """Compiles a policy ahead of time into one file, which `load_policy` reads.

    The file holds the parameters as they are now. Random values come from torch's default
    generator, so that `torch.manual_seed` rules, and are those of the policy itself. No gradients.

    Args:
        policy: a module from tensordicts to tensordicts, with `in_keys` and `out_keys`.
        example: holds the inputs under `in_keys`: it gives their dtypes, shapes and device.
        interaction_type: how values are taken.
        path: where the file is written; it ends in `.pt2`.
        dynamic_batch: whether the first batch dimension may have another size in a call. From 2 up:
            torch.export takes a size of 1 for a constant.

    Returns:
        the path.

    Raises:
        ValueError: if the path does not end in `.pt2`, the interaction type is none, the policy has
            no inputs, or the batch of the example is too small to be dynamic.
        KeyError: if the example lacks an input.
        TypeError: if an out-key holds something else than a tensor.

    Source: the documentation of torch's AOTInductor.
    """
    path = os.fspath(path)
    if not path.endswith(".pt2"):
        raise ValueError(f"the path must end in .pt2, got {path!r}")
    program = export_program(policy, example, interaction_type, dynamic_batch=dynamic_batch)
    batch = example.batch_size
    flexible = dynamic_batch and len(batch) > 0
    about = {
        "version": _VERSION,
        "in_keys": list(policy.in_keys),
        "out_keys": list(policy.out_keys),
        "dtypes": [str(example.get(k).dtype).removeprefix("torch.") for k in policy.in_keys],
        "shapes": [list(example.get(k).shape) for k in policy.in_keys],
        "batch_ndim": len(batch),
        "dynamic": flexible,
        "interaction_type": read_type(interaction_type, "interaction_type").value,
    }
    from torch._inductor import aoti_compile_and_package

    configs: dict[str, Any] = {
        # Noise from ATen: Inductor's own is other numbers, and scalar on a CPU.
        "fallback_random": True,
        "aot_inductor.metadata": {_ENTRY: json.dumps(about)},
    }
    with warnings.catch_warnings():
        # torch 2.13 copies what it has deprecated itself.
        warnings.filterwarnings("ignore", r".*LeafSpec.* is deprecated", FutureWarning)
        return aoti_compile_and_package(program, package_path=path, inductor_configs=configs)


class ExportedPolicy(TensorDictModuleBase, Called):
    """A policy that was compiled ahead of time; made by `load_policy`.

    Attributes:
        in_keys: keys that a call reads.
        out_keys: keys that a call writes.
        interaction_type: how values are taken; `set_interaction_type` has no say.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        from torch._inductor import aoti_load_package

        model: Any = aoti_load_package(path)
        try:
            about = json.loads(model.get_metadata()[_ENTRY])
        except KeyError:
            raise ValueError(f"{path} was not written by fastprob.export_policy") from None
        if about["version"] != _VERSION:
            raise ValueError(
                f"{path} was written by another version of fastprob: its format is "
                f"{about['version']}, this one reads {_VERSION}. Export the policy anew."
            )
        keys: Any = [[_key(k) for k in about[side]] for side in ("in_keys", "out_keys")]
        self.in_keys, self.out_keys = keys
        self.interaction_type = InteractionType(about["interaction_type"])
        self._ndim, self._dynamic = about["batch_ndim"], about["dynamic"]
        # Where a size is free, the first is left out of what is compared.
        self._skip = 1 if self._dynamic else 0
        self._inputs = [
            (key, getattr(torch, dtype), torch.Size(shape[self._skip :]))
            for key, dtype, shape in zip(
                self.in_keys, about["dtypes"], about["shapes"], strict=True
            )
        ]
        self._model = model
        self._run = model.loader.run
        self._flat = all(isinstance(key, str) for key in self.out_keys)
        # What fitted in the call before: each input's key, dtype and shape, and the batch size of
        # a tensordict that took the results.
        self._fitted: tuple[list[Any], torch.Size | None] = ([(None, None, None)], None)

    def forward(self, tensordict: Any, tensordict_out: Any = None) -> Any:
        """Reads the inputs, runs the policy, and writes its results.

        Args:
            tensordict: holds the inputs; the results are written to it.
            tensordict_out: where they are written instead.

        Returns:
            the tensordict that was written to.

        Raises:
            KeyError: if an input is missing.
            ValueError: if an input has another dtype or shape than the example.
        """
        direct: Any = tensordict._tensordict if type(tensordict) is TensorDict else {}
        inputs = []
        fitted, batch = self._fitted
        for key, dtype, shape in fitted:
            value = direct.get(key)
            if (
                not isinstance(value, Tensor)
                or value.dtype is not dtype
                or value.shape != shape
                or not value.is_contiguous()
            ):
                inputs = None
                break
            inputs.append(value)
        out = tensordict if tensordict_out is None else tensordict_out
        if inputs is None:
            return self._first(tensordict, out)
        results = zip(self.out_keys, self._run(inputs), strict=True)
        if (
            type(out) is TensorDict
            and out._batch_size == batch
            and out._device is None
            and not out._is_locked
            and self._flat
        ):
            # What `write` does with results of these shapes: 6.4 -> 5.1 us a call, with the inputs'
            # shapes, which are compared with those of the call before.
            out._tensordict.update(results)  # type: ignore[arg-type]
        else:
            write(out, list(results), self)
        return out

    def _first(self, tensordict: Any, out: Any) -> Any:
        """A call with inputs of other shapes than the one before."""
        inputs = [
            self._fit(key, tensordict.get(key, None), dtype, shape, tensordict)
            for key, dtype, shape in self._inputs
        ]
        write(out, list(zip(self.out_keys, self._run(inputs), strict=True)), self)
        fitted = [
            (key, dtype, value.shape)
            for (key, dtype, _), value in zip(self._inputs, inputs, strict=True)
        ]
        # Not by nn.Module's __setattr__, which takes 1 us.
        self.__dict__["_fitted"] = fitted, out.batch_size
        return out

    def _fit(
        self, key: NestedKey, value: Any, dtype: torch.dtype, shape: torch.Size, tensordict: Any
    ) -> Tensor:
        if value is None:
            raise KeyError(
                f"the exported policy reads {key!r}, but the tensordict has no such entry; it has "
                f"{sorted(map(str, tensordict.keys(True, True)))}"
            )
        skip = self._skip
        if (
            value.dtype is not dtype
            or value.ndim != len(shape) + skip
            or value.shape[skip:] != shape
            or (skip and value.shape[0] < 2)
        ):
            wanted = [*(["2 or more"] if skip else []), *map(str, shape)]
            raise ValueError(
                f"the exported policy reads {key!r} as {dtype} of shape ({', '.join(wanted)}), got "
                f"{value.dtype} of shape {tuple(value.shape)}"
            )
        return value.contiguous()


def _key(key: Any) -> NestedKey:
    """A key as it comes back from JSON, where a tuple is a list."""
    return key if isinstance(key, str) else tuple(key)


def load_policy(path: str | os.PathLike[str]) -> ExportedPolicy:
    """Loads what `export_policy` has written.

    Args:
        path: the file.

    Returns:
        a module from tensordicts to tensordicts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not such a file, or of another version.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no exported policy at {path!r}")
    return ExportedPolicy(path)
