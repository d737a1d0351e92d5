"""Memory traffic and communication of a compiled program, from its HLO text.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as it
runs, using the trip counts of loops: layers of a scan, micro-batches, rounds of a collective matrix
product.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move no data themselves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip
BITS = {"pred": 8, "bf16": 16, "f16": 16, "token": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*?\) -> .*?\{\n(.*?)^\}", re.M | re.S)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$", re.M)
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Line of HLO text: `name = shape op(operands), attributes`.

    Attributes:
      name: name of the instruction.
      shape: shape of the result, or of all parts of a tuple.
      op: operation.
      rest: text after the opening parenthesis: operands and attributes.
      root: True for the instruction whose result its computation returns.
    """

    name: str
    shape: str
    op: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions that this one takes as operands."""
        return re.findall(r"%([\w.\-]+)", self.rest.split("), ")[0])

    def attribute(self, name: str) -> str | None:
        """Return VALUE of the attribute NAME=VALUE, or None."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match and match[1]

    def computation(self, name: str) -> str:
        """Return the computation that the attribute `name` refers to.

        Raises:
          ValueError: the instruction has no such attribute.
        """
        value = self.attribute(name)
        if value is None:
            raise ValueError(f"the instruction {self.name} has no {name}=.")
        return value


def size(shape: str, *, memory: bool = False) -> int:
    """Return the bytes of a shape, or of all parts of a tuple.

    Args:
      shape: HLO text of the shape.
      memory: exclude arrays that the compiler keeps on the chip, marked by S(1) in TPU layouts.
    """
    return sum(_sizes(shape, memory))


