"""ProbabilisticTensorDictModule, the probabilistic head of a policy."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection, unravel_key
from tensordict.nn import CompositeDistribution as _UpstreamComposite
from tensordict.nn import InteractionType, dispatch
from tensordict.nn import probabilistic as _upstream
from tensordict.utils import NestedKey
from torch import Tensor, nn
from torch import distributions as D

from fastprob.calls import Called
from fastprob.counter import CounterStream
from fastprob.direct import Straight
from fastprob.distributions import CompositeDistribution, Delta, recognize, resolve
from fastprob.distributions._base import EMPTY, MEAN, MEDIAN, MODE, RANDOM, Fused
from fastprob.distributions.composite import sum_parts
from fastprob.interaction import current_type, read_type, take
from fastprob.io import Items, as_dict, can_skip, leaves, repeat, skips_existing, write
from fastprob.keys import LogProbKeys, aggregate_mode, read_in_keys, read_out_keys, with_suffix
from fastprob.streams import Stream

# Stands for an argument that was not given: the positional ones may be the parameters themselves.
_UNSET: Any = object()
_is_compiling = torch.compiler.is_compiling
# The entry of a generator's state in a state_dict.
_STATE_KEY = "generator_state"
Projections = Mapping[NestedKey, Callable[[Tensor], Tensor]]


def _draws(dist: D.Distribution, interaction: InteractionType) -> bool:
    """Whether a value may need noise: a random one, or a mean without a closed form."""
    if interaction is RANDOM or interaction is MODE or interaction is MEDIAN:
        return interaction is RANDOM
    if isinstance(dist, _UpstreamComposite):
        return any(_draws(part, interaction) for part in dist.dists.values())
    return not isinstance(dist, Fused)


class ProbabilisticTensorDictModule(_upstream.ProbabilisticTensorDictModule, Called):
    """The probabilistic head of a policy, as one operation a call.

    Reads the parameters of a distribution from a tensordict, takes a value by the interaction type,
    scores it if asked to, and writes both. A drop-in for `tensordict.nn`'s class of the same name,
    and a subclass of it.

    Args:
        in_keys: keys of the parameters. A key or a list of keys, whose last parts are the
            distribution's keywords, or a dictionary from keywords to keys.
        out_keys: keys of the sampled values. May be left out for a `CompositeDistribution`, which
            names them itself.
        default_interaction_type: how the value is taken where `set_interaction_type` says nothing.
        default_interaction_mode: deprecated name of `default_interaction_type`.
        distribution_class: a distribution class, a callable that builds a distribution, or the name
            of one of `fastprob.distributions`.
        distribution_kwargs: further keywords of the distribution, as a dictionary, or as
            `TensorDictParams` for tensors that follow the module's device and dtype.
        return_log_prob: whether the log-probability is written as well.
        log_prob_keys: one key of the log-probability for each sampled key.
        log_prob_key: key of the log-probability. Default `"sample_log_prob"`; `"<key>_log_prob"`
            where `set_composite_lp_aggregate(False)` was called.
        cache_dist: whether the parameters are written next to the sample, which matters where the
            output is another tensordict than the input.
        n_empirical_estimate: number of draws for the mean of a distribution without a closed form.
        num_samples: leading dimensions of the sample, an int or a shape. The output tensordict gets
            them in front of its batch size. Deterministic values are repeated.
        generator: source of the noise: a `torch.Generator` or a `CounterStream`, advanced in
            place; an int, the seed of a generator of the module's own; or a key of the tensordict
            that holds a generator or a scalar seed, whose successor is written back. None for
            torch's default generator. The same numbers are drawn under `torch.compile`, where a key
            must hold a tensor. The state of a generator, given or of the module's own, is the entry
            `generator_state` of the module's `state_dict`; a `CounterStream` is a child,
            `counter_stream`.

    Raises:
        ValueError: for an unknown interaction type, an unknown distribution name, or a log-prob key
            equal to a sampled key.
        TypeError: for arguments of a wrong type.

    Shapes: parameters `[*batch, *event]` broadcast together; the value is
    `[*num_samples, *batch, *event]` and the log-probability `[*num_samples, *batch]`, in nats.

    Source: the documentation of tensordict's `ProbabilisticTensorDictModule`.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from fastprob import ProbabilisticTensorDictModule, set_interaction_type
        >>> head = ProbabilisticTensorDictModule(
        ...     in_keys=["loc", "scale"],
        ...     out_keys=["action"],
        ...     distribution_class=torch.distributions.Normal,
        ...     return_log_prob=True,
        ... )
        >>> td = TensorDict(loc=torch.zeros(3), scale=torch.ones(3), batch_size=[3])
        >>> with set_interaction_type("random"):
        ...     td = head(td)
        >>> sorted(td.keys())
        ['action', 'loc', 'sample_log_prob', 'scale']
    """

    # What `safe=True` adds: the projection of each sampled key. None costs one test a call.
    _projections: Projections | None = None

    # The straight call of this configuration, or None; worked out at the end of construction.
    _straight: Straight | None = _UNSET

    # Whether a stream's state is part of the state_dict; not where it keeps upstream's keys.
    _saves_stream: bool = True

    _build: Callable[..., Any]  # what distribution_class resolves to

    def __init__(
        self,
        in_keys: NestedKey | Sequence[NestedKey] | dict[str, NestedKey],
        out_keys: NestedKey | Sequence[NestedKey] | None = None,
        *,
        default_interaction_type: InteractionType | str | None = None,
        default_interaction_mode: InteractionType | str | None = None,
        distribution_class: type | Callable[..., D.Distribution] | str = Delta,
        distribution_kwargs: Any = None,
        return_log_prob: bool = False,
        log_prob_keys: Sequence[NestedKey] | None = None,
        log_prob_key: NestedKey | None = None,
        cache_dist: bool = False,
        n_empirical_estimate: int = 1000,
        num_samples: int | Sequence[int] | None = None,
        generator: torch.Generator | CounterStream | int | NestedKey | None = None,
    ) -> None:
        # Past the constructor of tensordict's class, whose rules for keys are the other ones.
        super(_upstream.ProbabilisticTensorDictModule, self).__init__()
        owner: str = type(self).__name__  # type: ignore[assignment]
        if default_interaction_mode is not None:
            if default_interaction_type is not None:
                raise TypeError(
                    "default_interaction_mode is the deprecated name of default_interaction_type; "
                    "pass only default_interaction_type"
                )
            warnings.warn(
                "default_interaction_mode is deprecated, use default_interaction_type",
                DeprecationWarning,
                stacklevel=2,
            )
            default_interaction_type = default_interaction_mode
        self.default_interaction_type = read_type(
            InteractionType.MODE if default_interaction_type is None else default_interaction_type,
            "default_interaction_type",
        )
        self.distribution_kwargs = {} if distribution_kwargs is None else distribution_kwargs
        self.distribution_class = distribution_class
        self.in_keys, self.dist_keys = read_in_keys(in_keys, owner)
        if out_keys is None:
            out_keys = self._infer_out_keys()
        self._out_keys = read_out_keys(out_keys, owner)
        self._lp = LogProbKeys(self._out_keys, log_prob_key, log_prob_keys, owner)
        if return_log_prob:
            for key in self._lp.written():
                if key in self._out_keys:
                    raise ValueError(
                        f"{owner} would write the log-probability under {key!r}, which is a "
                        f"sampled key: out_keys={self._out_keys}. Choose another log_prob_key."
                    )
        self.return_log_prob = return_log_prob
        self.cache_dist = cache_dist
        self.n_empirical_estimate = n_empirical_estimate
        if isinstance(num_samples, (int, torch.SymInt)):
            num_samples = (num_samples,)
        self.num_samples = None if num_samples is None else torch.Size(num_samples)
        self._stream = Stream.read(generator)
        if isinstance(generator, CounterStream):
            # A child, which moves with the module and is saved with it.
            self.counter_stream = generator
        self._dist = None
        self._find_straight()

    # configuration --------------------------------------------------------------------------

    @property
    def distribution_class(self) -> Any:
        """What builds the distribution, as it was given."""
        return self._distribution_class

    @distribution_class.setter
    def distribution_class(self, value: Any) -> None:
        built = resolve(value)
        if isinstance(value, str):
            value = built
        # Not by setattr, which would make children of a module that builds distributions, under
        # names that upstream's state_dict does not have.
        self.__dict__["_distribution_class"] = value
        self.__dict__["_build"] = built

    def _infer_out_keys(self) -> list[NestedKey]:
        if not (isinstance(self._build, type) and issubclass(self._build, _UpstreamComposite)):
            return ["_"]
        kwargs = self.distribution_kwargs
        if "distribution_map" not in kwargs:
            raise KeyError(
                "out_keys can be left out for a CompositeDistribution only if distribution_kwargs "
                f"has a 'distribution_map'; it has the keys {sorted(kwargs)}"
            )
        name_map = kwargs.get("name_map")
        if name_map is None:
            return list(kwargs["distribution_map"])
        name_map = {unravel_key(k): v for k, v in name_map.items()}
        return [name_map.get(unravel_key(k), unravel_key(k)) for k in kwargs["distribution_map"]]

    @property
    def out_keys(self) -> list[NestedKey]:
        """Keys that a call writes: the sampled ones, then those of the log-probability.

        Raises:
            RuntimeError: if `set_composite_lp_aggregate` was switched since construction.
        """
        keys = list(self._out_keys)
        if self.return_log_prob:
            self._lp.check_unchanged("out_keys")
            keys.extend(k for k in self._lp.written() if k not in keys)
        return keys

    @out_keys.setter
    def out_keys(self, value: Sequence[NestedKey]) -> None:
        owner: str = type(self).__name__  # type: ignore[assignment]
        self._out_keys = read_out_keys(value, owner)

    @property
    def log_prob_key(self) -> NestedKey:
        """Key of the log-probability.

        Raises:
            RuntimeError: if there are several and no sum, or `set_composite_lp_aggregate` was
                switched since construction.
        """
        self._lp.check_unchanged("log_prob_key")
        return self._lp.single()

    @property
    def log_prob_keys(self) -> list[NestedKey]:
        """Keys of the log-probability, one for each sampled key, or that of the sum alone.

        Raises:
            RuntimeError: if `set_composite_lp_aggregate` was switched since construction.
        """
        self._lp.check_unchanged("log_prob_keys")
        return [self._lp.total] if self._lp.each is None else list(self._lp.each)  # type: ignore

    @property
    def generator(self) -> torch.Generator | CounterStream | NestedKey | None:
        """The generator of this module, or the key under which the tensordict holds it."""
        stream = self._stream
        if stream is None:
            return None
        return stream.generator if stream.key is None else stream.key

    def _resolve_generator(self, tensordict: Any) -> tuple[Any, Any]:
        """The generator of a call and what writes its successor, as tensordict's sequences ask."""
        stream = self._stream
        if stream is None:
            return None, None
        generator, successor = stream.open(tensordict, self.in_keys)
        if successor is None:
            return generator, None
        return generator, lambda used: stream.close((tensordict,), used, successor)

    # Not by get_extra_state, which would give every module an entry that upstream's has not.
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        stream = self._stream if self._saves_stream else None
        state = None if stream is None else stream.state()
        if state is not None:
            destination[prefix + _STATE_KEY] = state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # Taken out, so that nobody reports it as unexpected. A state_dict without it, as upstream
        # writes them, leaves the stream where it is.
        state = None
        if self._stream is not None and self._stream.key is None:
            state = state_dict.pop(prefix + _STATE_KEY, None)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if state is not None:
            try:
                self._stream.load(state)  # type: ignore[union-attr]
            except ValueError as err:
                args[-1].append(f"{prefix}{_STATE_KEY}: {err}")

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        super()._apply(fn, *args, **kwargs)
        stream = self._stream
        if stream is not None and stream.seed is not None and stream.generator is not None:
            # Where the parameters of the distribution go, its noise has to come from.
            stream.move(fn(torch.empty(0, device=stream.generator.device)).device)
        return self

    # distribution ---------------------------------------------------------------------------

    def get_dist(self, tensordict: TensorDictBase) -> D.Distribution:
        """Builds the distribution from the parameters in a tensordict.

        Args:
            tensordict: holds the parameters under `in_keys`.

        Returns:
            a `torch.distributions.Distribution`. One of fastprob's families for everything that it
            knows.

        Raises:
            KeyError: if a key is missing, naming those that are there.
            TypeError: if the keywords do not match the distribution's.
        """
        if _is_compiling() and type(tensordict) is TensorDict:
            straight = self._straight
            if straight is not None and straight is not _UNSET:
                dist = straight.dist(self, tensordict)
                if dist is not None:
                    return dist
        kwargs: dict[Any, Any] = {}
        direct: Any = tensordict._tensordict if type(tensordict) is TensorDict else None
        for keyword, key in zip(self.dist_keys, self.in_keys, strict=True):
            value = None if direct is None else direct.get(key)
            if not isinstance(value, Tensor):
                # Nested keys, other tensordict classes, non-tensor entries.
                value = tensordict.get(key, None)
                if value is None:
                    self._missing(key, keyword, tensordict)
            kwargs[keyword if isinstance(keyword, str) else keyword[-1]] = value
        static = self.distribution_kwargs
        if type(static) is not dict:
            static = as_dict(static)
        if static:
            kwargs.update(static)
        try:
            dist = self._build(**kwargs)
        except TypeError as err:
            raise self._mismatch(err, kwargs) from err
        return dist if isinstance(dist, Fused) else recognize(dist)

    def build_dist_from_params(self, tensordict: TensorDictBase) -> D.Distribution:
        """The same as `get_dist`, also where a subclass overrides that."""
        return self.get_dist(tensordict)

    def _missing(self, key: NestedKey, keyword: Any, tensordict: Any) -> None:
        """Raises for a missing in-key, unless the distribution can do without it."""
        keyword = keyword if isinstance(keyword, str) else keyword[-1]
        try:
            parameter = inspect.signature(self._build).parameters.get(keyword)
        except (TypeError, ValueError):
            parameter = None
        if parameter is not None and parameter.default is None:
            return
        present = sorted(map(str, tensordict.keys(True, True)))
        raise KeyError(
            f"{type(self).__name__} reads {key!r} for the distribution's {keyword!r}, but the "
            f"tensordict has no such entry; it has {present}"
        )

    def _mismatch(self, err: TypeError, kwargs: dict[str, Any]) -> TypeError:
        text = str(err)
        if "unexpected keyword argument" not in text and "missing" not in text:
            return err
        name = getattr(self._build, "__name__", repr(self._build))
        try:
            accepted = f"it accepts {name}{inspect.signature(self._build)}"
        except (TypeError, ValueError):
            accepted = "its signature is not known"
        return TypeError(
            f"{type(self).__name__} builds {name} with the keywords {sorted(kwargs)} (from "
            f"in_keys={self.in_keys} and distribution_kwargs), which do not match: {text}; "
            f"{accepted}. Name the entries after the distribution's keywords, or pass in_keys as a "
            "dictionary from keywords to entries."
        )

    # calls ----------------------------------------------------------------------------------

    def forward(
        self,
        tensordict: Any = _UNSET,
        tensordict_out: Any = _UNSET,
        _requires_sample: Any = _UNSET,
        *args: Any,
        interaction_type: InteractionType | str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Takes a value, scores it, projects it, and writes it.

        Also callable with the parameters themselves, as keywords or in the order of `in_keys`; it
        returns the tensors under `out_keys` then.

        Args:
            tensordict: holds the parameters; the results are written to it.
            tensordict_out: where the results are written instead.
            _requires_sample: if False, the value is read from the tensordict, and only scored.
            *args: parameters, in a call without a tensordict.
            interaction_type: how the value is taken in this call, whatever `set_interaction_type`
                and the module's default say.
            **kwargs: parameters by name, likewise.

        Returns:
            the tensordict that was written to. With `num_samples`, an expanded one.

        Raises:
            KeyError: if an in-key is missing.
            TypeError: if the keywords do not match the distribution's.
            ValueError: if a checked parameter is out of its domain, a value does not fit the
                spec, or `interaction_type` is none.
            RuntimeError: if a result does not fit the batch size of the tensordict.
        """
        if (
            type(tensordict) is TensorDict
            and tensordict_out is _UNSET
            and _requires_sample is _UNSET
            and interaction_type is None
            and not (args or kwargs)
        ):
            straight = self._straight
            if straight is not None and straight is not _UNSET:
                if _is_compiling():
                    if straight.trace(self, tensordict):
                        return tensordict
                elif not straight.squashed and straight.run(self, tensordict):
                    return tensordict
        elif kwargs or args or not is_tensor_collection(tensordict):
            if interaction_type is not None:
                kwargs["interaction_type"] = interaction_type
            return self._dispatch(tensordict, tensordict_out, _requires_sample, args, kwargs)
        if tensordict_out is _UNSET:
            tensordict_out = None
        if skips_existing() and can_skip(self, tensordict):
            return self._project_existing(tensordict)
        dist = self.get_dist(tensordict)
        return self._sample(dist, tensordict, tensordict_out, _requires_sample, interaction_type)

    def _sample(
        self,
        dist: D.Distribution,
        tensordict: Any,
        tensordict_out: Any = None,
        _requires_sample: Any = _UNSET,
        interaction_type: Any = None,
        parameters: Callable[[], Items] | None = None,
    ) -> Any:
        """What a call does once it has the distribution.

        Args:
            dist: the distribution.
            tensordict: as in `forward`.
            tensordict_out: as in `forward`, None for none.
            _requires_sample: as in `forward`.
            interaction_type: as in `forward`.
            parameters: gives the parameters' entries where the draw makes them, written first.
        """
        score = self.return_log_prob
        keys = self._lp
        if score and bool(aggregate_mode()) is not keys.aggregate:
            keys.check_unchanged("where the log-probability goes")
        out = tensordict if tensordict_out is None else tensordict_out
        if _requires_sample is not _UNSET and not _requires_sample:
            return self._score_existing(dist, tensordict, out)
        if not isinstance(dist, Fused):
            # An overridden get_dist may return any distribution.
            dist = recognize(dist)
        if interaction_type is None:
            interaction = current_type()
            if interaction is None:
                interaction = self.default_interaction_type
        else:
            interaction = read_type(interaction_type, "interaction_type")
        generator = successor = None
        if self._stream is not None and _draws(dist, interaction):
            generator, successor = self._stream.open(tensordict, self.in_keys)
        shape = self.num_samples
        carried = self._projections is not None and self._carry(dist)
        value, log_prob = take(
            dist,
            interaction,
            EMPTY if shape is None else shape,
            generator,
            score,
            self.n_empirical_estimate,
        )
        if carried:
            # The distribution may be one that the user holds.
            dist._bounds_of_value = None  # type: ignore[attr-defined]
        if isinstance(value, Tensor):
            sample_keys = self._out_keys
            items: Items = [
                (sample_keys[0] if len(sample_keys) == 1 else self._sample_key(), value)
            ]
            if score:
                items.append((keys.only or keys.single(), log_prob))
        else:
            items = self._gather(dist, value, log_prob)
        if self._projections is not None and not carried:
            # A mean is of no kind: it lies between the members.
            kind = None if interaction is MEAN else getattr(dist, "_kind", None)
            items = self._project(items, kind)
        if parameters is not None and shape is None:
            items = parameters() + items
        elif parameters is not None:
            # As a module of its own gives them: to the input, which is expanded after that.
            write(out, parameters(), self)
        if self.cache_dist and out is not tensordict:
            found = ((k, tensordict.get(k, None)) for k in self.in_keys)
            # A parameter that the distribution can do without may be missing.
            items.extend((k, repeat(v, shape)) for k, v in found if v is not None)
        if shape is not None:
            out = out.expand(shape + out.shape)
        write(out, items, self)
        if successor is not None:
            expanded = shape is not None and tensordict_out is None
            holders = (tensordict, out) if expanded else (tensordict,)
            self._stream.close(holders, generator, successor)  # type: ignore[union-attr]
        return out

    def _find_straight(self) -> None:
        own = type(self).get_dist is ProbabilisticTensorDictModule.get_dist
        found = Straight.of(self) if own and "get_dist" not in self.__dict__ else None
        self.__dict__["_straight"] = found

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "distribution_class" and isinstance(value, nn.Module):
            # Kept as a child by now, past the property.
            ProbabilisticTensorDictModule.distribution_class.__set__(self, value)
        # Whatever was changed, the straight call is looked for anew; not before there was one.
        if self.__dict__.pop("_straight", _UNSET) is not _UNSET and not _is_compiling():
            self._find_straight()

    def _dispatch(self, first: Any, second: Any, third: Any, rest: tuple, named: dict) -> Any:
        """A call with tensors: the positional ones are parameters, not what `forward` names."""
        if is_tensor_collection(second):
            named["tensordict_out"], second = second, _UNSET
        if isinstance(third, bool):
            named["_requires_sample"], third = third, _UNSET
        given = (a for a in (first, second, third, *rest) if a is not _UNSET)
        return self._dispatched(*given, **named)

    @dispatch(auto_batch_size=False)
    def _dispatched(
        self,
        tensordict: Any,
        tensordict_out: Any = None,
        _requires_sample: bool = True,
        *,
        interaction_type: InteractionType | str | None = None,
    ) -> Any:
        return self.forward(
            tensordict, tensordict_out, _requires_sample, interaction_type=interaction_type
        )

    forward.__signature__ = inspect.signature(_dispatched)  # type: ignore[attr-defined]

    def _sample_key(self) -> NestedKey:
        keys = self._out_keys
        if len(keys) != 1:
            raise ValueError(
                f"{type(self).__name__} has {len(keys)} sampled keys, {keys}, but its distribution "
                "gives one tensor; use one out_key, or a CompositeDistribution"
            )
        return keys[0]

    def _gather(self, dist: D.Distribution, value: Any, log_prob: Any) -> Items:
        """The entries to write for a distribution with several values."""
        if isinstance(value, dict):
            items: Items = list(value.items())
        elif is_tensor_collection(value):
            items = leaves(value)
        else:
            values = tuple(value)
            if len(values) != len(self._out_keys):
                raise ValueError(
                    f"{type(self).__name__} has the sampled keys {self._out_keys}, but its "
                    f"distribution gives {len(values)} values"
                )
            items = list(zip(self._out_keys, values, strict=True))
        if log_prob is None:
            return items
        return items + self._score_items(dist, log_prob, len(self.num_samples or ()))

    def _score_items(self, dist: D.Distribution, log_prob: Any, sample_ndim: int = 0) -> Items:
        """The log-prob entries to write: one, or one for each component and their sum.

        Args:
            dist: the distribution.
            log_prob: a tensor; a dictionary from component names to tensors; or a tensordict, whose
                keys are taken as they are.
            sample_ndim: number of leading sample dimensions.
        """
        if isinstance(log_prob, Tensor):
            return [(self._lp.single(), log_prob)]
        if isinstance(log_prob, dict):
            each = self._lp.each
            names = {} if each is None else dict(zip(self._out_keys, each, strict=True))
            items: Items = [
                (names.get(k) or with_suffix(k, "_log_prob"), v) for k, v in log_prob.items()
            ]
        else:
            items = leaves(log_prob)
        if self._lp.total is not None:
            ndim = sample_ndim + len(dist.batch_shape)
            items.append((self._lp.total, sum_parts([v for _, v in items], ndim)))
        return items

    def _carry(self, dist: D.Distribution) -> bool:
        """Whether the kernel that gives the value projects it as well."""
        return False

    def _project(self, items: Items, kind: Any = None) -> Items:
        """The entries, those with a projection projected.

        Args:
            items: keys and values.
            kind: what the values are known to be, see `Fused._kind`.
        """
        projections = self._projections
        assert projections is not None
        return [(k, projections[k](v) if k in projections else v) for k, v in items]

    def _existing_projected(self, tensordict: Any) -> Items:
        """The values under the sampled keys, projected; those that are missing are left out."""
        if self._projections is None:
            return []
        found = ((k, tensordict.get(k, None)) for k in self._projections)
        return self._project([(k, v) for k, v in found if v is not None])

    def _project_existing(self, tensordict: Any) -> Any:
        items = self._existing_projected(tensordict)
        if items:
            write(tensordict, items, self)
        return tensordict

    def _score_existing(self, dist: D.Distribution, tensordict: Any, out: Any) -> Any:
        """Scores the value that an earlier module has written, and projects it."""
        items: Items = []
        if self.return_log_prob:
            items = self._score_items(dist, self._score(dist, tensordict))
        items.extend(self._existing_projected(tensordict))
        write(out, items, self)
        return out

    def _score(self, dist: D.Distribution, tensordict: Any) -> Any:
        """Scores the values under the sampled keys: a tensor, or a dictionary of them."""
        if isinstance(dist, _UpstreamComposite):
            return CompositeDistribution.adopt(dist).score_parts(tensordict)
        values = []
        for key in self._out_keys:
            value = tensordict.get(key, None)
            if value is None:
                raise KeyError(
                    f"{type(self).__name__} scores {key!r}, but the tensordict has no such entry; "
                    f"it has {sorted(map(str, tensordict.keys(True, True)))}"
                )
            values.append(value)
        return dist.log_prob(*values)

    def log_prob(
        self,
        tensordict: TensorDictBase,
        tensordict_out: TensorDictBase | None = None,
        *,
        dist: D.Distribution | None = None,
    ) -> Any:
        """Log-probability of the values that the tensordict holds under the sampled keys.

        Args:
            tensordict: holds the parameters and the values.
            tensordict_out: where the log-probability is also written.
            dist: the distribution, if it was built already.

        Returns:
            `[*batch]`, in nats. For a `CompositeDistribution`, a tensordict with an entry for each
            component, or their sum under `set_composite_lp_aggregate(True)`.

        Raises:
            KeyError: if a parameter or a value is missing.
            RuntimeError: if `set_composite_lp_aggregate` was switched since construction.
        """
        if dist is None:
            dist = self.get_dist(tensordict)
        scores = self._score(dist, tensordict)
        if isinstance(scores, Tensor):
            if tensordict_out is not None:
                write(tensordict_out, [(self.log_prob_key, scores)], self)
            return scores
        self._lp.check_unchanged("what log_prob returns")
        items = self._score_items(dist, scores)
        if tensordict_out is not None:
            write(tensordict_out, items, self)
        if self._lp.each is None:
            # Aggregate mode also writes the components' entries to the input, as upstream does.
            write(tensordict, items[:-1], self)
            return items[-1][1]
        if self._lp.total is not None:
            # Whoever sums the entries must not count the sum as one of them.
            items = items[:-1]
        result = tensordict.empty()
        write(result, items, self)
        return result
