"""docs/scaling.md says what the program says: its tables and its commands."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks import paper_plan
from sheepop_jax import __main__ as tools
from sheepop_jax.cli import common

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs/scaling.md").read_text()
COMMANDS = re.findall(r"^python -m sheepop_jax (plan .*)$", TEXT, re.MULTILINE)


TABLES = ["main_table", "traffic_table", "storage_table"]


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_tables_are_those_of_the_program(table):
    assert getattr(paper_plan, table)() in TEXT, "python benchmarks/paper_plan.py prints them"


def test_each_table_has_the_first_row_of_the_program(monkeypatch):
    monkeypatch.setattr(paper_plan, "ROWS", paper_plan.ROWS[:1])
    for table in TABLES:
        assert f"\n{getattr(paper_plan, table)()}\n" in TEXT, table


def test_every_row_has_its_command():
    assert paper_plan.commands() in TEXT


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[:40])
def test_commands_have_known_flags_and_fields(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags, overrides = tools.parse(shlex.split(words))
    common.load_config(flags.config, overrides)


def test_bandwidths_are_those_of_the_text():
    for name, bandwidth in paper_plan.LINKS.items():
        assert re.search(rf"{name}.*\b{bandwidth / 1e9:.0f} GB/s", TEXT), name
