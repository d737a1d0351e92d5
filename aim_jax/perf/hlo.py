"""Memory traffic and communication of a compiled program, from its HLO text.

XLA's own cost analysis counts the body of a loop once. Here every instruction counts as often as it
runs, using the trip counts of loops: layers of a scan, micro-batches, rounds of a collective matrix
product.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Set

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that move no data themselves.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional",
    "call", "after-all", "partition-id", "replica-id", "iota", "opt-barrier",
}  # fmt: skip
# Operations that read a part of their first operand, as large as the result.
SLICES = {"dynamic-slice", "slice", "gather"}
# Operations that change a part of their first operand, and the position of the new part.
UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
# Operations of which every element of the result may need all elements of the operands.
WHOLE = {
    "call", "convolution", "custom-call", "dot", "fusion", "reduce", "reduce-window", "sort",
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


def _dimensions(shape: str) -> tuple[int, ...]:
    """Return the dimensions of the first array of a shape; () if there is none."""
    match = _SHAPE.search(shape)
    return tuple(map(int, filter(None, match[2].split(",")))) if match else ()


def _elements(shape: str) -> int:
    """Return the number of elements of all arrays of a shape."""
    return sum(math.prod(_dimensions(match[0])) for match in _SHAPE.finditer(shape))


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

        Arrays that an instruction reads or updates in part count with that part:

        - slices, also behind elementwise operations inside a fusion;
        - updates of slices and scatters in place, at the root of a fusion;
        - stacked arrays that a custom call updates in place, with one of their layers.
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
        shapes = [x.shape if x else "" for x in operands]
        sizes = [size(shape, memory=True) for shape in shapes]
        result_bytes = size(instruction.shape, memory=True)
        # The result of a started copy, slice or collective includes the operands.
        if instruction.op.endswith("-start"):
            return size(instruction.shape) - sum(map(size, shapes))
        if instruction.op in SLICES:
            return 2 * result_bytes
        if instruction.op in UPDATES:
            # A scatter also reads what it adds to.
            return (3 if instruction.op == "scatter" else 2) * sizes[UPDATES[instruction.op]]
        if instruction.op == "custom-call":
            return _custom_call_bytes(instruction, shapes)
        inner = self.computations.get(instruction.attribute("calls") or "")
        if instruction.op == "fusion" and inner:
            return self._fusion_bytes(instruction, sizes, inner)
        return result_bytes + sum(sizes)

    def _fusion_bytes(
        self, instruction: Instruction, sizes: list[int], inner: dict[str, Instruction]
    ) -> int:
        """Count the bytes that a fusion moves: the elements that its results need, and the results.

        Args:
          instruction: the fusion.
          sizes: bytes of its operands; 0 for those that the compiler keeps on the chip.
          inner: its computation.
        """
        results = _results(inner)
        written = _sizes(instruction.shape, memory=True)
        in_place = set()
        for i, result in enumerate(results):
            update = _behind_bitcasts(result, inner)
            if update.op in UPDATES and len(written) == len(results):
                part = size(inner[update.operands[UPDATES[update.op]]].shape)
                target = _behind_bitcasts(inner[update.operands[0]], inner)
                if target.op == "parameter" and part < size(update.shape):
                    in_place.add(update.name)
                    written[i] = min(written[i], part)
        read = 0
        for number, (elements, everything) in self._needed(inner, in_place).items():
            read += sizes[number] * elements // everything
        return sum(written) + read

    def _needed(
        self, inner: dict[str, Instruction], in_place: Set[str] = frozenset()
    ) -> dict[int, tuple[int, int]]:
        """Return how many elements of each parameter the results of a computation need, and of all.

        Args:
          inner: the computation of a fusion.
          in_place: names of updates that are in place.
        """
        needed = dict.fromkeys(inner, 0)
        needed |= {result.name: _elements(result.shape) for result in _results(inner)}
        for x in reversed(inner.values()):  # an instruction comes after its operands
            nested = self.computations.get(x.attribute("calls") or "")
            of_nested = self._needed(nested) if x.op == "fusion" and nested else {}
            operands = x.operands if x.op != "tuple" and needed[x.name] else ()
            for position, name in enumerate(operands):
                everything = _elements(inner[name].shape)
                elements = everything if x.op in WHOLE else needed[x.name]
                if x.op in SLICES and position > 0:
                    elements = everything  # indices
                if of_nested:
                    elements, _ = of_nested.get(position, (0, 0))
                if x.name in in_place and position == 0:  # a scatter adds to what is there
                    update = inner[x.operands[UPDATES[x.op]]]
                    elements = _elements(update.shape) if x.op == "scatter" else 0
                needed[name] = min(everything, needed[name] + elements)
        return {
            int(x.rest.split(")")[0]): (needed[x.name], _elements(x.shape))
            for x in inner.values()
            if x.op == "parameter" and needed[x.name]
        }


def _results(inner: dict[str, Instruction]) -> list[Instruction]:
    """Return the instructions whose values a computation returns."""
    (root,) = (x for x in inner.values() if x.root)
    return [inner[name] for name in root.operands] if root.op == "tuple" else [root]


def _custom_call_bytes(instruction: Instruction, shapes: list[str]) -> int:
    """Count the bytes that a custom call moves: its operands and results.

    A call that updates arrays in place and takes an integer scalar is taken for a kernel of
    `aim_jax.ops.decode`. It works on one layer of the arrays that it updates, and of others with
    the same leading axis.

    Args:
      instruction: the custom call.
      shapes: shapes of its operands.
    """
    aliases = re.search(r"output_to_operand_aliasing=\{(.*?\))\}", instruction.rest)
    updated = re.findall(r"\((\d+),", aliases[1]) if aliases else []
    has_index = any(re.match(r"[su]\d+\[\]", shape) for shape in shapes)
    layers = {_dimensions(shapes[int(number)])[:1] for number in updated if has_index}
    total = 0
    for shape in (*shapes, *(match[0] for match in _SHAPE.finditer(instruction.shape))):
        dimensions = _dimensions(shape)
        is_stacked = len(dimensions) > 1 and dimensions[:1] in layers
        total += size(shape, memory=True) // (dimensions[0] if is_stacked else 1)
    return total


def _behind_bitcasts(x: Instruction, inner: dict[str, Instruction]) -> Instruction:
    """Return the instruction whose result x is, possibly in another shape."""
    while x.op == "bitcast":
        x = inner[x.operands[0]]
    return x


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
