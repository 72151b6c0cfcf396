"""What a training step costs as the model, its context, its vocabulary or its devices grow.

    python benchmarks/scaling.py [--only width depth context vocab devices copies] [--turns 3]

One size changes at a time, from 4 layers of 256, 8 windows of 128, V 2048. "of the FLOPs" compares
a step's growth with that of its FLOPs: 1 is a cost that follows the work. `devices` splits the same
batch over 1, 2, 4 fake devices of the host, so the same work on the same cores, and what is above 1
is what partitioning costs; `copies` gives every device the same batch instead. Draws scaling.png.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After the path is set, so that it runs from anywhere.
from benchmarks.lib.contest import Contender, take_turns
from benchmarks.lib.flags import parser
from benchmarks.lib.report import publish
from benchmarks.lib.shapes import Shape

START = Shape(layers=4, width=256, heads=4, feed_forward=1024, vocab=2048, batch=8, time=128)
SWEEPS: dict[str, list[dict[str, int]]] = {
    "width": [{"width": d, "feed_forward": 4 * d} for d in (128, 256, 512, 1024)],
    "depth": [{"layers": n} for n in (2, 4, 8, 16)],
    "context": [{"time": t, "batch": 1} for t in (512, 1024, 2048, 4096, 8192)],
    "vocab": [{"vocab": v} for v in (256, 2048, 16384, 50257)],
    "devices": [{"devices": n} for n in (1, 2, 4, 8)],
    "copies": [{"devices": n, "batch": 2 * n} for n in (1, 2, 4, 8)],
}


def main() -> None:
    """A table of all sweeps, and a plot."""
    made = parser(__doc__, turns=3)
    made.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    flags = made.parse_args()
    rows: list[dict[str, Any]] = []
    for sweep in flags.only:
        rows += points(sweep, flags)
    publish("scaling", rows, {}, flags.out)
    plot(rows, flags.out / "scaling.png")


def points(sweep: str, flags: Any) -> list[dict[str, Any]]:
    """One row a size; the sizes take turns, so that all see the same minutes of the machine."""
    contenders, flops = [], []
    for sizes in SWEEPS[sweep]:
        words = ["train_step", "small", "--platform", flags.platform]
        whole = {**vars(START), **sizes}
        for name, value in whole.items():
            words += [f"--{name}", str(value)]
        contenders.append(Contender(str(next(iter(sizes.values()))), "ours", words))
        whole.pop("devices", None)
        flops.append(Shape(**whole).step_flops)
    finished = take_turns(contenders, flags.turns)
    first = finished[0].median
    return [
        {
            "sweep": sweep,
            "size": int(c.name),
            "ms a step": 1e3 * c.median,
            "min–max": c.spread,
            "of the first": c.median / first,
            "of the FLOPs": c.median / first / (f / flops[0]),
            "temporaries, MB": c.about["temporaries_MB"],
        }
        for c, f in zip(finished, flops, strict=True)
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel a sweep, both axes logarithmic, with a line of slope by FLOPs."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sweeps = list(dict.fromkeys(row["sweep"] for row in rows))
    lines = -(-len(sweeps) // 3)
    figure, axes = plt.subplots(
        lines, 3, figsize=(9, 3 * lines), squeeze=False, layout="constrained"
    )
    for axis, sweep in zip(axes.flat, sweeps, strict=False):
        mine = [row for row in rows if row["sweep"] == sweep]
        sizes = [row["size"] for row in mine]
        axis.loglog(sizes, [row["ms a step"] for row in mine], "o-", label="measured")
        by_flops = [row["ms a step"] / row["of the FLOPs"] for row in mine]
        axis.loglog(sizes, by_flops, ":", color="gray", label="as the FLOPs grow")
        axis.set(title=sweep, xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.tick_params("x", labelrotation=30)
        axis.set_ylabel("ms a step")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
