"""Kernels as machine code, on a machine without a GPU.

A kernel is compiled ahead of time for a target. For NVIDIA's the assembler and the disassembler
that Triton's package carries tell registers, spills, vector widths and instructions. An issue slot
is an instruction that a warp issues on the shortest way from the entry to the exit, so that slow
paths do not count; slots are given for each element. The shortest way goes through a loop once: a
case says how many turns it has, and each more counts what lies between the branch and its target.
"""

from __future__ import annotations

import collections
import functools
import heapq
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
NVIDIA = ("sm_80", "sm_90", "sm_100")
AMD = ("gfx942",)


@dataclass(frozen=True)
class Case:
    """One specialisation of a kernel.

    Attributes:
        name: what the tests call it.
        kernel: the `triton.jit` function.
        types: types of its arguments, `"*fp32"` or `"i64"`; constants and None are left out.
        constants: its constexpr arguments, and None for pointers that are not given.
        warps: warps of a program.
        elements: elements that a program handles, which exist.
        bytes: bytes that must move for each element.
        slots: most issue slots for each element on sm_90, None where nothing is demanded.
        everywhere: whether it is compiled for every target, not for sm_90 alone.
        nvidia: whether for all of NVIDIA's, at least.
        accesses: 128-bit loads and stores of a thread at the least.
        narrow: loads and stores of fewer bits at the most; None where nothing is demanded.
        anywhere: as `accesses`, in the whole listing, of a kernel with tiles that load or store
            more than those of the shortest way; None where nothing is demanded.
        through: kinds of access that the shortest way has in this order, where there are such: the
            loads of all chunks of wide rows, and the stores of their sums.
        turns: of the innermost loop on the shortest way.
        counted: whether the way is known: not where a kernel goes over a row by several loops.
        registers: most that the assembler may take on NVIDIA's targets; None for its own choice.
        amd: what differs there: constants, and `"warps"`.
    """

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    elements: float
    bytes: float
    slots: float | None = None
    everywhere: bool = False
    accesses: tuple[int, int] = field(kw_only=True)
    narrow: tuple[int, int] | None = None
    anywhere: tuple[int, int] | None = None
    through: tuple[str, ...] = ()
    turns: int = 1
    counted: bool = True
    registers: int | None = None
    amd: dict[str, int] = field(default_factory=dict)
    nvidia: bool = False


@dataclass(frozen=True)
class Code:
    """What a compiled kernel is made of.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread's stack frame.
        local: bytes of its local memory, which is where registers are spilled.
        slots: issue slots of a warp on the shortest way.
        pipes: cycles that the shortest way keeps each pipe of a Hopper multiprocessor busy.
        widths: how many loads and stores of each width lie on the shortest way.
        all_widths: how many there are in the whole listing.
        turn: cycles as of `pipes` of one turn of the innermost loop on that way, if there is one.
    """

    registers: int
    stack: int
    local: int
    slots: int
    pipes: dict[str, float]
    widths: collections.Counter = field(default_factory=collections.Counter)
    all_widths: collections.Counter = field(default_factory=collections.Counter)
    turn: dict[str, float] = field(default_factory=dict)


def compiled(case: Case, target: str) -> Any:
    """The kernel compiled for `"sm_90"`, `"gfx942"` and the like; pointers are aligned to 16."""
    constants = dict(case.constants)
    options: dict[str, Any] = {"num_warps": case.warps}
    if target in AMD:
        if "FAST" in constants:
            constants["FAST"] = False
        constants |= case.amd
        options["num_warps"] = constants.pop("warps", case.warps)
    elif case.registers is not None:
        options["maxnreg"] = case.registers
    names = case.kernel.arg_names
    signature = {n: "constexpr" if n in constants else case.types[n] for n in names}
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*"
    }
    source = ASTSource(case.kernel, signature=signature, constexprs=constants, attrs=aligned)
    if target in AMD:
        gpu = GPUTarget("hip", target, 64)
    else:
        gpu = GPUTarget("cuda", int(target[3:]), 32)
    return triton.compile(source, target=gpu, options=options)


@functools.cache
def _tool(name: str) -> str:
    path = BINARIES / name
    assert path.exists(), f"triton's package carries no {name}"
    return str(path)


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def looked_at(case: Case, target: str) -> Code:
    """What a case is made of on one of NVIDIA's targets."""
    return read(compiled(case, target), case.through)


