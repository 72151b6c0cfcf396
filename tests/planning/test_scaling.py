"""docs/scaling.md says what `plan` says: its commands run, and its tables hold their numbers."""

import json
import re
import shlex
from pathlib import Path

import pytest

from sheepop_jax.cli import plan as plan_command
from sheepop_jax.cli.main import main as command_line
from sheepop_jax.config.loading import load_config

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs/scaling.md").read_text()
COMMANDS = re.findall(r"^python -m sheepop_jax (plan .*)$", TEXT, re.MULTILINE)
ROWS = [words for words in COMMANDS if "--json" in words]  # of the tables, in their order

MFU = 0.4  # while a device computes
NODE = 8  # H100s that NVLink joins
STORAGE = 20e9  # bytes a second that a shared file system takes
TOKEN = 2  # bytes in a shard: uint16, with fewer than 65,536 ids


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[:60])
def test_commands_have_known_flags_and_fields(words):
    command, *rest = shlex.split(words)
    assert command == "plan"
    flags, overrides = plan_command.parse(rest)
    load_config(flags.config, overrides)


def bandwidth(plan, axis):
    """Bytes a second of the slowest link on an axis, as the page gives it.

    Devices are numbered tensor first, then fsdp, then data.
    """
    mesh = plan["mesh"]
    reach = {"tensor": mesh["tensor"], "fsdp": mesh["tensor"] * mesh["fsdp"]}
    here = reach.get(axis, plan["devices"]) <= NODE
    link = "ICI" if "TPU" in plan["device_kind"] else "NVLink" if here else "InfiniBand"
    [gigabytes] = re.findall(rf"\b{link}\s(\d+)\sGB/s", TEXT)
    return 1e9 * float(gigabytes)


def table(header):
    """The rows below a header, as lists of cells; the first two are the model and the devices."""
    lines = TEXT[TEXT.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_tables_are_those_of_the_plan(capsys):
    """Each row of the three tables, from one command."""
    main, traffic, storage = [], [], []
    for words in ROWS:
        capsys.readouterr()
        assert command_line(shlex.split(words)) == 0
        plan = json.loads(capsys.readouterr().out)
        size = {"1b3": "1.3B", "7b": "7B", "70b": "70B"}[re.search(r"scaling_(\w+)", words)[1]]
        head = [size, f"{plan['devices']} {plan['device_kind']}"]
        compute = plan["flops"] / (MFU * plan["peak_flops"])
        main.append(
            [
                *head,
                " x ".join(str(size) for size in plan["mesh"].values()),
                f"{plan['tokens'] / 1e6:.2f} M",
                f"{plan['memory']['total'] / 1e9:.1f} of {plan['device_memory'] / 1e9:.0f}",
                "yes" if plan["fits"] else "no",
                f"{plan['flops']:.2e}",
                f"{plan['seconds']:.2f}",
            ]
        )
        sent = plan["sent"]
        seconds = {axis: count / bandwidth(plan, axis) for axis, count in sent.items()}
        rest = seconds["data"] + seconds["fsdp"]
        worst = MFU * compute / (compute + seconds["tensor"] + rest)
        best = MFU * compute / (seconds["tensor"] + max(compute, rest))
        windows = plan["tokens"] // 2048
        traffic.append(
            [
                *head,
                ", ".join(f"{count / 1e9:.1f}" for count in sent.values()),
                ", ".join(f"{value:.2f}" for value in seconds.values()),
                f"{compute:.2f}",
                f"{worst:.0%} to {best:.0%}",
                f"{windows * rest / compute:.0f} of {windows}",
            ]
        )
        size, data = 12 * plan["parameters"], plan["tokens"] * TOKEN / compute
        storage.append(
            [
                *head,
                f"{size / 1e9:.0f}",
                f"{size / STORAGE:.0f}",
                f"{1 / compute:.2f}",
                f"{data / 1e6:.1f}",
            ]
        )
    assert len(ROWS) == 10
    assert table("| model | devices | data x fsdp x tensor |") == main
    assert table("| model | devices | GB sent: data, fsdp, tensor |") == traffic
    assert table("| model | devices | checkpoint, GB |") == storage
