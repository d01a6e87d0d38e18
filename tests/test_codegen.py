"""The kernels as machine code: no spills, whole vectors, and no more instructions than planned.

The limits are issue slots for each element, from the designs that the kernels follow. They are
upper bounds; what a kernel takes is printed by `python -m tests.kernels.report`.
"""

from __future__ import annotations

import collections
import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from tests.kernels import machine

HERE = Path(__file__).resolve().parent / "kernels"
CASES = [
    case
    for path in sorted(HERE.glob("codegen_*.py"))
    for case in importlib.import_module(f"tests.kernels.{path.stem}").CASES
]
NVIDIA = [c for c in CASES if c.everywhere or c.nvidia]
EVERYWHERE = [c for c in CASES if c.everywhere]
EXTRACTED = "tanh-normal-draw-8-fp32-span=0-clamp=0-kind=0-extracted"
# Those that are told a number of rows.
COUNTED = [c for c in EVERYWHERE if "rows" in c.types]


def few_rows(case: machine.Case) -> machine.Case:
    """The case as Triton compiles it for less than 2^31 rows."""
    types = {n: "i32" if t == "i64" else t for n, t in case.types.items()}
    return dataclasses.replace(case, types=types)


def test_every_family_with_kernels_is_looked_at():
    kernels = {p.stem for p in (HERE.parents[1] / "kernels").glob("[!_]*.py")}
    assert {p.stem.removeprefix("codegen_") for p in HERE.glob("codegen_*.py")} == kernels


def test_names_are_unique():
    assert len({case.name for case in CASES}) == len(CASES)


def test_every_kernel_is_compiled_for_every_target():
    assert {c.kernel.__name__ for c in CASES} == {c.kernel.__name__ for c in CASES if c.everywhere}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_sm_90(case):
    code = machine.looked_at(case, "sm_90")
    assert (code.stack, code.local) == (0, 0)
    if case.slots is not None:
        assert case.counted
        assert machine.slots_per_element(case, code) <= case.slots
    _check_accesses(case, code)


def _check_accesses(case, code):
    loads, stores = case.accesses
    assert code.widths["LDG.128"] >= loads
    assert code.widths["STG.128"] >= stores
    if case.narrow is not None:
        loads, stores = case.narrow
        assert _narrow(code, "LDG") <= loads
        assert _narrow(code, "STG") <= stores
    loads, stores = case.anywhere or (0, 0)
    assert code.all_widths["LDG.128"] >= loads
    assert code.all_widths["STG.128"] >= stores


def _narrow(code, kind):
    wide = {f"{kind}.128", f"{kind}.256"}
    return sum(n for w, n in code.widths.items() if w.startswith(kind) and w not in wide)


# What Beta's draw at A = 257 is made of in 11 chunks with 5 ends of rows, and that with one more
# element read or written by itself, and with a vector less.
@pytest.mark.parametrize(
    ("widths", "good"),
    [
        ({}, True),
        ({"LDG.32": 1}, False),
        ({"STG.32": 7}, False),
        ({"LDG.128": 21}, False),
        ({"STG.128": 10}, False),
    ],
)
def test_the_check_finds_elements_one_at_a_time(widths, good):
    (case,) = [c for c in CASES if c.name == "beta-draw-257-fp32"]
    whole = {"LDG.128": 22, "LDG.64": 2, "STG.128": 11, "STG.32": 6, "STG.64": 1}
    code = machine.Code(1, 0, 0, 1, {}, collections.Counter({**whole, **widths}))
    if good:
        _check_accesses(case, code)
    else:
        with pytest.raises(AssertionError):
            _check_accesses(case, code)


@pytest.mark.parametrize(
    ("one", "several"),
    [
        ("normal-draw-8-fp32-MAP=1-LOC=6-SCALE=6", "normal-draw-8-fp32-MAP=1-LOC=7-SCALE=7"),
        (EXTRACTED, f"{EXTRACTED}-several"),
    ],
)
def test_tiles_behind_the_first_sample_store_no_scale(one, several):
    found = {case.name: case for case in CASES}
    stores = [machine.looked_at(found[name], "sm_90").widths["STG.128"] for name in (one, several)]
    assert stores == [8, 4]


