"""Predicts which arrays of a program XLA writes to memory, their sizes and their `tensor` sharding.

Independent of the architecture: matmuls, sizes and layouts come from the traced program.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from sheepop_jax.planning.program import Op, Program

# Views of the same bytes, or recomputed in every loop that reads them.
_MOVES = {
    "reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "copy", "copy_p",
    "sharding_constraint", "optimization_barrier", "name",
}  # fmt: skip  # a list of words
# XLA fuses these although their operands differ in shape.
_FUSED = {"concatenate", "pad", "split", "rev"}
# Too expensive to recompute: XLA computes these once and stores the result.
_EXPENSIVE = {
    "cos", "div", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "log", "log1p", "logistic",
    "pow", "rsqrt", "sin", "sqrt", "tan", "tanh",
}  # fmt: skip  # a list of words

# Threefry draws two 32-bit words per element, and XLA keeps both.
_RANDOM_BYTES = 8


@dataclass(frozen=True)
class Array:
    """The properties of a variable.

    Attributes:
        number: number of the variable that first held these bytes.
        bytes: size on one device.
        split: whether the mesh's `tensor` axis shards it.
        axis: for a parameter, the axis that `tensor` shards.
        parameter: whether it is a parameter, in any layout or dtype.
        sources: arrays in memory from which XLA can compute it in one loop.
        scores: attention scores of which it is an elementwise function.
    """

    number: int
    bytes: float = 0.0
    split: bool = False
    axis: int | None = None
    parameter: bool = False
    sources: frozenset[int] = frozenset()
    scores: frozenset[int] = frozenset()


class Scores(NamedTuple):
    """Attention scores: shape, elements on one device, and bytes per element of the queries."""

    shape: tuple[int, ...]
    elements: float
    itemsize: int


class Written(NamedTuple):
    """An array that is written to memory.

    Attributes:
        at: index of the operation that writes it.
        array: the array.
        read: numbers of the arrays read to compute it.
    """

    at: int
    array: Array
    read: frozenset[int]


class Analysis:
    """The arrays of a program under a model of XLA's fusion.

    An elementwise result is recomputed in each loop that reads it, unless it is expensive or its
    sources need more memory. Operands of matmuls and results of matmuls, reductions, gathers and
    random draws are written to memory.

    Attributes:
        program: the program.
        arrays: variable → properties.
        memory: number → array written to memory.
        scores: number → attention scores.
        written: arrays written to memory, in order.
        sums: bytes per device of matmul results whose contracted axis `tensor` shards; each is
            all-reduced over `tensor`.
        joint_sums: the same, if XLA adds results of one shape before the all-reduce.
    """

    def __init__(self, program: Program, inputs: Sequence[Array], tensor: int):
        """Propagates the properties of the inputs through the operations.

        Args:
            program: the result of `flatten`.
            inputs: properties of its inputs.
            tensor: size of the mesh's `tensor` axis.
        """
        self.program, self._tensor = program, tensor
        self.arrays: dict[int, Array] = dict(zip(program.inputs, inputs, strict=True))
        self.memory: dict[int, Array] = {}
        self.scores: dict[int, Scores] = {}
        self.written: list[Written] = []
        self.sums = self.joint_sums = 0.0
        self._partial: set[int] = set()
        self._readers = _readers(program)
        for at, op in enumerate(program.ops):
            self._follow(at, op)

    def get(self, variable: int) -> Array:
        """Returns the properties of a variable; those of a constant if no operation produced it."""
        found = self.arrays.get(variable, Array(variable))
        return self.memory.get(found.number, found)

    def bytes_of(self, variable: int, split: bool = False) -> float:
        """Returns the bytes of a variable on one device."""
        aval = self.program.shapes[variable]
        return float(aval.size * _itemsize(aval) / (self._tensor if split else 1))

    def _add_up(self, number: int, size: float, joint: bool = False) -> None:
        self._partial.add(number)
        self.sums += 0.0 if joint else size
        self.joint_sums += size

    def _write(self, at: int, array: Array) -> None:
        if array.parameter or array.number in self.memory or not array.bytes:
            return
        self.written.append(Written(at, array, array.sources))
        own = frozenset({array.number})
        self.memory[array.number] = replace(array, sources=own)

    def _follow(self, at: int, op: Op) -> None:
        shapes = self.program.shapes
        read = [self.get(variable) for variable in op.inputs]
        if op.name in _MOVES or self._widens(op):
            for variable, array in zip(op.outputs, read, strict=False):
                self.arrays[variable] = replace(array, axis=_moved_axis(op, array.axis))
            return
        product = op.name == "dot_general"
        if product:
            for array in read:
                self._write(at, array)
            read = [self.get(variable) for variable in op.inputs]
        split = any(array.split for array in read)
        parameters = [array for array in read if array.parameter]
        parameter = bool(parameters) and op.name != "gather"
        parameter &= all(array.parameter or not array.sources for array in read)
        scores = frozenset[int]().union(*(array.scores for array in read))
        if product and not parameter:
            (contracted, batch) = op.params["dimension_numbers"]
            for array, axes in zip(read, contracted, strict=True):
                if array.axis is not None:
                    split = array.axis not in axes
                    if not split:
                        self._add_up(op.outputs[0], self.bytes_of(op.outputs[0]))
            attention = bool(batch[0]) and not parameters
            scores = frozenset(op.outputs) if attention and not scores else frozenset()
            if scores:
                aval = shapes[op.outputs[0]]
                elements = aval.size / (self._tensor if split else 1)
                queries = _itemsize(shapes[op.inputs[0]])
                self.scores[op.outputs[0]] = Scores(aval.shape, elements, queries)
        if op.name == "gather":
            split = False
        if op.name == "add_any" and all(array.number in self._partial for array in read):
            self._add_up(op.outputs[0], -self.bytes_of(op.outputs[0]), joint=True)
        sources = frozenset[int]().union(*(array.sources for array in read))
        for variable in op.outputs:
            size = self.bytes_of(variable, split)
            if op.name == "random_bits":
                size *= _RANDOM_BYTES / _itemsize(shapes[variable])
            facts = Array(variable, size, split, None, parameter, sources, scores)
            self.arrays[variable] = facts
            if not self._elementwise(op, variable) or self._worth_writing(op, facts):
                self._write(at, facts)

    def _worth_writing(self, op: Op, array: Array) -> bool:
        """Whether XLA writes the array instead of recomputing it in each loop that reads it."""
        boolean = self.program.shapes[array.number].dtype == bool
        if self._readers[array.number] < 2 or not array.sources or boolean:
            return False
        sources = sum(self.memory[n].bytes for n in array.sources if n in self.memory)
        return op.name in _EXPENSIVE or sources > 1.5 * array.bytes

    def _widens(self, op: Op) -> bool:
        """Whether a conversion widens or casts a parameter; XLA repeats it in each reader."""
        if op.name != "convert_element_type":
            return False
        before, after = (_itemsize(self.program.shapes[v]) for v in (*op.inputs, *op.outputs))
        return after >= before or self.get(op.inputs[0]).parameter

    def _elementwise(self, op: Op, output: int) -> bool:
        if op.name == "dot_general" or op.name.startswith("random"):
            return False
        shape = self.program.shapes[output].shape
        shapes = (self.program.shapes[variable].shape for variable in op.inputs)
        return op.name in _FUSED or all(_broadcasts(other, shape) for other in shapes)


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    same_rank = len(shape) == len(to)
    return shape == () or (same_rank and all(a in (1, b) for a, b in zip(shape, to, strict=True)))


def _readers(program: Program) -> list[int]:
    """Counts the operations that read each variable, directly or through `_MOVES`."""
    readers = [0] * len(program.shapes)
    for op in reversed(program.ops):
        for variable in op.inputs:
            readers[variable] += readers[op.outputs[0]] if op.name in _MOVES else 1
    return readers


def _moved_axis(op: Op, axis: int | None) -> int | None:
    """Returns an axis's position after a move; None if it is not tracked further."""
    match op.name:
        case _ if axis is None:
            return None
        case "transpose":
            return tuple(op.params["permutation"]).index(axis)
        case "reshape" | "broadcast_in_dim" | "squeeze" | "expand_dims":
            return None
    return axis


def _itemsize(aval: Any) -> int:
    """Bytes per element; 0 for random keys, which are negligible."""
    return np.dtype(aval.dtype).itemsize if isinstance(aval.dtype, np.dtype) else 0
