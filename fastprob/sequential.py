"""ProbabilisticTensorDictSequential: a network and its probabilistic head."""

from __future__ import annotations

import collections
import inspect
from typing import Any

from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import CompositeDistribution as _UpstreamComposite
from tensordict.nn import TensorDictSequential, dispatch
from tensordict.nn import probabilistic as _upstream
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch import distributions as D

from fastprob.calls import Called
from fastprob.distributions import CompositeDistribution
from fastprob.distributions._any import take
from fastprob.distributions._base import EMPTY
from fastprob.extraction import Extraction
from fastprob.interaction import InteractionType, current_type, in_this_thread, read_type
from fastprob.io import can_skip, leaves, skips_existing, write
from fastprob.modules import ProbabilisticTensorDictModule

_HEADS = (
    _upstream.ProbabilisticTensorDictModule,
    _upstream.ProbabilisticTensorDictSequential,
)


def _as(kind: InteractionType | None, module: Any) -> dict[str, Any]:
    """The keyword that says a call's interaction type to one of fastprob's modules.

    The others find it in force, which in tensordict 0.14 holds for all threads alike.
    """
    if kind is None or not isinstance(
        module, (ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential)
    ):
        return {}
    return {"interaction_type": kind}


def _takes(cls: type, name: str) -> bool:
    parameters = inspect.signature(cls.__init__).parameters.values()
    return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)


