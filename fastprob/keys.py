"""Rules for the in, out and log-prob keys of a probabilistic module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tensordict import unravel_key
from tensordict.nn import utils as _nn_utils
from tensordict.utils import NestedKey

# What `set_composite_lp_aggregate` sets.
_aggregate_switch = _nn_utils._composite_lp_aggregate

if hasattr(_aggregate_switch, "get_thread_mode"):
    # tensordict 0.15: each thread may have a switch of its own.
    aggregate_mode = _aggregate_switch.get_mode
else:

    def aggregate_mode() -> bool | str | None:
        """What the switch was set to, None for never; without tensordict 0.14's lock (1 us)."""
        return _aggregate_switch._mode


SUM_KEY = "sample_log_prob"


def composite_switch() -> bool | None:
    """The state of `set_composite_lp_aggregate`: True, False, or None where nobody has set it.

    tensordict's own `composite_lp_aggregate()` answers False in the last two cases alike.
    """
    mode = aggregate_mode()
    return None if mode is None else bool(mode)


def with_suffix(key: NestedKey, suffix: str) -> NestedKey:
    """`key` with `suffix` appended to its last part."""
    if isinstance(key, str):
        return key + suffix
    return (*key[:-1], with_suffix(key[-1], suffix))


def read_in_keys(
    in_keys: NestedKey | Sequence[NestedKey] | dict[str, NestedKey], owner: str
) -> tuple[list[Any], list[Any]]:
    """Splits `in_keys` into the tensordict's keys and the distribution's keywords.

    Args:
        in_keys: a key, a list of keys, or a dictionary from keywords to keys.
        owner: class name for messages.

    Returns:
        keys of the tensordict, and the keys whose last part is the keyword.

    Raises:
        ValueError: if a dictionary has a keyword that is no string.
        TypeError: if `in_keys` is none of the three.
    """
    if isinstance(in_keys, str):
        in_keys = [in_keys]
    elif isinstance(in_keys, tuple):
        # A tuple of strings is one nested key, upstream's reading as well.
        in_keys = [in_keys] if all(isinstance(k, str) for k in in_keys) else list(in_keys)
    if isinstance(in_keys, dict):
        for keyword in in_keys:
            if not isinstance(keyword, str):
                raise ValueError(
                    f"{owner} expects the keys of a dictionary of in_keys to be keywords of the "
                    f"distribution, which are strings; got {keyword!r} of type "
                    f"{type(keyword).__name__} in {in_keys}"
                )
        return [unravel_key(k) for k in in_keys.values()], list(in_keys)
    try:
        keys = [unravel_key(k) for k in in_keys]
    except (TypeError, RuntimeError):
        raise TypeError(
            f"{owner} expects in_keys to be a key, a list of keys or a dictionary from "
            f"distribution keywords to keys, got {in_keys!r}"
        ) from None
    return keys, keys


def read_out_keys(out_keys: Any, owner: str) -> list[NestedKey]:
    """`out_keys` as a list of unravelled keys.

    Raises:
        TypeError: if `out_keys` is neither a key nor a list of keys.
    """
    if isinstance(out_keys, str) or (
        isinstance(out_keys, tuple) and out_keys and all(isinstance(k, str) for k in out_keys)
    ):
        out_keys = [out_keys]
    try:
        return [unravel_key(k) for k in out_keys]
    except (TypeError, RuntimeError):
        raise TypeError(
            f"{owner} expects out_keys to be a key or a list of keys, got {out_keys!r}"
        ) from None


