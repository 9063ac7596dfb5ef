"""A roofline over the optimized program that XLA's compiler leaves: what each instruction moves and computes.

`Compiled.as_text()` is read, as `cost_analysis()` knows neither the trips of loops nor cuDNN's calls. Every instruction
that becomes a kernel counts once for each trip of the loops around it:

    seconds = max(matrix FLOPs / peak, bytes / bandwidth, elementwise operations / vector peak)

Copies that XLA starts beside other kernels (`fusion-start` to `fusion-done`) take the bandwidth that those leave, and
count for the rest. It cannot know the efficiency of a kernel, the gaps between launches, or what autotuning finds.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from jaxrl.hardware import Hardware

SIZES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
SIZES |= {"s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all")
_FREE = {
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "iota",
}
_MOVES = {
    "parameter",
    "dot",
    "bitcast",
    "tuple",
    "get-tuple-element",
    "constant",
    "fusion",
    "broadcast",
    "copy",
}
_MOVES |= {"transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "gather", "iota"}
_WINDOWS = ("dynamic-slice", "slice", "gather")  # read as much as they give


class Array(NamedTuple):
    """The type of one buffer."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return SIZES[self.dtype] * self.size


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    op: str
    arrays: tuple[Array, ...]  # its results
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    @property
    def scope(self) -> str:
        """The path of named scopes and primitives that JAX gave it."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, key: str) -> list[str]:
        """Names of the computations under an attribute such as "body"."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return _NAME.findall(found[1]) if found else []


Computation = dict[str, Instruction]
Flops = dict[str, float]  # of matrix products, by the operands' dtype


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: dict[str, Computation]
    entry: str


