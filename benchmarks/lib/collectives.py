"""Communication volume per mesh axis of a compiled program, from its HLO text."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

WIDTHS = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "s8": 1, "u8": 1, "pred": 1}
_BEGINS = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_CALLS = re.compile(r"(body|condition|calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(rf"\b({'|'.join(WIDTHS)})\[([\d,]*)\]")
_CHANNEL = re.compile(r"channel_id=(\d+)")


def sent_over(hlo: str, mesh: dict[str, int]) -> dict[str, float]:
    """Returns the bytes that each device sends, per mesh axis.

    Assumes ring algorithms, as `planning/communication.py` does. Collectives in a loop count once
    per iteration. The axes of a collective over several are joined by "+".

    Args:
        hlo: `compiled.as_text()`.
        mesh: axis → size, in the order of device numbering.
    """
    bodies, entry = _computations(hlo)
    seen: set[str] = set()
    total: dict[str, float] = defaultdict(float)
    for name, times in _runs(bodies, entry):
        for line in bodies[name]:
            found, channel = _COLLECTIVE.search(line), _CHANNEL.search(line)
            # TPU programs spread one collective over many fusions with the same channel id.
            if found is None or (channel is not None and channel[1] in seen):
                continue
            if channel is not None:
                seen.add(channel[1])
            axes, n = _axes(line, mesh)
            size = sum(
                WIDTHS[kind] * math.prod(int(d) for d in shape.split(",") if d)
                for kind, shape in _ARRAY.findall(found[1])
            )
            total[axes] += times * _sent(found[2], size, n, bool(found[3]), name)
    return dict(total)


def _sent(kind: str, size: float, n: int, start: bool, computation: str) -> float:
    """Bytes sent for a result of `size` bytes; the result of a `-start` includes its operand."""
    others = (n - 1) / n
    match kind:
        case "all-reduce":
            once = "all-reduce-scatter" in computation  # TPU name of a fused reduce-scatter
            return (1 if once else 2) * others * size / (1 + start)
        case "all-gather":
            return others * (size * n / (n + 1) if start else size)
        case "reduce-scatter":
            return others * (size * n / (n + 1) if start else size * n)
        case "all-to-all":
            return others * size / (1 + start)
    return size / (1 + start)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if line[:1] not in (" ", "}") and (begins := _BEGINS.match(line)):
            name = begins[2]
            bodies[name] = []
            entry = name if begins[1] else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


def _runs(bodies: dict[str, list[str]], entry: str) -> Iterator[tuple[str, int]]:
    """Yields each reachable computation and how often it runs."""
    todo, seen = [(entry, 1)], {entry}
    while todo:
        name, times = todo.pop()
        yield name, times
        for line in bodies[name]:
            called = dict(_CALLS.findall(line))
            for kind, callee in called.items():
                if callee in bodies and callee not in seen:
                    seen.add(callee)
                    again = _trips(line, bodies, called) if kind == "body" else 1
                    todo.append((callee, times * again))


def _trips(loop: str, bodies: dict[str, list[str]], called: dict[str, str]) -> int:
    """Returns the trip count from the compiler, else from the loop condition's constant."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop):
        return int(known[1])
    condition = "".join(bodies[called["condition"]])
    limit = max(map(int, re.findall(r"constant\((\d+)\)", condition)), default=1)
    # Bidirectional windowed einsum on TPUs: the counter advances by two per iteration.
    return limit // 2 if "windowed_dot_general" in called["body"] else limit


def _axes(line: str, mesh: dict[str, int]) -> tuple[str, int]:
    """Returns the axes along which a collective's first group extends, and the group's size."""
    sizes = tuple(mesh.values())
    ids = np.arange(math.prod(sizes))
    if pairs := re.search(r"source_target_pairs=\{\{([\d,]+)\}", line):
        group = _numbers(pairs[1])
    elif named := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", line):
        own = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        chosen = re.findall(r"\w+", named[2])
        index = tuple(slice(None) if axis in chosen else 0 for axis in own)
        group = ids.reshape(tuple(map(int, own.values())))[index].ravel().tolist()
    elif iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        array = ids.reshape(_numbers(iota[2]))
        array = array.transpose(_numbers(iota[3])) if iota[3] else array
        group = array.reshape(_numbers(iota[1]))[0].tolist()
    elif listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        group = _numbers(listed[1])
    else:
        group = ids.tolist()
    places = np.array(np.unravel_index(group, sizes))
    differ = (places != places[:, :1]).any(axis=1)
    return "+".join(np.array(list(mesh))[differ]), len(group)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