class LogProbKeys:
    """Where the log-probabilities go, settled at construction.

    | aggregate switch | sampled keys | per-key entries         | sum                 |
    |------------------|--------------|-------------------------|---------------------|
    | not set          | 1            | `log_prob_key`, or      | the same entry      |
    |                  |              | `"sample_log_prob"`     |                     |
    | not set          | several      | `"<key>_log_prob"`      | `"sample_log_prob"` |
    | False            | any          | `"<key>_log_prob"`      | none                |
    | True             | any          | none of its own         | `"sample_log_prob"` |

    Attributes:
        aggregate: the switch as a boolean at construction, for noticing a change.
        only: the single key of a log-probability, or None where there are several and no sum.
        each: one key per sampled key, or None where only the sum has one.
        total: the key of the sum, or None where there is none.
    """

    def __init__(
        self,
        sample_keys: list[NestedKey],
        log_prob_key: NestedKey | None,
        log_prob_keys: Sequence[NestedKey] | None,
        owner: str,
    ) -> None:
        switch = composite_switch()
        self.owner = owner
        self.aggregate = bool(switch)
        one = len(sample_keys) == 1
        if log_prob_key is not None:
            log_prob_key = unravel_key(log_prob_key)
        if log_prob_keys is not None:
            if isinstance(log_prob_keys, str):
                log_prob_keys = [log_prob_keys]
            if switch:
                raise RuntimeError(
                    f"{owner} got log_prob_keys={log_prob_keys} while composite_lp_aggregate is "
                    "True: the log-probabilities are summed into one entry then, which "
                    "log_prob_key names. Pass log_prob_key, or call "
                    "set_composite_lp_aggregate(False).set()."
                )
            log_prob_keys = [unravel_key(k) for k in log_prob_keys]
            if len(log_prob_keys) != len(sample_keys):
                raise ValueError(
                    f"{owner} expects one log_prob_keys entry for each of the {len(sample_keys)} "
                    f"sampled keys {sample_keys}, got {len(log_prob_keys)}: {log_prob_keys}"
                )
        if log_prob_key is not None and not one and switch is False:
            raise RuntimeError(
                f"{owner} got log_prob_key={log_prob_key!r} for the sampled keys {sample_keys} "
                "while composite_lp_aggregate is False: each sampled key has an entry of its own "
                "then. Pass log_prob_keys, or call set_composite_lp_aggregate(True).set()."
            )
        self.each: list[NestedKey] | None
        self.total: NestedKey | None
        if switch:
            self.each, self.total = None, SUM_KEY if log_prob_key is None else log_prob_key
        elif one:
            if log_prob_keys is not None:
                key = log_prob_keys[0]
            elif log_prob_key is not None:
                key = log_prob_key
            else:
                key = SUM_KEY if switch is None else with_suffix(sample_keys[0], "_log_prob")
            self.each, self.total = [key], None
        else:
            self.each = (
                [with_suffix(k, "_log_prob") for k in sample_keys]
                if log_prob_keys is None
                else list(log_prob_keys)
            )
            self.total = None
            if switch is None:
                self.total = SUM_KEY if log_prob_key is None else log_prob_key
        # The key of a lone tensor's log-probability; None where there is no such key.
        self.only = self.total
        if self.only is None and self.each is not None and one:
            self.only = self.each[0]

    @classmethod
    def resolved(
        cls,
        each: Sequence[NestedKey] | None,
        total: NestedKey | None,
        aggregate: bool,
        owner: str,
    ) -> LogProbKeys:
        """The keys that another module has settled already.

        Args:
            each: one key per sampled key, or None where only the sum has one.
            total: the key of the sum, or None where there is none.
            aggregate: the switch when they were settled.
            owner: class name for messages.
        """
        self = cls.__new__(cls)
        self.owner = owner
        self.aggregate = aggregate
        self.each = None if each is None else [unravel_key(k) for k in each]
        self.total = None if total is None else unravel_key(total)
        self.only = self.total
        if self.only is None and self.each is not None and len(self.each) == 1:
            self.only = self.each[0]
        return self

    def written(self) -> list[NestedKey]:
        """Every key that a scored call is sure to write, in the order of writing."""
        keys = list(self.each or ())
        if self.total is not None and self.total not in keys:
            keys.append(self.total)
        return keys

    def check_unchanged(self, what: str) -> None:
        """Raises if `set_composite_lp_aggregate` was switched since construction.

        Args:
            what: the property or call that was asked for.

        Raises:
            RuntimeError: naming both values.
        """
        now = bool(aggregate_mode())
        if now != self.aggregate:
            raise RuntimeError(
                f"composite_lp_aggregate() was {self.aggregate} when this {self.owner} was built "
                f"and is {now} now, which changes {what}. Build the module and use it under the "
                f"same set_composite_lp_aggregate, here {self.aggregate}."
            )

    def single(self) -> NestedKey:
        """The one key of the log-probability.

        Raises:
            RuntimeError: if there are several and no sum.
        """
        if self.only is not None:
            return self.only
        raise RuntimeError(
            f"this {self.owner} writes one log-probability for each sampled key and no sum, since "
            f"composite_lp_aggregate is False, so that it has no single log_prob_key; use "
            f"log_prob_keys, which are {self.each}"
        )
