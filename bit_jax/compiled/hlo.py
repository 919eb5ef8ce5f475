"""Reads an optimized HLO module: its convolutions, floating-point operations, memory traffic and collectives.

`Module(compiled.as_text())` reads the text of a GPU executable. All figures are for one device. An instruction inside a
loop counts as often as the loop runs.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "token": 0, "opaque": 0, "bf16": 2}
CONVOLUTION = "__cudnn$conv"
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

# opcodes that move nothing: names and views
_FREE = set(
    "parameter constant get-tuple-element tuple bitcast after-all optimization-barrier partition-id replica-id".split()
)
_INSTRUCTION = re.compile(
    r"^  (?P<root>ROOT )?%(?P<name>[^ ]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<sizes>[\d,]*)\]")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation, whose lines are in the order of execution.

    Attributes:
        name, opcode: name and opcode in the text.
        root: whether it is its computation's result.
        shape: shape of the result, as text; a tuple has several arrays.
        operands: names of the operands; for a parameter, its number.
        attributes: the text after the operands.
    """

    name: str
    opcode: str
    root: bool
    shape: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        return shape_bytes(self.shape)

    def attribute(self, pattern: str) -> str | None:
        match = re.search(pattern, self.attributes)
        return match and match[1]

    def called(self) -> str | None:
        """Returns the name of the computation that a fusion, loop or asynchronous wrapper runs, or None."""
        return self.attribute(r"(?:calls|body|to_apply)=%([\w.\-]+)")

    def runs(self, *opcodes: str) -> tuple[str, int] | None:
        """Returns (computation, number of times that it runs) of an instruction with one of these opcodes, or None. A
        loop of unknown length counts once."""
        if self.opcode not in opcodes:
            return None
        computation = self.called()
        assert computation is not None, self
        return computation, int(self.attribute(r'"known_trip_count":\{"n":"(\d+)"\}') or 1)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
        kind: its opcode, such as "all-reduce".
        bytes: {dtype: bytes on one device} of its operands or its result, whichever is larger.
        overlapped: whether it is asynchronous and computation is scheduled between its start and its end.
        times: number of times that it runs in a step.
        group: number of devices that take part together.
    """

    kind: str
    bytes: dict[str, int]
    overlapped: bool
    times: int
    group: int


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Parses a shape's text into [(dtype, sizes)]."""
    return [
        (array["dtype"], tuple(int(size) for size in array["sizes"].split(",") if size))
        for array in _ARRAY.finditer(shape)
    ]


def shape_bytes(shape: str) -> int:
    def width(dtype: str) -> float:
        if dtype in BYTES:
            return BYTES[dtype]
        bits = re.match(r"[a-z]+(\d+)", dtype)
        assert bits is not None, f"unknown HLO type {dtype}"
        return int(bits[1]) / 8

    return math.ceil(sum(width(dtype) * math.prod(sizes) for dtype, sizes in arrays(shape)))