def _sizes(shape: str, memory: bool) -> list[int]:
    """Return the bytes of every array of a shape."""
    sizes = []
    for kind, dimensions, layout in _SHAPE.findall(shape):
        bits = BITS[kind] if kind in BITS else int(re.findall(r"\d+", kind)[0])
        count = math.prod(map(int, filter(None, dimensions.split(","))))
        sizes.append(0 if memory and "S(1)" in layout else count * bits // 8)
    return sizes


class Program:
    """Compiled program: its computations, and the number of runs of each.

    Args:
      hlo: HLO text of the program.

    Attributes:
      computations: instructions by name, by the name of their computation.
      runs: number of runs of the entry computation and of those that loops, branches and calls run.
    """

    def __init__(self, hlo: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        entry = None
        for is_entry, name, body in _COMPUTATION.findall(hlo):
            self.computations[name] = {
                m[2]: Instruction(m[2], m[3], m[4], m[5], bool(m[1]))
                for m in _INSTRUCTION.finditer(body)
            }
            entry = name if is_entry else entry
        if entry is None:
            raise ValueError("no ENTRY computation: this is not the text of a compiled program.")
        self.runs: dict[str, int] = {}
        self._count(entry, 1)

    def _count(self, name: str, times: int) -> None:
        self.runs[name] = self.runs.get(name, 0) + times
        for instruction in self.computations[name].values():
            if instruction.op == "while":
                rounds = self._trip_count(instruction.computation("condition"))
                self._count(instruction.computation("body"), times * rounds)
            elif instruction.op == "conditional":
                branches = re.search(r"branch_computations=\{(.*?)\}", instruction.rest)
                names = re.findall(r"%([\w.\-]+)", branches[1]) if branches else []
                names += filter(
                    None, map(instruction.attribute, ("true_computation", "false_computation"))
                )
                for branch in names:
                    self._count(branch, times)
            elif instruction.op in ("call", "async-start"):
                called = instruction.attribute("to_apply") or instruction.attribute("calls")
                if called:
                    self._count(called, times)

    def _trip_count(self, condition: str) -> int:
        """Return the bound that a loop's condition compares its counter with."""
        constants = self._constants(condition)
        if len(constants) != 1:
            raise ValueError(
                f"loop condition {condition} has the constants {constants}; expected exactly one."
            )
        return constants.pop()

    def _constants(self, name: str) -> set[int]:
        constants = set()
        for instruction in self.computations[name].values():
            if instruction.op == "constant" and re.match(r"[su]\d+\[\]", instruction.shape):
                constants.add(int(instruction.rest.split(")")[0]))
            if instruction.op == "fusion":
                constants |= self._constants(instruction.computation("calls"))
        return constants

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Count the runs of collectives and the bytes that one device sends in them, by kind.

        A ring is assumed: each of n devices sends (n - 1) / n of a gathered or scattered array, and
        twice that of an all-reduced array.

        Returns:
          (runs, bytes sent in all runs) by kind.
        """
        seen: dict[tuple[str, str], tuple[str, int, int]] = {}
        for owner, times, instruction in self._all_instructions():
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            operands = [self.computations[owner].get(name) for name in instruction.operands]
            operand_bytes = sum(size(x.shape) for x in operands if x is not None)
            result = size(instruction.shape)
            if instruction.op.endswith("-start"):  # the result includes the operands
                result -= operand_bytes
            n = _group_size(instruction.rest)
            fraction = (n - 1) / n
            sent = {
                "all-gather": result * fraction,
                "reduce-scatter": operand_bytes * fraction,
                "all-to-all": operand_bytes * fraction,
                "all-reduce": 2 * operand_bytes * fraction,
                "collective-permute": operand_bytes,
            }[kind]
            # An asynchronous collective may appear in several fusions, with the same channel.
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            key = (owner, instruction.name)
            if channel and kind != "collective-permute":
                key = (kind, channel[1])
            if key not in seen or seen[key][1] < times:
                seen[key] = (kind, times, round(sent))
        totals: dict[str, tuple[int, int]] = {}
        for kind, times, sent in seen.values():
            runs, total = totals.get(kind, (0, 0))
            totals[kind] = (runs + times, total + times * sent)
        return totals

    def _all_instructions(self) -> Iterator[tuple[str, int, Instruction]]:
        """Yield (computation, number of runs, instruction), including instructions of fusions."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield name, times, instruction
                if instruction.op == "fusion":
                    for inner, fused in self._nested(instruction.attribute("calls")):
                        yield inner, times, fused

    def _nested(self, name: str | None) -> Iterator[tuple[str, Instruction]]:
        if name is None:
            return
        for instruction in self.computations.get(name, {}).values():
            yield name, instruction
            if instruction.op == "fusion":
                yield from self._nested(instruction.attribute("calls"))

    def memory_traffic(self) -> int:
        """Count the bytes read from and written to device memory: inputs and outputs of fusions.

        A fusion that reads or updates a part of an array in place counts only that part.
        """
        total = 0
        for name, times in self.runs.items():
            computation = self.computations[name]
            for instruction in computation.values():
                if instruction.op in FREE or instruction.op.endswith("-done"):
                    continue
                total += times * self._bytes_moved(instruction, computation)
        return total

    def _bytes_moved(self, instruction: Instruction, computation: dict[str, Instruction]) -> int:
        operands = [computation.get(name) for name in instruction.operands]
        sizes = [size(x.shape, memory=True) if x else 0 for x in operands]
        result_bytes = size(instruction.shape, memory=True)
        # The result of a started copy, slice or collective includes the operands.
        if instruction.op.endswith("-start"):
            return size(instruction.shape) - sum(size(x.shape) for x in operands if x)
        if instruction.op in ("dynamic-slice", "slice", "gather"):
            return 2 * result_bytes
        if instruction.op == "dynamic-update-slice":
            return 2 * sizes[1]
        inner = self.computations.get(instruction.attribute("calls") or "")
        if instruction.op != "fusion" or not inner:
            return result_bytes + sum(sizes)
        uses: dict[str, list[Instruction]] = {}
        for x in inner.values():
            for operand in x.operands:
                uses.setdefault(operand, []).append(x)
        for x in inner.values():
            readers = self._readers(x, uses) if x.op == "parameter" else []
            number = int(x.rest.split(")")[0]) if readers else 0
            if readers and number < len(sizes):
                parts = sum(self._part_read(x, reader, inner) for reader in readers)
                sizes[number] = min(sizes[number], parts)
        (root,) = (x for x in inner.values() if x.root)
        written = _sizes(instruction.shape, memory=True)
        results = [inner.get(name) for name in root.operands] if root.op == "tuple" else [root]
        if len(written) == len(results):
            for i, result in enumerate(results):
                while result is not None and result.op == "bitcast":
                    result = inner.get(result.operands[0])
                if result is not None and result.op == "dynamic-update-slice":
                    written[i] = min(written[i], size(inner[result.operands[1]].shape))
        return sum(written) + sum(sizes)

    def _part_read(self, x: Instruction, reader: Instruction, inner: dict[str, Instruction]) -> int:
        """Return the bytes of x that an instruction of the same fusion reads."""
        if reader.op in ("dynamic-slice", "slice", "gather"):
            return size(reader.shape)
        target = inner.get(reader.operands[0]) if reader.op == "dynamic-update-slice" else None
        while target is not None and target.op == "bitcast":
            target = inner.get(target.operands[0])
        return 0 if target is x else size(x.shape)

    def _readers(self, x: Instruction, uses: dict[str, list[Instruction]]) -> list[Instruction]:
        """Return the instructions that use a value, directly or through bitcasts."""
        readers = []
        for user in uses.get(x.name, []):
            readers += self._readers(user, uses) if user.op == "bitcast" else [user]
        return readers


def _group_size(text: str) -> int:
    """Return the number of devices in one group of a collective."""
    if match := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(match[1].split(","))
    return 2  # collective-permute has source-target pairs instead of groups