def read(binary: Any, through: Sequence[str] = ()) -> Code:
    """Reads a kernel compiled for one of NVIDIA's targets; `through` as `Case` has it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        listing = _run("cuobjdump", "-sass", file.name)
    used = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    instructions = [
        (int(address, 16), text.strip())
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);\s+/\*", listing)
    ]
    path = shortest_path(instructions, through)
    way = [instructions[i][1] for i in path]
    return Code(
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        slots=len(way),
        pipes=pipe_cycles(way),
        widths=_widths(way),
        all_widths=_widths([text for _, text in instructions]),
        turn=pipe_cycles(innermost_turn(instructions, path)),
    )


def amd_spills(binary: Any) -> int:
    """Registers that a kernel compiled for AMD spills, and bytes of its stack."""
    text = binary.asm["amdgcn"]
    names = ("sgpr_spill_count", "vgpr_spill_count", "private_segment_fixed_size")
    return sum(int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)


def _split(text: str) -> tuple[str | None, str]:
    """The predicate of an instruction, and its opcode."""
    guarded = re.match(r"@(!?U?P\w+)\s+(.*)", text)
    predicate, rest = guarded.groups() if guarded else (None, text)
    return predicate, rest.split()[0]


def shortest_way(instructions: list[tuple[int, str]]) -> list[str]:
    """The fewest instructions from the entry to an exit."""
    return [instructions[i][1] for i in shortest_path(instructions)]


def innermost_turn(instructions: list[tuple[int, str]], path: list[int]) -> list[str]:
    """What a turn of an innermost loop on a way consists of: from a branch's target to it.

    Of several, such as that of halves and the one of the ends of wide rows, the one that takes the
    most of the way; each time that the way goes through it counts. Loops come first whose threads
    keep to themselves, as they do in halves of Beta's scores but not in its tries.
    """
    index = {address: i for i, (address, _) in enumerate(instructions)}
    loops = set()
    for end in path:
        text = instructions[end][1]
        found = re.search(r"(0x[0-9a-f]+)", text) if "BRA" in _split(text)[1] else None
        first = index.get(int(found[1], 16)) if found else None
        if first is not None and first <= end and first in path:
            loops.add((first, end))
    inner = [
        (first, end)
        for first, end in loops
        if not any(first <= f and e <= end and (f, e) != (first, end) for f, e in loops)
    ]
    turns = [[instructions[i][1] for i in path if first <= i <= end] for first, end in inner]
    alone = [turn for turn in turns if not any(_OUTSIDE.search(text) for text in turn)]
    return max(alone or turns, key=len, default=[])


# Other threads, or memory that others read.
_OUTSIDE = re.compile(r"\b(SHFL|BAR|LDG|STG)\b")


def shortest_path(instructions: list[tuple[int, str]], through: Sequence[str] = ()) -> list[int]:
    """Where the fewest instructions from the entry to an exit stand, by Dijkstra 1959.

    Past an access of each of the kinds `through`, in their order, where there is one. A place is an
    instruction, plus their number for each kind that has been passed.
    """
    length = len(instructions)
    kinds = [k for k in through if any(_width(text) == k for _, text in instructions)]

    def placed(stage: int, i: int) -> int:
        """The place of instruction i, reached with the first `stage` kinds passed."""
        met = stage < len(kinds) and _width(instructions[i][1]) == kinds[stage]
        return length * (stage + met) + i

    index = {address: i for i, (address, _) in enumerate(instructions)}
    # An exit of some threads alone is passed by, but where there is no other: a loop may end so.
    guarded = all(_split(t)[0] for _, t in instructions if _split(t)[1].split(".")[0] == "EXIT")

    def successors(i: int) -> list[int] | None:
        text = instructions[i][1]
        predicate, opcode = _split(text)
        name = opcode.split(".")[0]
        if name == "EXIT":
            return None if predicate is None or guarded else [i + 1]
        if name == "RET":
            # Back to behind a call, which the way has gone on from already.
            return []
        if name not in ("BRA", "CALL"):
            return [i + 1]
        found = re.search(r"(0x[0-9a-f]+)", text)
        target = index.get(int(found[1], 16)) if found else None
        # A branch may carry its condition as an operand.
        always = name == "BRA" and predicate is None and not re.search(r"\bU?P\d", text)
        taken = [] if target is None else [target]
        return taken if always else [*taken, i + 1]

    steps, before, queue = {placed(0, 0): 0}, {}, [(0, placed(0, 0))]
    end = None
    while queue:
        count, i = heapq.heappop(queue)
        if count > steps[i]:
            continue
        after = successors(i % length)
        if after is None:
            if i >= length * len(kinds):
                end = i
                break
            # Too early; where it is an exit of some threads, others go on.
            after = [i % length + 1] if guarded else []
        for j in after:
            if j >= length:
                continue
            j = placed(i // length, j)
            if count + 1 < steps.get(j, count + 2):
                steps[j], before[j] = count + 1, i
                heapq.heappush(queue, (count + 1, j))
    assert end is not None, "no way leads to an exit"
    way = [end]
    while way[-1] in before:
        way.append(before[way[-1]])
    return [i % length for i in way[::-1]]


def _widths(texts: list[str]) -> collections.Counter:
    return collections.Counter(w for w in map(_width, texts) if w)


def _width(text: str) -> str | None:
    """`"LDG.128"` and the like for a global load or store."""
    opcode = _split(text)[1].split(".")
    if opcode[0] not in ("LDG", "STG"):
        return None
    widths = [part for part in opcode if part in ("256", "128", "64", "U16", "S16", "U8", "S8")]
    return f"{opcode[0]}.{widths[-1] if widths else '32'}"


# Cycles that an instruction of a warp keeps a pipe of one of the four parts of a Hopper
# multiprocessor busy: 32 threads over the results that the CUDA C++ programming guide gives for a
# clock of the multiprocessor (throughput of arithmetic instructions, compute capability 9.0).
_SPECIAL = {"MUFU", "I2F", "F2I", "POPC", "FLO", "BREV", "F2F", "FRND"}
_FLOAT = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"}
_MEMORY = {"LDG", "STG", "LDS", "STS", "SHFL", "LDC", "ATOMG", "ATOMS", "RED", "LDSM", "STSM"}
_INTEGER = {
    "SHF", "LEA", "LOP3", "IADD3", "ISETP", "FSETP", "SEL", "FSEL", "FMNMX", "IMNMX", "VIMNMX",
    "PRMT", "MOV", "PLOP3", "IABS", "F2FP", "VIADD", "I2FP", "VIADDMNMX", "SGXT", "LOP",
}  # fmt: skip


def pipe_cycles(way: list[str]) -> dict[str, float]:
    """Cycles that instructions keep the pipes busy; `"issue"` counts all of them."""
    busy: collections.Counter = collections.Counter()
    for text in way:
        opcode = _split(text)[1]
        name = opcode.split(".")[0]
        busy["issue"] += 1
        if name in _SPECIAL:
            busy["special"] += 8
        elif name == "IMAD":
            # Integer products go through one half of the float pipe.
            busy["heavy"] += 4 if ".WIDE" in opcode or ".HI" in opcode else 2
        elif name in _FLOAT:
            busy["float"] += 1
        elif name in _MEMORY:
            busy["memory"] += 4 if name == "SHFL" else 1
        elif name in _INTEGER:
            busy["integer"] += 2
    float_pipe = max(busy["float"] + busy["heavy"] / 2, busy["heavy"])
    return {
        "issue": busy["issue"],
        "integer": busy["integer"],
        "float": float_pipe,
        "special": busy["special"],
        "memory": busy["memory"],
    }


# One H200: 132 multiprocessors of four parts at 1.98 GHz, and 4.3 TB/s for a copy.
PARTS, CLOCK, BANDWIDTH = 132 * 4, 1.98e9, 4.3e12


def roof(case: Case, code: Code) -> float | None:
    """Time that memory takes over the time that the busiest pipe takes or memory, at most 1."""
    if not case.counted:
        return None
    more = case.turns - 1
    busy = max(n + more * code.turn.get(pipe, 0) for pipe, n in code.pipes.items())
    computing = busy * case.warps / case.elements / (PARTS * CLOCK)
    return min(1.0, case.bytes / BANDWIDTH / computing)


def slots_per_element(case: Case, code: Code) -> float | None:
    """Issue slots for each element: those of a warp, over the elements of one of its threads."""
    if not case.counted:
        return None
    slots = code.slots + (case.turns - 1) * code.turn.get("issue", 0)
    return slots * 32 * case.warps / case.elements