class Loop(NamedTuple):
    """What the text of a loop with a dynamic number of trips does not say."""

    trips: float
    fill: float = 1.0  # share of the padded attention FLOPs in it that are computed


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one instruction costs in a run of the program."""

    name: str
    op: str
    scope: str
    times: float  # it runs
    flops: Mapping[str, float]  # of matrix products, by the operands' dtype; of all runs
    bytes: float  # that it reads and writes, of all runs
    sent: float  # bytes that a collective receives or sends, the larger; of all runs
    seconds: float  # by the roofline, of all runs, less `hidden`; a collective takes none
    hidden: float  # seconds beside other kernels
    dots: tuple[tuple[Array, ...], ...]  # operands of its matrix products
    arrays: tuple[Array, ...]  # results


def parse(text: str) -> Module:
    """Reads `Compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, now = "", Computation()
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            now = computations.setdefault(head[2], Computation())
            entry = head[2] if head[1] else entry
        elif found := _INSTRUCTION.match(line):
            instruction = _instruction(found[2], found[3], bool(found[1]))
            now[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    """From `type op(operands), attributes`."""
    end = _closing(text, 0) if text[0] == "(" else text.index(" ")
    opened = text.index("(", end)
    closed = _closing(text, opened)
    return Instruction(
        name=name,
        op=text[end:opened].strip(),
        arrays=tuple(
            Array(dtype, tuple(int(n) for n in shape.split(",") if n))
            for dtype, shape in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text[:end]))
        ),
        operands=tuple(_NAME.findall(text[opened:closed])),
        attributes=text[closed:],
        root=root,
    )


def _closing(text: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i + 1
    raise ValueError(f"an open parenthesis in {text[start : start + 80]!r}")


def costs(module: Module, hardware: Hardware, loop: Callable[[str], Loop]) -> list[Cost]:
    """The cost of each kernel of a program.

    Args:
      module: see `parse`.
      hardware: its rates.
      loop: of the scope of a `while` whose number of trips is not static.
    """
    return list(_walk(module, module.entry, hardware, loop, 1.0, 1.0))


def _walk(
    module: Module, name: str, hardware: Hardware, loop: Callable[[str], Loop], times: float, fill: float
) -> Iterator[Cost]:
    beside: dict[str, Cost] = {}  # copies under way
    for i in module.computations[name].values():
        if i.op == "while":
            static = re.search(r'"known_trip_count":\{"n":"(\d+)"', i.attributes)
            inner = Loop(int(static[1]), fill) if static else loop(i.scope)
            yield from _walk(module, i.called("body")[0], hardware, loop, times * inner.trips, inner.fill)
        elif i.op == "conditional":  # the last branch stands for all
            branches = i.called("branch_computations") or i.called("true_computation")
            yield from _walk(module, branches[-1], hardware, loop, times, fill)
        elif i.op in ("call", "async-start"):
            inside = (i.called("to_apply") or i.called("calls"))[0]
            yield from _walk(module, inside, hardware, loop, times, fill)
        elif i.op == "fusion-start":
            beside[i.name] = _cost(module, name, i, hardware, times, fill)
        elif i.op == "fusion-done":
            yield beside.pop(i.operands[0])
        elif i.op not in _FREE and not i.op.endswith("-done"):
            cost = _cost(module, name, i, hardware, times, fill)
            left = cost.seconds - cost.bytes / hardware.bandwidth
            for start, copy in beside.items():
                hidden = max(0.0, min(left, copy.seconds))
                beside[start] = dataclasses.replace(
                    copy, seconds=copy.seconds - hidden, hidden=copy.hidden + hidden
                )
                left -= hidden
            yield cost


def _cost(module: Module, name: str, i: Instruction, hardware: Hardware, times: float, fill: float) -> Cost:
    computation = module.computations[name]
    operands = [computation[x] for x in i.operands if x in computation]
    moved, sent, elementwise = float(i.bytes + sum(x.bytes for x in operands)), 0.0, 0.0
    dots: list[tuple[Array, ...]] = []
    flops: Flops = collections.defaultdict(float)
    if i.op in ("fusion", "fusion-start"):
        for inner in _fused(module, i):
            if inner[1].op == "dot":
                _count_dot(inner[0], inner[1], flops, dots)
            elif inner[1].op not in _MOVES:
                elementwise += sum(x.size for x in inner[1].arrays)
        moved = _fusion_bytes(module.computations[i.called("calls")[0]])
    elif i.op == "dot":
        _count_dot(computation, i, flops, dots)
    elif i.op == "custom-call" and "fmha" in i.attributes:
        batch, length, heads, size = operands[0].arrays[0].shape
        causal = 2 * 2 * batch * length**2 * heads * size / 2 * fill
        flops["bf16"] += causal * (2.5 if "Backward" in i.attributes else 1)
    elif i.op == "custom-call" and "gemm" in i.attributes:
        _count_gemm(i, operands, flops, dots)
    elif i.op.startswith(_COLLECTIVES):
        sent = max(i.bytes, sum(x.bytes for x in operands))
        moved = 0.0
    elif i.op in _WINDOWS:
        moved = 2.0 * i.bytes
    elif i.op in ("dynamic-update-slice", "scatter"):
        moved = 2.0 * operands[1 if i.op == "dynamic-update-slice" else 2].bytes
    seconds = sum(n / (hardware.flops if kind != "f32" else hardware.flops / 2) for kind, n in flops.items())
    seconds = max(seconds, moved / hardware.bandwidth, elementwise / hardware.vector_flops)
    return Cost(
        name=i.name,
        op=i.op,
        scope=i.scope,
        times=times,
        flops={kind: n * times for kind, n in flops.items()},
        bytes=moved * times,
        sent=sent * times,
        seconds=seconds * times,
        hidden=0.0,
        dots=tuple(dots),
        arrays=i.arrays,
    )


def _fused(module: Module, fusion: Instruction) -> Iterator[tuple[Computation, Instruction]]:
    """All instructions inside a fusion, each with its computation."""
    computation = module.computations[fusion.called("calls")[0]]
    for i in computation.values():
        yield computation, i
        if i.op == "fusion":
            yield from _fused(module, i)


def _count_dot(computation: Computation, i: Instruction, flops: Flops, dots: list[tuple[Array, ...]]) -> None:
    operands = tuple(computation[x].arrays[0] for x in i.operands)
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    summed = [int(n) for n in found[1].split(",") if n] if found else []
    flops[operands[0].dtype] += 2 * i.arrays[0].size * math.prod(operands[0].shape[n] for n in summed)
    dots.append(operands)


def _count_gemm(
    i: Instruction,
    operands: list[Instruction],
    flops: Flops,
    dots: list[tuple[Array, ...]],
) -> None:
    left = operands[0].arrays[0]
    found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', i.attributes)
    summed = [int(n) for n in re.findall(r"\d+", found[1])] if found else [len(left.shape) - 1]
    flops[left.dtype] += 2 * i.arrays[0].size * math.prod(left.shape[n] for n in summed)
    dots.append(tuple(x.arrays[0] for x in operands[:2]))


def _fusion_bytes(computation: Computation) -> float:
    """What a fused kernel reads and writes: of windows only what it uses, of an update in place only the update."""
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for i in computation.values():
        for name in i.operands:
            users[name].append(i)

    def uses(name: str) -> list[tuple[str, Instruction]]:
        found = []
        for user in users[name]:
            found += uses(user.name) if user.op in ("bitcast", "reshape") else [(name, user)]
        return found

    total = 0.0
    for i in computation.values():
        if i.op != "parameter":
            continue
        found = uses(i.name)
        if found and all(user.op in _WINDOWS and user.operands[0] == name for name, user in found):
            total += sum(user.bytes for _, user in found)
        elif not (
            found
            and all(
                user.op in ("dynamic-update-slice", "scatter") and user.operands[0] == name
                for name, user in found
            )
        ):
            total += i.bytes
    root = next(i for i in computation.values() if i.root)
    results = [computation[x] for x in root.operands] if root.op == "tuple" else [root]
    for i in results:
        while i.op in ("bitcast", "reshape") and i.operands:
            i = computation[i.operands[0]]
        updates = {"dynamic-update-slice": 1, "scatter": 2}.get(i.op)
        total += computation[i.operands[updates]].bytes if updates else i.bytes
    return total