@pytest.mark.parametrize("target", ["sm_80", "sm_100"])
@pytest.mark.parametrize("case", NVIDIA, ids=lambda case: case.name)
def test_other_nvidia(case, target):
    code = machine.looked_at(case, target)
    assert (code.stack, code.local) == (0, 0)
    _check_accesses(case, code)


@pytest.mark.parametrize("case", EVERYWHERE, ids=lambda case: case.name)
def test_amd(case):
    assert machine.amd_spills(machine.compiled(case, "gfx942")) == 0


@pytest.mark.parametrize("case", COUNTED, ids=lambda case: case.name)
def test_a_batch_of_more_than_2_to_the_31_elements_has_an_end(case):
    """Triton passes a number of rows below 2^31 in 32 bits; times the row's size it takes 64."""
    code = machine.compiled(few_rows(case), "sm_90").asm["ttir"]
    assert not re.search(r"muli %(total_)?rows\b.*: i32\b", code)


def narrow_addresses(ttir: str) -> set[str]:
    """What is done with a program's number but to widen it, compare it or take its low bits."""
    found = set()
    for name in re.findall(r"(%\w+) = tt.get_program_id", ttir):
        uses = re.findall(rf"= (\S+) [^=\n]*{name}\b", ttir)
        found |= set(uses) - {"arith.extsi", "arith.cmpi", "arith.andi"}
    return found


@pytest.mark.parametrize("case", EVERYWHERE, ids=lambda case: case.name)
def test_addresses_have_64_bits(case):
    """More than 2^31 elements: what begins with the program's number is int64 from there on."""
    assert narrow_addresses(machine.compiled(case, "sm_90").asm["ttir"]) == set()


def test_the_check_finds_an_address_of_32_bits():
    wide = "%p = tt.get_program_id x : i32\n%q = arith.extsi %p : i32 to i64\n"
    assert narrow_addresses(wide) == set()
    assert narrow_addresses(wide + "%s = arith.muli %p, %c : i32\n") == {"arith.muli"}


def handed_on(ttir: str) -> set[int]:
    """How many values the loops hand from turn to turn."""
    return {len(m.split(", ")) for m in re.findall(r"scf\.for .*? iter_args\((.*?)\) -> ", ttir)}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        # Ten inputs and two results, of which two halves wait; 13 and 2, of which four quarters do.
        (
            "truncated-normal-draw-backward-8-bf16-tensors=True-clamp=2-entropy=True-kind=0",
            {10 + 2 * 2, 13 * 4 + 2 * 4},
        ),
        # Sums, row and its end from chunk to chunk; three inputs, and two results of two halves.
        ("beta-draw-257-bf16-entropy", {4, 3 + 2 * 2}),
    ],
)
def test_a_loop_of_halves_hands_on_every_one_that_waits(name, counts):
    """Triton takes a variable for unchanged where its first value is the one that it gets."""
    (case,) = [c for c in CASES if c.name == name]
    assert handed_on(machine.compiled(case, "sm_90").asm["ttir"]) == counts


def test_the_count_finds_what_a_loop_hands_on():
    head = "%x:2 = scf.for %i = %a to %b step %c iter_args(%p = %u, %q = %v) -> (f32, f32)"
    assert handed_on(head) == {2}


LOOP = [
    (0x00, "MOV R1, R2"),
    (0x10, "FADD R1, R1, R1"),
    (0x20, "@!P0 BRA 0x40"),
    (0x30, "MUFU.RCP R1, R1"),
    (0x40, "FADD R1, R1, R1"),
    (0x50, "@P1 BRA 0x10"),
    (0x60, "EXIT"),
]


