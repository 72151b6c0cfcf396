"""Killed at every named point, and at random: the finished run is the one never killed."""

import dataclasses
import os
import random
import shutil

import jax
import optax
import pytest

from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.data.loader import TrainBatches
from sheepop_jax.training import loop
from tests.faults.conftest import POINTS
from tests.faults.harness import (
    DAMAGED,
    FINISHED_BEFORE,
    FRESH,
    KILLED,
    STEP,
    Here,
    fault_names,
    outcome,
)

pytestmark = pytest.mark.usefixtures("fast_compile")

KILLS = int(os.environ.get("SHEEPOP_JAX_KILLS", "4"))


def test_every_point_of_the_package_is_in_the_matrix():
    names = fault_names()
    assert sorted(names) == sorted([*POINTS, "save-writing"]), "each once, each with a row"


def check_files(name, nth, workdir, saved):
    """What must be in a directory after a kill, and its names under checkpoints/."""
    if name == "log-append":
        text = (workdir / "metrics.jsonl").read_text()
        assert text.count("\n") == nth - 1 and not text.endswith("\n"), "a line must be torn"
    elif name == "mid-prune":
        assert saved == ([2, 4], [2, 4, 6, 8])[nth - 1]
    elif name not in ("config-write", "evaluation"):
        assert saved == [2, 4, 6, 8][: nth - 1]
    checkpoints = workdir / "checkpoints"
    left = sorted(p.name for p in checkpoints.iterdir()) if checkpoints.exists() else []
    if name in ("save-begun", "log-append", "evaluation", "config-write"):
        assert not any(n.startswith(".") for n in left)
    elif name == "mid-prune":
        assert any(n.startswith(".deleted-") for n in left)
    elif name != "after-rename":
        assert any(n.startswith(".pending-") for n in left), left
    return left


def check_resumed(again, saved, left):
    """A run resumes from the newest step that was reported as saved or has its final name."""
    assert not DAMAGED.search(again.said)
    assert again.began_at == max([*saved, *(int(n) for n in left if n.isdecimal()), 0])


@pytest.mark.parametrize(("name", "nth"), [(n, k) for n, ks in POINTS.items() for k in ks])
def test_resumed_from_what_a_kill_leaves_the_run_ends_the_same(
    name, nth, here, undisturbed, snapshots, tmp_path
):
    snapshot = snapshots[name, nth]
    workdir = shutil.copytree(snapshot.path, tmp_path / "run")
    left = check_files(name, nth, workdir, snapshot.said.saved)
    again = here.run(workdir)
    check_resumed(again, snapshot.said.saved, left)
    assert outcome(workdir) == undisturbed


@pytest.fixture(scope="module")
def undisturbed_process(runner, tmp_path_factory):
    """The run of a process that nobody killed, and its outcome."""
    workdir = tmp_path_factory.mktemp("process") / "run"
    result = runner.run(workdir)
    assert result.code == 0, result.said
    return result, outcome(workdir)


def test_a_process_killed_in_a_save_a_log_line_and_a_deletion_ends_the_same(
    runner, undisturbed_process, tmp_path
):
    """One run that dies three times."""
    workdir = tmp_path / "run"
    assert runner.run(workdir, fault="save-writing:1").code == KILLED
    [half] = (workdir / "checkpoints").iterdir()
    files = [p for p in half.rglob("*") if p.is_file()]
    assert half.name.startswith(".pending-00000002") and files, "it must be half-written"
    assert not any(p.name == "manifest.json" for p in files)

    second = runner.run(workdir, fault="log-append:9")
    assert second.code == KILLED and FRESH.search(second.said), second.said
    text = (workdir / "metrics.jsonl").read_text()
    assert text.count("\n") == 8 and not text.endswith("\n"), "a line must be torn"

    third = runner.run(workdir, fault="mid-prune:1")
    assert third.code == KILLED and third.began_at >= max(second.saved), third.said
    assert any(p.name.startswith(".deleted-") for p in (workdir / "checkpoints").iterdir())

    last = runner.run(workdir)
    assert last.code == 0 and last.began_at >= max(third.saved, default=0), last.said
    assert last.began_at < 8 or FINISHED_BEFORE.search(last.said)
    assert outcome(workdir) == undisturbed_process[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "nth"),
    [(n, k) for n, ks in {**POINTS, "save-writing": (1, 3)}.items() for k in ks],
)
def test_a_process_killed_at_a_point_ends_the_same(
    name, nth, runner, undisturbed_process, tmp_path
):
    """Every point with a real process; the copies of a run's files show the same but for one."""
    workdir = tmp_path / "run"
    killed = runner.run(workdir, fault=f"{name}:{nth}")
    assert killed.code == KILLED, killed.said
    left = check_files(name, nth, workdir, killed.saved)
    again = runner.run(workdir)
    assert again.code == 0 and "Traceback" not in again.said, again.said
    check_resumed(again, killed.saved, left)
    assert outcome(workdir) == undisturbed_process[1]


