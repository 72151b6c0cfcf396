"""Step time as the model, its context, its vocabulary or the number of devices grows.

    python benchmarks/scaling.py [--only width depth context vocab devices copies] [--turns 3]

Each sweep changes one size of a model with 4 layers of 256, 8 windows of 128 and V 2048.
"time / FLOPs" is growth in time over growth in FLOPs; 1 means proportional. `devices` splits one
batch over 1, 2, 4 and 8 fake devices on the same cores, so anything above 1 is the cost of
partitioning. `copies` gives each device its own batch. Plots scaling.png.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# After setting the path, so that the program runs from any directory.
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
    """Prints a table of all sweeps and plots them."""
    made = parser(__doc__, turns=3)
    made.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    flags = made.parse_args()
    rows: list[dict[str, Any]] = []
    for sweep in flags.only:
        rows += points(sweep, flags)
    publish("scaling", rows, {}, flags.out)
    plot(rows, flags.out / "scaling.png")


def points(sweep: str, flags: Any) -> list[dict[str, Any]]:
    """Returns one row per size. The sizes take turns, so that load affects all of them."""
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
            "ms/step": 1e3 * c.median,
            "min–max": c.spread,
            "time / first": c.median / first,
            "time / FLOPs": c.median / first / (f / flops[0]),
            "temporaries, MB": c.about["temporaries_MB"],
        }
        for c, f in zip(finished, flops, strict=True)
    ]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plots one log-log panel per sweep, with a line proportional to FLOPs."""
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
        axis.loglog(sizes, [row["ms/step"] for row in mine], "o-", label="measured")
        by_flops = [row["ms/step"] / row["time / FLOPs"] for row in mine]
        axis.loglog(sizes, by_flops, ":", color="gray", label="proportional to FLOPs")
        axis.set(title=sweep, xticks=sizes, xticklabels=sizes)
        axis.minorticks_off()
        axis.tick_params("x", labelrotation=30)
        axis.set_ylabel("ms/step")
    axes[0][0].legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