def test_a_turn_of_a_loop_goes_from_its_branch_to_the_branch_target():
    way = machine.shortest_path(LOOP)
    assert [LOOP[i][0] for i in way] == [0x00, 0x10, 0x20, 0x40, 0x50, 0x60]
    turn = machine.innermost_turn(LOOP, way)
    assert [text.split()[-1] for text in turn] == ["R1", "0x40", "R1", "0x10"]
    assert machine.innermost_turn(LOOP[:5] + LOOP[6:], [0, 1, 2, 4, 5]) == []


def test_the_turn_is_that_of_the_innermost_loop_that_takes_the_most_of_the_way():
    listing = [
        (0x00, "LDG.E.128 R4, [R2]"),
        (0x10, "FADD R1, R1, R1"),
        (0x20, "MUFU.RCP R1, R1"),
        (0x30, "@P0 BRA 0x10"),
        (0x40, "STG.E [R8], R4"),
        (0x50, "@P1 BRA 0x40"),
        (0x60, "@P2 BRA 0x00"),
        (0x70, "EXIT"),
    ]
    way = machine.shortest_path(listing, ["LDG.128", "LDG.128", "STG.32"])
    # Two turns of the outer loop, and in each one of the loop in it.
    inner = [listing[i][1] for i in (1, 2, 3)]
    assert machine.innermost_turn(listing, way) == inner * 2
    # A loop in which threads wait for each other, and one in which they do not, which is shorter.
    listing[1:3] = [(0x10, "BAR.SYNC 0x0"), (0x20, "MUFU.RCP R1, R1")]
    listing[4] = (0x40, "FADD R1, R1, R1")
    way = machine.shortest_path(listing, ["LDG.128", "LDG.128"])
    assert machine.innermost_turn(listing, way) == [listing[i][1] for i in (4, 5)] * 2


def test_the_shortest_way_leaves_out_a_slow_path():
    way = machine.shortest_way(
        [
            (0x00, "MOV R1, R2"),
            (0x10, "@!P0 BRA 0x50"),
            (0x20, "FADD R1, R1, R1"),
            (0x30, "FADD R1, R1, R1"),
            (0x40, "BRA 0x50"),
            (0x50, "STG.E.128 [R2], R4"),
            (0x60, "EXIT"),
        ]
    )
    assert [text.split()[0] for text in way] == ["MOV", "@!P0", "STG.E.128", "EXIT"]


def test_a_way_goes_through_what_a_case_names():
    listing = [
        (0x00, "@P0 BRA 0x50"),
        (0x10, "MOV R1, R2"),
        (0x20, "LDG.E.128 R4, [R2]"),
        (0x30, "STG.E.128 [R2], R4"),
        (0x40, "BRA 0x70"),
        (0x50, "LDG.E R4, [R2]"),
        (0x60, "STG.E [R2], R4"),
        (0x70, "EXIT"),
    ]
    short, long = [0x00, 0x50, 0x60, 0x70], [0x00, 0x10, 0x20, 0x30, 0x40, 0x70]

    def way(through):
        return [listing[i][0] for i in machine.shortest_path(listing, through)]

    assert way(()) == short
    assert way(("LDG.128",)) == way(("STG.128",)) == way(("LDG.128", "STG.128")) == long
    # Nothing of that kind: the shortest way of all.
    assert way(("LDG.64",)) == short
    assert way(("LDG.64", "STG.128")) == long


def test_a_way_goes_through_all_that_a_case_names_in_its_order():
    listing = [
        (0x00, "LDG.E.128 R4, [R2]"),
        (0x10, "@P0 BRA 0x30"),
        (0x20, "STG.E [R8], R4"),
        (0x30, "@P1 BRA 0x00"),
        (0x40, "EXIT"),
    ]

    def way(*through):
        return [listing[i][0] for i in machine.shortest_path(listing, through)]

    assert way("LDG.128") == [0x00, 0x10, 0x30, 0x40]
    assert way("LDG.128", "STG.32") == [0x00, 0x10, 0x20, 0x30, 0x40]
    # Around the loop once more, for a load behind the store.
    assert way("STG.32", "LDG.128") == [0x00, 0x10, 0x20, 0x30, 0x00, 0x10, 0x30, 0x40]