def dropped_rng(patch):
    """Dropout of the first step in every step."""
    make = loop.make_train_step

    def made(*arguments):
        step = make(*arguments)

        def stepped(state, *others):
            new, metrics = step(dataclasses.replace(state, step=0 * state.step), *others)
            return dataclasses.replace(new, step=state.step + 1), metrics

        return stepped

    patch.setattr(loop, "make_train_step", made)


def shifted_cursor(patch):
    """The batches of one step later."""
    iterate = TrainBatches.iterate

    def shifted(self, start, stop):
        return iterate(self, start + 1, stop + 1)

    patch.setattr(TrainBatches, "iterate", shifted)


def zeroed_count(patch):
    """Adam's count of updates, which corrects its bias, begins anew."""
    restore = CheckpointSaver.restore

    def is_adam(x):
        return isinstance(x, optax.ScaleByAdamState)

    def zeroed(self, step, target):
        state, found = restore(self, step, target), []

        def zero(x):
            if is_adam(x):
                found.append(x)
                return x._replace(count=0 * x.count)
            return x

        opt_state = jax.tree.map(zero, state.opt_state, is_leaf=is_adam)
        assert found
        return dataclasses.replace(state, opt_state=opt_state)

    patch.setattr(CheckpointSaver, "restore", zeroed)


@pytest.mark.parametrize("wrong", [dropped_rng, shifted_cursor, zeroed_count])
def test_the_comparison_sees_a_wrong_resume(
    wrong, here, undisturbed, snapshots, tmp_path, monkeypatch
):
    """Negative controls: a comparison that passes whatever happens would pass all the above."""
    workdir = shutil.copytree(snapshots["after-rename", 2].path, tmp_path / "run")
    wrong(monkeypatch)
    # Only one of them is in the step: it needs a compiled step of its own.
    runs = Here(here.directory) if wrong is dropped_rng else here
    assert runs.run(workdir).began_at == 4
    found = outcome(workdir)
    for part in ("checkpoints", "log"):
        assert found[part] != undisturbed[part], part
    assert found["log"][:3] == undisturbed["log"][:3]


def test_random_kills_lose_nothing(runner, undisturbed_process, tmp_path, capsys):
    """Real SIGKILLs after a random line of stderr and a random wait.

    `make soak` runs it with 200 kills; SHEEPOP_JAX_SEED repeats one.
    """
    seed = int(os.environ.get("SHEEPOP_JAX_SEED", random.randrange(10**6)))
    draw = random.Random(seed)
    say(capsys, f"\n{KILLS} random kills, SHEEPOP_JAX_SEED={seed}")
    whole, expected = undisturbed_process
    kills = losses = finished = 0
    phases = {"before training": 0, "training": 0, "saving": 0}
    while kills < KILLS:
        workdir, saved, code = tmp_path / f"run{finished}", 0, None
        while code != 0:
            number = draw.randrange(1, len(whole.at))
            wait = draw.uniform(0, whole.at[number] - whole.at[number - 1])
            kill_at = (number, wait) if kills < KILLS else None
            result = runner.run(workdir, kill_at=kill_at)
            code = result.code
            assert code in (0, -9), result.said
            if result.began_at is not None:
                losses += result.began_at < saved
            saved = max([saved, *result.saved])
            if code == -9:
                kills += 1
                pending = any((workdir / "checkpoints").glob(".pending-*"))
                trained = STEP.search(result.said)
                phase = "saving" if pending else "training"
                phases[phase if trained else "before training"] += 1
        finished += 1
        if outcome(workdir) != expected:
            losses += 1
            say(capsys, f"{workdir} differs")
    shown = ", ".join(f"{n} {k}" for n, k in phases.items())
    say(capsys, f"{kills} kills in {finished} runs ({shown}), {losses} losses")
    assert losses == 0


def say(capsys, line):
    with capsys.disabled():
        print(line, flush=True)
