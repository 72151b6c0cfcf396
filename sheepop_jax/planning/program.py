"""Traced functions as flat lists of operations, and the FLOPs of their matmuls."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax.extend import core


class Op(NamedTuple):
    """One operation on numbered variables."""

    name: str
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass
class Program:
    """A jaxpr with all calls inlined.

    Attributes:
        ops: operations in program order.
        inputs: input variables.
        outputs: output variables.
        shapes: variable → abstract value.
    """

    ops: list[Op] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    shapes: list[Any] = field(default_factory=list)


def flatten(closed: core.ClosedJaxpr) -> Program:
    """Inlines all calls (jit, remat, custom derivatives); loops and branches remain operations."""
    program = Program()

    def new(aval: Any) -> int:
        program.shapes.append(aval)
        return len(program.shapes) - 1

    def visit(jaxpr: Any, arguments: Sequence[int]) -> list[int]:
        names = dict(zip(jaxpr.invars, arguments, strict=True))
        names |= {var: new(var.aval) for var in jaxpr.constvars}

        def read(var: Any) -> int:
            return new(var.aval) if isinstance(var, core.Literal) else names[var]

        for eqn in jaxpr.eqns:
            inputs = tuple(map(read, eqn.invars))
            inner = _called(eqn)
            if inner is not None:
                outputs = tuple(visit(inner, inputs))
            else:
                outputs = tuple(new(var.aval) for var in eqn.outvars)
                program.ops.append(Op(eqn.primitive.name, eqn.params, inputs, outputs))
            names |= dict(zip(eqn.outvars, outputs, strict=True))
        return [read(var) for var in jaxpr.outvars]

    program.inputs = tuple(new(var.aval) for var in closed.jaxpr.invars)
    program.outputs = tuple(visit(closed.jaxpr, program.inputs))
    return program


def _called(eqn: Any) -> Any:
    """Returns the jaxpr that an equation calls once, or None."""
    if eqn.primitive.name in ("scan", "while", "cond", "reduce"):
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    return next(_jaxprs(eqn.params[name] for name in names if name in eqn.params), None)


def dot_flops(jaxpr: Any) -> int:
    """Counts the FLOPs of a jaxpr's matmuls: 2 per result element and contracted index.

    A `scan` counts once per iteration, a `while` loop once, and a `cond` as its most expensive
    branch.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * terms * eqn.outvars[0].aval.size
            continue
        inner = [dot_flops(sub) for sub in _jaxprs(eqn.params.values())]
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        if inner:
            total += times * (max(inner) if eqn.primitive.name == "cond" else sum(inner))
    return total


def _jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value
        elif isinstance(value, list | tuple):
            yield from _jaxprs(value)