class Module:
    """An HLO module: its computations by name."""

    def __init__(self, text: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        named = re.match(r"HloModule ([^\s,]+)", text)
        self.name = named[1] if named else ""
        current: list[Instruction] = []
        for line in text.splitlines():
            if line.startswith(("ENTRY ", "%")) and line.endswith("{"):
                name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
                current = self.computations[name] = []
                if line.startswith("ENTRY "):
                    self.entry = name
            elif match := _INSTRUCTION.match(line):
                operands, attributes = _split_operands(match["rest"])
                names = tuple(_OPERAND.findall(operands)) if match["opcode"] != "parameter" else (operands,)
                root = match["root"] is not None
                current.append(Instruction(match["name"], match["opcode"], root, match["shape"], names, attributes))
        if not self.entry:
            raise ValueError("this is no HLO text: it has no ENTRY computation")

    @functools.cached_property
    def instructions(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for lines in self.computations.values() for instruction in lines}

    def executed(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[Instruction, int]]:
        """Yields (instruction, number of times it runs) for the entry and the loops and asynchronous parts in it.

        The parts of a fusion or reduction are not instructions of their own, because they touch no memory.
        """
        for instruction in self.computations[computation or self.entry]:
            if inner := instruction.runs("while", "call", "async-start"):
                yield from self.executed(inner[0], times * inner[1])
            else:
                yield instruction, times

    def rematerialized(self) -> int:
        """Counts the instructions that XLA itself repeats to save memory."""
        return sum(times for instruction, times in self.executed() if ".remat" in instruction.name)

    def convolutions(self) -> int:
        return sum(times for instruction, times in self.executed() if is_convolution(instruction))

    def flops(self) -> float:
        """Counts the operations of convolutions and matrix products, padding included: 2 for an accumulated product."""
        return sum(times * self._flops(instruction) for instruction, times in self.executed())

    def roofline(self, flops: float, bandwidth: float) -> float:
        """Returns a lower bound of the computation's seconds: the sum over instructions of the longer of the time for
        its operations and the time for its bytes.

        Args:
            flops: peak operations per second.
            bandwidth: peak bytes per second.
        """
        return sum(
            times * max(self._flops(line) / flops, self._moved(line) / bandwidth)
            for line, times in self.executed()
            if not (_moves_nothing(line) or is_collective(line))
        )

    def work(self, line: Instruction) -> tuple[float, int]:
        """Returns (floating-point operations, bytes moved) of one run of an instruction."""
        return self._flops(line), 0 if _moves_nothing(line) else self._moved(line)

    def traffic(self) -> dict[str, int]:
        """Returns the bytes read from and written to device memory by convolutions, collectives, copies and others.

        They are the sum over instructions of operands and results, as if nothing stayed in a cache between two
        instructions. If a fusion only slices an array, the slices count.
        """
        total: dict[str, int] = dict.fromkeys(("convolutions", "collectives", "copies", "other"), 0)
        for instruction, times in self.executed():
            if _moves_nothing(instruction):
                continue
            if is_convolution(instruction):
                kind = "convolutions"
            elif is_collective(instruction):
                kind = "collectives"
            elif instruction.opcode == "copy":
                kind = "copies"
            else:
                kind = "other"
            total[kind] += times * self._moved(instruction)
        return total

    def collectives(self) -> list[Collective]:
        collectives = []
        for lines, times in self._running():
            for place, line in enumerate(lines):
                inner = self._asynchronous(line)
                kind = inner.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                operands = _by_dtype(" ".join(self.instructions[name].shape for name in inner.operands))
                result = _by_dtype(_result_shape(inner))
                larger = max(operands, result, key=lambda side: sum(side.values()))
                asynchronous = line.opcode.endswith("-start") and '"is_sync":true' not in line.attributes
                overlapped = asynchronous and any(map(_computes, _until_done(line, lines[place + 1 :])))
                collectives.append(Collective(kind, larger, overlapped, times, _group(inner)))
        return collectives

    def _running(self, computation: str | None = None, times: int = 1) -> Iterator[tuple[list[Instruction], int]]:
        """Yields (instructions, number of times they run) of the entry and of the computations of loops in it."""
        lines = self.computations[computation or self.entry]
        yield lines, times
        for line in lines:
            if inner := line.runs("while", "call"):
                yield from self._running(inner[0], times * inner[1])

    def _asynchronous(self, line: Instruction) -> Instruction:
        """Returns the instruction that an asynchronous start wraps, or the line itself if it wraps none."""
        body = line.called() if line.opcode == "async-start" else None
        return self.computations[body][-1] if body else line

    def _moved(self, line: Instruction) -> int:
        if line.opcode == "dynamic-slice":
            return 2 * line.bytes
        if line.opcode == "dynamic-update-slice":
            return 2 * self.instructions[line.operands[1]].bytes
        fused = self.computations.get(line.called() or "") if line.opcode == "fusion" else None
        if fused is None:
            return shape_bytes(_result_shape(line)) + sum(self.instructions[name].bytes for name in line.operands)
        operands = [self.instructions[name] for name in line.operands]
        return _written(fused) + sum(_read(fused, number, operand) for number, operand in enumerate(operands))

    def _flops(self, line: Instruction) -> float:
        if is_convolution(line):
            return self._convolution_flops(line)
        if line.opcode == "fusion":
            return sum(self._flops(part) for part in self.computations[line.called() or ""])
        if line.opcode == "dot" or "__cublas" in line.attributes:
            (_, left), (_, out) = arrays(self.instructions[line.operands[0]].shape)[0], arrays(line.shape)[0]
            contracted = line.attribute(r"lhs_contracting_dim(?:ension)?s[=:\"]+[\[{]\"?(\d+)")
            assert contracted is not None, line
            return 2 * math.prod(out) * left[int(contracted)]
        return 0

    def _convolution_flops(self, line: Instruction) -> float:
        """Counts 2 operations for each output value and each kernel value that feeds it, in any of the three passes."""
        kernel_labels = line.attribute(r"dim_labels=\w+_(\w+)->")
        assert kernel_labels is not None
        left, right = (arrays(self.instructions[name].shape)[0][1] for name in line.operands[:2])
        result = arrays(line.shape)[0][1]
        if "BackwardFilter" in line.attributes:
            outputs, kernel = right, result
        elif "BackwardInput" in line.attributes:
            outputs, kernel = left, right
        else:
            outputs, kernel = result, right
        return 2 * math.prod(outputs) * math.prod(kernel) / kernel[kernel_labels.index("o")]


def _result_shape(line: Instruction) -> str:
    """Returns the shape of the result without the operands, which `all-gather-start` and others (since JAX 0.11 also
    `all-reduce-start`) have in their tuple."""
    parts = [array[0] for array in _ARRAY.finditer(line.shape)]
    if line.opcode.endswith("-start") and len(parts) > len(line.operands):
        return " ".join(parts[len(line.operands) :])
    return line.shape


def _by_dtype(shape: str) -> dict[str, int]:
    total: dict[str, int] = {}
    for array in _ARRAY.finditer(shape):
        total[array["dtype"]] = total.get(array["dtype"], 0) + shape_bytes(array[0])
    return total


def _split_operands(rest: str) -> tuple[str, str]:
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    raise ValueError(f"unbalanced parentheses in HLO text: {rest[:80]}")


def _until_done(start: Instruction, later: list[Instruction]) -> Iterator[Instruction]:
    return itertools.takewhile(lambda line: start.name not in line.operands, later)


def _moves_nothing(line: Instruction) -> bool:
    return line.opcode in _FREE or line.opcode.endswith("-done")


def is_collective(line: Instruction) -> bool:
    return line.opcode.removesuffix("-start") in COLLECTIVES


def is_convolution(line: Instruction) -> bool:
    return line.opcode == "custom-call" and CONVOLUTION in line.attributes


def _computes(line: Instruction) -> bool:
    return line.opcode == "fusion" or is_convolution(line) or "__cublas" in line.attributes


def _group(line: Instruction) -> int:
    """Counts the devices of one group in `replica_groups={{0,1},{2,3}}`, `[groups,devices]<=...` or
    `mesh['a'=2,'b'=4] {'b'}`."""
    explicit = line.attribute(r"replica_groups=\{\{([\d,]*)\}")
    if explicit is not None:
        return explicit.count(",") + 1
    if (axes := line.attribute(r"replica_groups=mesh\[([^]]*)\]")) is not None:
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
        together = line.attribute(r"replica_groups=mesh\[[^]]*\](?:, device_ids=\(.*?\))? \{([^}]*)\}") or ""
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", together))
    return int(line.attribute(r"replica_groups=\[\d+,(\d+)\]") or 1)


def _read(fused: list[Instruction], number: int, operand: Instruction) -> int:
    """Returns the number of bytes that a fusion reads of its operand `number`."""
    names = {line.name for line in fused if line.opcode == "parameter" and line.operands == (str(number),)}
    for line in fused:  # in order of use
        if line.opcode == "bitcast" and line.operands[0] in names:
            names.add(line.name)
    uses = [line for line in fused if names & set(line.operands) and line.opcode != "bitcast"]
    if uses and all(line.opcode in ("slice", "dynamic-slice") and line.operands[0] in names for line in uses):
        return sum(line.bytes for line in uses)
    if uses and all(line.opcode == "dynamic-update-slice" and line.operands[0] in names for line in uses):
        return 0  # updated in place
    return operand.bytes


def _written(fused: list[Instruction]) -> int:
    by_name = {line.name: line for line in fused}
    root = next(line for line in fused if line.root)
    results = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    results = [by_name[line.operands[0]] if line.opcode == "bitcast" else line for line in results]
    return sum(
        by_name[line.operands[1]].bytes if line.opcode == "dynamic-update-slice" else line.bytes for line in results
    )


def fingerprint(text: str) -> str:
    """Returns the SHA-256 of an optimized HLO module without what tells nothing of the work: the names of the source's
    files and lines, and attributes that hold XLA's own fingerprints."""
    body = re.sub(r",? ?(metadata|frontend_attributes)=\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "", text)
    # newer versions list the names of source files, and the frames of stacks, in sections before the computations
    tables = r"FileNames|FunctionNames|FileLocations|StackFrames"
    kept = [section for section in body.split("\n\n") if not re.match(tables, section)]
    return hashlib.sha256("\n\n".join(kept).encode()).hexdigest()
