"""A `Case` says everything about one configuration; `cases` draws them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from tensordict.nn import InteractionType

from tests._fuzz.families import (
    COMPONENTS,
    DETERMINISTIC,
    FAMILIES,
    FUSED,
    GENERAL,
    MEAN,
    MEDIAN,
    MODE,
    RANDOM,
    Family,
)

TYPES = (RANDOM, MODE, MEDIAN, MEAN, DETERMINISTIC)
HALVES = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration. `None` in an option is its default."""

    names: tuple[str, ...]  # families: one, or the components of a composite
    variants: tuple[int, ...]
    library: str
    given: str  # whose class the module of fastprob gets
    batch: tuple[int, ...]
    event: int
    dtype: torch.dtype
    even: bool
    grad: bool
    seed: int
    nested: bool  # in-keys
    mapping: bool  # in-keys as a dictionary
    out_key: Any
    name_map: bool
    default_type: InteractionType | None
    global_type: InteractionType | None
    log_prob: bool
    log_prob_key: Any
    aggregate: bool | None
    num_samples: Any
    generator: str | None
    spec: str | None  # whose spec the module of fastprob gets
    safe: bool
    wide: bool  # whether the spec's bounds hold all values
    out: str | None  # tensordict_out
    sequence: bool
    skip: bool  # set_skip_existing
    present: bool  # the results are there before the call
    cache: bool
    positional: bool  # call with tensors

    @property
    def composite(self) -> bool:
        return len(self.names) > 1

    @property
    def families(self) -> list[Family]:
        return [FAMILIES[n] for n in self.names]

    @property
    def interaction(self) -> InteractionType:
        """The type that counts."""
        return self.global_type or self.default_type or MODE

    @property
    def shape(self) -> torch.Size:
        n = self.num_samples
        return torch.Size(() if n is None else (n,) if isinstance(n, int) else n)

    @property
    def component_names(self) -> list[Any]:
        return ["a", ("n", "b"), "c"][: len(self.names)]

    @property
    def sample_keys(self) -> list[Any]:
        if not self.composite:
            return [self.out_key]
        names = self.component_names
        return [("act", *as_tuple(k)) for k in names] if self.name_map else names

    @property
    def with_tensors(self) -> bool:
        return self.positional and not self.composite

    def has(self, *families: str) -> bool:
        return any(n in families for n in self.names)


def as_tuple(key: Any) -> tuple:
    return (key,) if isinstance(key, str) else key


GENERATORS = ("object", "int", "key_generator", "key_int", "key_tensor")


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """Configurations of which most run, and some must not."""

    def pick(*values):
        return draw(st.sampled_from(values))

    def rarely(likely, *others):
        return draw(st.sampled_from((likely,) * (2 + len(others)) + others))

    composite = rarely(False, True)
    if composite:
        names = tuple(draw(st.lists(st.sampled_from(COMPONENTS), min_size=2, max_size=3)))
    else:
        names = (draw(st.sampled_from(list(FUSED) * 2 + list(GENERAL))),)
    library = pick("tensordict", "torchrl")
    general = names[0] in GENERAL
    families = [FAMILIES[n] for n in names]
    spec = None
    if library == "torchrl" and not composite and families[0].spec:
        spec = rarely(None, "torchrl", "fastprob")
    return Case(
        names=names,
        variants=tuple(draw(st.integers(0, len(f.kwargs) - 1)) for f in families),
        library=library,
        given=pick("upstream", "own"),
        batch=tuple(draw(st.lists(st.sampled_from((3, 2, 1, 0)), max_size=3))),
        event=draw(st.integers(1, 5)),
        dtype=rarely(torch.float32, torch.float64, *(() if general else HALVES)),
        even=rarely(False, False, True),
        grad=pick(False, True),
        seed=draw(st.integers(0, 2**31)),
        nested=rarely(False, True),
        mapping=rarely(False, True),
        out_key=rarely("action", ("agents", "action")),
        name_map=pick(False, True),
        default_type=pick(RANDOM, RANDOM, RANDOM, None, *TYPES),
        global_type=rarely(None, *TYPES),
        log_prob=rarely(True, False),
        log_prob_key=rarely(None, "lp", ("agents", "lp"), "list"),
        aggregate=pick(None, False, True),
        num_samples=rarely(None, 2, 1, (2, 3), ()),
        generator=rarely(None, *GENERATORS) if pick(False, True) else None,
        spec=spec,
        safe=spec is not None and rarely(True, False),
        wide=pick(False, True),
        out=rarely(None, "same", "empty"),
        sequence=rarely(False, True),
        skip=rarely(False, True),
        present=rarely(False, True),
        cache=rarely(False, True),
        positional=rarely(False, False, True),
    )