class ProbabilisticTensorDictSequential(_upstream.ProbabilisticTensorDictSequential, Called):
    """A sequence of tensordict modules with at least one probabilistic one, as a rule the last.

    A drop-in for `tensordict.nn`'s class of the same name, and a subclass of it. Modules that are
    replaced, inserted or deleted afterwards take effect at the next call.

    Args:
        *modules: tensordict modules in the order of execution, or one list, dict or `OrderedDict`
            of them. Callables that map a tensordict to a tensordict are taken as well.
        partial_tolerant: whether modules whose in-keys are missing are left out.
        return_composite: whether `get_dist` gives a `CompositeDistribution` of all probabilistic
            modules instead of the distribution of the last. Default True where there are several or
            the last module is not probabilistic.
        selected_out_keys: the out-keys that are written; None for all.
        inplace: True writes to the input, False to a new tensordict, `"empty"` to an empty one of
            the input's kind, None leaves it to the modules.

    Raises:
        ValueError: if there is no module.
        TypeError: if `return_composite` is False and the last module is not probabilistic.

    Source: the documentation of tensordict's `ProbabilisticTensorDictSequential`.
    """

    module: Any  # nn.ModuleList, or nn.ModuleDict for named modules

    # The class of a slice, where the constructor of this one takes something else than modules.
    _sliced: type | None = None

    def __init__(self, *modules: Any, **kwargs: Any) -> None:
        super().__init__(*modules, **kwargs)
        # tensordict's constructor keeps a second sequence of all modules but the last, which goes
        # on running a module that has been replaced.
        self.__dict__.pop("_det_part", None)

    # structure ------------------------------------------------------------------------------

    def _modules_now(self) -> list[Any]:
        return list(self.module._modules.values())

    def _plan(self) -> tuple[list[Any], bool]:
        """The modules, and whether the last one has to sample; worked out again after a change."""
        modules = self._modules_now()
        plan = self.__dict__.get("_plan_made")
        # List equality compares identities first: 0.06 us for an unchanged list.
        if plan is None or plan[0] != modules:
            if any(isinstance(m, _HEADS) for m in modules):
                _, written = self._compute_in_and_out_keys(modules[:-1])
                wanted = getattr(modules[-1], "dist_sample_keys", [None])
                sample = any(key not in written for key in wanted)
            else:
                sample = False
            plan = self.__dict__["_plan_made"] = (modules, sample)
            # A subclass that gives the parameters in its own way is asked for them.
            own = type(self).get_dist_params is ProbabilisticTensorDictSequential.get_dist_params
            self.__dict__["_extraction"] = Extraction.of(modules) if own else None
        return plan

    @property
    def _requires_sample(self) -> bool:
        return self._plan()[1]

    @_requires_sample.setter
    def _requires_sample(self, value: bool) -> None:
        # Set by tensordict's constructor; derived from the modules here.
        pass

    @property
    def det_part(self) -> TensorDictSequential | None:
        """All modules but the last, as a sequence; None where none is probabilistic."""
        modules = self._modules_now()
        if not any(isinstance(m, _HEADS) for m in modules):
            return None
        if isinstance(self.module, nn.ModuleDict):
            named = list(self.module._modules.items())[:-1]
            return TensorDictSequential(
                collections.OrderedDict(named), partial_tolerant=self.partial_tolerant
            )
        return TensorDictSequential(*modules[:-1], partial_tolerant=self.partial_tolerant)

    @property
    def _last_module(self) -> Any:
        return self._modules_now()[-1]

    def _refresh_keys(self) -> None:
        """Works the key lists out again after a module was replaced or removed."""
        selected = self._out_keys_apparent if self._select_before_return else None
        keys: Any = self._compute_in_and_out_keys(self._modules_now())
        self.in_keys, self.out_keys = keys
        if selected is not None:
            self._out_keys_apparent = [k for k in selected if k in keys[1]]

    def __setitem__(self, index: int | slice | str, module: Any) -> None:
        if not isinstance(index, slice):
            (module,) = self._convert_modules([module])
            self.module[index] = module
        else:
            for i, m in zip(
                range(*index.indices(len(self.module))),
                self._convert_modules(module),
                strict=True,
            ):
                self.module[i] = m
        self._refresh_keys()

    def __delitem__(self, index: int | slice | str) -> None:
        del self.module[index]
        self._refresh_keys()

    def __getitem__(self, index: int | slice | str) -> Any:
        if isinstance(index, (int, str)):
            return self.module[index]
        if isinstance(self.module, nn.ModuleDict):
            named = list(self.module._modules.items())[index]
            modules: Any = [m for _, m in named]
            args: tuple = (collections.OrderedDict(named),)
        else:
            modules = self._modules_now()[index]
            args = tuple(modules)
        kwargs: dict[str, Any] = {"partial_tolerant": self.partial_tolerant}
        if not modules:
            raise IndexError(f"the slice {index} of {len(self.module)} modules is empty")
        if not any(isinstance(m, _HEADS) for m in modules) or not (
            self.return_composite or isinstance(modules[-1], _HEADS)
        ):
            return TensorDictSequential(*args, **kwargs)
        kind = self._sliced or type(self)
        if self.return_composite and _takes(kind, "return_composite"):
            kwargs["return_composite"] = True
        return kind(*args, **kwargs)

    @property
    def log_prob_key(self) -> NestedKey:
        """Key of the last module's log-probability.

        Raises:
            RuntimeError: if it has several and no sum.
        """
        return self._last_module.log_prob_key

    # distribution ---------------------------------------------------------------------------

    def _default_type(self) -> Any:
        for module in reversed(self._modules_now()):
            found = getattr(module, "default_interaction_type", None)
            if found is not None:
                return found
        raise ValueError(
            f"{type(self).__name__} has no module with a default_interaction_type; set one with "
            "set_interaction_type"
        )

    def get_dist_params(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        """Runs all modules but the last.

        Args:
            tensordict: the input.
            tensordict_out: where the results are written; the input itself where it is None.
            **kwargs: not supported, as upstream.

        Returns:
            the tensordict that holds the parameters.

        Modules that look at the interaction type see the global one, or that of the last module.
        """
        if tensordict_out is not None or kwargs:
            part = self.det_part
            assert part is not None
            if current_type() is not None:
                return part(tensordict, tensordict_out, **kwargs)
            with in_this_thread(self._default_type()):
                return part(tensordict, tensordict_out, **kwargs)
        if current_type() is not None:
            return self._run_det(tensordict)
        with in_this_thread(self._default_type()):
            return self._run_det(tensordict)

    def _run_det(self, tensordict: Any, kind: Any = None) -> Any:
        for module in self._plan()[0][:-1]:
            tensordict = self._run_one(module, tensordict, **_as(kind, module))
        return tensordict

    def _named(self, module: Any) -> Any:
        """Number or key of a module; of the first of two that run as one."""
        if isinstance(module, Extraction):
            module = module.module
        return self._get_module_num_or_key(module)

    def _run_one(self, module: Any, tensordict: Any, **kwargs: Any) -> Any:
        try:
            if self.partial_tolerant:
                return self._run_module(module, tensordict, **kwargs)
            return module(tensordict, **kwargs)
        except Exception as err:
            note = getattr(err, "add_note", None)
            if note is not None:  # Python 3.11 and later
                note(
                    f"Failed while running module {self._named(module)!r} of {type(self).__name__}."
                )
            raise

    def _run_extraction(self, extraction: Extraction, tensordict: Any, kind: Any) -> Any:
        """Runs all modules, the last two as one where the kernels serve the call."""
        if kind is None and current_type() is None:
            with in_this_thread(self._default_type()):
                return self._run_extraction(extraction, tensordict, None)
        *first, module, head = self._plan()[0]
        for earlier in first:
            tensordict = self._run_one(earlier, tensordict, **_as(kind, earlier))
        done = self._run_one(extraction, tensordict, **_as(kind, head))
        if done is not None:
            return done
        tensordict = self._run_one(module, tensordict)
        return self._run_one(head, tensordict, **_as(kind, head))

    def get_dist(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        **kwargs: Any,
    ) -> D.Distribution:
        """The distribution that the sequence gives for an input.

        Args:
            tensordict: the input.
            tensordict_out: where the modules before the last one write.
            **kwargs: not supported, as upstream.

        Returns:
            that of the last module. With `return_composite`, a `CompositeDistribution` of all
            probabilistic modules, each conditioned on the samples before it; the input is not
            written to then.

        Raises:
            RuntimeError: if no module is probabilistic.
        """
        if not self.return_composite:
            params = self.get_dist_params(tensordict, tensordict_out, **kwargs)
            last = self._last_module
            if isinstance(last, _upstream.ProbabilisticTensorDictSequential):
                # Its own modules have not run yet.
                return last.get_dist(params)
            return self.build_dist_from_params(params)
        current: Any = tensordict.copy()
        dists: dict[NestedKey, D.Distribution] = {}
        modules = self._modules_now()
        for i, module in enumerate(modules):
            if not isinstance(module, _HEADS):
                current = self._run_one(module, current)
                continue
            dist = module.get_dist(current)
            if i < len(modules) - 1:
                current = self._sampled(module, dist, current)
            if isinstance(dist, _UpstreamComposite):
                dists.update(dist.dists)
            else:
                dists[module.out_keys[0]] = dist
        if not dists:
            raise RuntimeError(
                f"{type(self).__name__} has no probabilistic module, so that it has no distribution"
            )
        return CompositeDistribution.adopt(CompositeDistribution.from_distributions(current, dists))

    def _sampled(self, module: Any, dist: D.Distribution, current: Any) -> Any:
        """`current` with a sample of an intermediate distribution, for the modules after it."""
        interaction = current_type()
        if interaction is None:
            interaction = module.default_interaction_type
        shape = module.num_samples or EMPTY
        stream = getattr(module, "_stream", None)
        generator = successor = None
        if stream is not None:
            generator, successor = stream.open(current, module.in_keys)
        n = getattr(module, "n_empirical_estimate", 1000)
        value, _ = take(dist, interaction, shape, generator, False, n)
        if isinstance(value, dict):
            items = list(value.items())
        elif is_tensor_collection(value):
            items = leaves(value)
        else:
            values = (value,) if isinstance(value, Tensor) else value
            items = list(zip(module.dist_sample_keys, values, strict=True))
        if shape:
            current = current.expand(shape + current.shape)
        write(current, items, module)
        if stream is not None and successor is not None:
            stream.close((current,), generator, successor)
        return current

    def log_prob(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        *,
        dist: D.Distribution | None = None,
        **kwargs: Any,
    ) -> Any:
        """Log-probability of the values that the tensordict holds.

        Args:
            tensordict: the input of the sequence, and the values under the sampled keys.
            tensordict_out: where the log-probability is also written; the input is not written to
                then.
            dist: the distribution, if it was built already.
            **kwargs: handed to the last module's `log_prob`.

        Returns:
            `[*batch]`, in nats, of the last module. With `return_composite` or a
            `CompositeDistribution`, what that gives: a tensordict with an entry for each component,
            or their sum under `set_composite_lp_aggregate(True)`.
        """
        source = tensordict if tensordict_out is None else tensordict.copy()
        if dist is None:
            dist = self.get_dist(source)
        if self.return_composite and isinstance(dist, _UpstreamComposite):
            result = dist.log_prob(source, **kwargs)
            if tensordict_out is not None and is_tensor_collection(result):
                tensordict_out.update(result)
            return result
        last = self._last_module
        if tensordict_out is None:
            return last.log_prob(source, dist=dist, **kwargs)
        if isinstance(last, ProbabilisticTensorDictModule):
            return last.log_prob(source, tensordict_out, dist=dist, **kwargs)
        result = last.log_prob(source, dist=dist, **kwargs)
        if is_tensor_collection(result):
            tensordict_out.update(result)
        else:
            write(tensordict_out, [(last.log_prob_key, result)], self)
        return result

    # calls ----------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs all modules.

        Signature: `forward(tensordict, tensordict_out=None, *, interaction_type=None, **kwargs)`.
        Also callable with the inputs themselves, as keywords or in the order of `in_keys`.

        Args:
            *args: the input tensordict, to which the results are written, and where they are
                written instead.
            **kwargs: `interaction_type`, how values are taken in this call, whatever
                `set_interaction_type` and the modules' defaults say; the others are handed to the
                modules that are not probabilistic, with `return_composite`.

        Returns:
            the tensordict that was written to.
        """
        if args:
            if type(args[0]) is TensorDict or is_tensor_collection(args[0]):
                return self._call(*args, **kwargs)
        elif is_tensor_collection(kwargs.get("tensordict")):
            return self._call(**kwargs)
        return self._dispatched(*args, **kwargs)

    def _call(
        self,
        tensordict: Any,
        tensordict_out: Any = None,
        *,
        interaction_type: InteractionType | str | None = None,
        **kwargs: Any,
    ) -> Any:
        if interaction_type is None:
            return self._run(tensordict, tensordict_out, None, kwargs)
        kind = read_type(interaction_type, "interaction_type")
        with in_this_thread(kind):
            return self._run(tensordict, tensordict_out, kind, kwargs)

    def _run(self, tensordict: Any, tensordict_out: Any, kind: Any, kwargs: dict[str, Any]) -> Any:
        if skips_existing() and can_skip(self, tensordict):
            return tensordict
        current = tensordict
        if tensordict_out is not None or self._select_before_return:
            current = tensordict.copy()
        modules, sample = self._plan()
        if kwargs:
            # A sequence around this one, where the value is there already.
            sample = kwargs.pop("_requires_sample", True) and sample
        if self.return_composite:
            for module in modules:
                if isinstance(module, _upstream.ProbabilisticTensorDictModule):
                    current = self._run_one(
                        module, current, _requires_sample=sample, **_as(kind, module)
                    )
                else:
                    current = self._run_one(module, current, **kwargs, **_as(kind, module))
        else:
            extraction = self.__dict__["_extraction"]
            if extraction is not None and sample and not kwargs and not self.partial_tolerant:
                current = self._run_extraction(extraction, current, kind)
            else:
                if kind is None or kwargs:
                    current = self.get_dist_params(current, **kwargs)
                else:
                    current = self._run_det(current, kind)
                # Said only where it is not the default: a sequence of upstream's does not take it.
                only_score = {} if sample else {"_requires_sample": False}
                current = self._run_one(
                    modules[-1], current, **only_score, **_as(kind, modules[-1])
                )
        if self.inplace is True:
            tensordict_out = tensordict
        elif self.inplace is False:
            tensordict_out = TensorDict()
        elif self.inplace == "empty":
            tensordict_out = tensordict.empty()
        if tensordict_out is not None:
            tensordict_out.update(current, keys_to_update=self.out_keys)
            return tensordict_out
        if self._select_before_return:
            # Entries of the input that a module has replaced are part of the result as well.
            keys = list(self.out_keys)
            keys.extend(k for k in tensordict.keys(True, True) if k not in keys)
            return tensordict.update(current, keys_to_update=keys)
        return current

    _dispatched = dispatch(auto_batch_size=False)(_call)
    forward.__signature__ = inspect.signature(_call)  # type: ignore[attr-defined]
