"""Killed at every named point, and at random: the finished run is the one never killed."""

import os
import random
import statistics

import pytest

from tests.faults.harness import KILLED, Runner, fault_names, outcome

# Point → passings at which to die: the first, and a later one.
POINTS = {
    "config-write": (1,),
    "log-append": (1, 9),
    "evaluation": (1, 2),
    "save-begun": (1, 4),
    "save-writing": (1, 3),
    "save-written": (1, 3),
    "before-manifest": (1, 4),
    "before-rename": (1, 4),
    "after-rename": (1, 4),
    "mid-prune": (1, 2),
}
KILLS = int(os.environ.get("SHEEPOP_JAX_KILLS", "20"))


def test_every_point_of_the_package_is_in_the_matrix():
    names = fault_names()
    assert sorted(names) == sorted(POINTS), "each once, and each with a row in POINTS"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "nth"), [(n, k) for n, ks in POINTS.items() for k in ks])
def test_killed_at_a_point_the_run_ends_the_same(name, nth, runner, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    killed = runner.run(workdir, fault=f"{name}:{nth}")
    assert killed.code == KILLED, killed.stderr
    if name == "evaluation":
        assert killed.stderr.count("held-out: ") == nth
    elif name == "log-append":
        text = (workdir / "metrics.jsonl").read_text()
        assert text.count("\n") == nth - 1 and not text.endswith("\n"), "a line must be torn"
    elif name == "mid-prune":
        assert killed.saved == ([2, 4], [2, 4, 6, 8])[nth - 1]
    elif name != "config-write":
        assert killed.saved == [2, 4, 6, 8][: nth - 1]
    checkpoints = workdir / "checkpoints"
    left = sorted(p.name for p in checkpoints.iterdir()) if checkpoints.exists() else []
    again = runner.run(workdir)
    assert again.code == 0, again.stderr
    assert "Traceback" not in again.stderr and "damaged" not in again.stderr
    # What was said to be saved, or has its final name, is what it goes on from.
    whole = [int(n) for n in left if n.isdecimal()]
    assert again.began_at == max([*killed.saved, *whole, 0])
    if name in ("save-begun", "log-append", "evaluation", "config-write"):
        assert not any(n.startswith(".") for n in left)
    elif name == "mid-prune":
        assert any(n.startswith(".deleted-") for n in left)
    elif name != "after-rename":
        assert any(n.startswith(".pending-") for n in left), left
    assert outcome(workdir) == undisturbed


def test_killed_in_its_first_save_a_run_begins_again_and_says_so(runner, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    assert runner.run(workdir, fault="save-writing").code == KILLED
    [half] = (workdir / "checkpoints").iterdir()
    files = [p for p in half.rglob("*") if p.is_file()]
    assert half.name.startswith(".pending-00000002") and files, "it must be half-written"
    assert not any(p.name == "manifest.json" for p in files)
    again = runner.run(workdir)
    assert again.code == 0 and "no checkpoint yet: beginning at step 0" in again.stderr
    assert outcome(workdir) == undisturbed


DROPPED_RNG = """
import dataclasses
from sheepop_jax.training import trainer
make = trainer.make_train_step
def made(*arguments):
    step = make(*arguments)
    def stepped(state, batch):
        new, metrics = step(dataclasses.replace(state, step=0 * state.step), batch)
        return dataclasses.replace(new, step=state.step + 1), metrics
    return stepped
trainer.make_train_step = made
"""
SHIFTED_CURSOR = """
from sheepop_jax.data.batches import TrainBatches
iterate = TrainBatches.iterate
TrainBatches.iterate = lambda self, start, stop: iterate(self, start + 1, stop + 1)
"""
ZEROED_COUNT = """
import dataclasses, jax, optax
from sheepop_jax.training.checkpoint import Checkpoints
restore = Checkpoints.restore
adam = lambda x: isinstance(x, optax.ScaleByAdamState)
def zeroed(self, step, target):
    state, found = restore(self, step, target), []
    def zero(x):
        if adam(x):
            found.append(x)
            return x._replace(count=0 * x.count)
        return x
    opt_state = jax.tree.map(zero, state.opt_state, is_leaf=adam)
    if not found:
        sys.exit("no state of Adam's")
    return dataclasses.replace(state, opt_state=opt_state)
Checkpoints.restore = zeroed
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("patch", "differs"),
    [("pass", False), (DROPPED_RNG, True), (SHIFTED_CURSOR, True), (ZEROED_COUNT, True)],
    ids=["nothing", "dropout's step", "data cursor", "Adam's count"],
)
def test_the_comparison_sees_a_wrong_resume(patch, differs, runner, undisturbed, tmp_path):
    """Negative controls: a comparison that passes whatever happens would pass all the above."""
    workdir = tmp_path / "run"
    assert runner.run(workdir, fault="after-rename:2").code == KILLED
    again = runner.run(workdir, patch=patch)
    assert again.code == 0 and again.began_at == 4, again.stderr
    found = outcome(workdir)
    for part in ("checkpoints", "log"):
        assert (found[part] != undisturbed[part]) == differs, part
    assert found["log"][:3] == undisturbed["log"][:3]


@pytest.mark.slow
def test_random_kills_lose_nothing(shared, tmp_path, capsys):
    """`make soak` runs it with 200 kills; SHEEPOP_JAX_SEED repeats one."""
    seed = int(os.environ.get("SHEEPOP_JAX_SEED", random.randrange(10**6)))
    draw, runner = random.Random(seed), Runner(shared, {"train.num_steps": 40})
    say(capsys, f"\n{KILLS} random kills, SHEEPOP_JAX_SEED={seed}")
    runner.run(tmp_path / "warm")  # compiled, and the data prepared
    whole = runner.run(tmp_path / "whole")
    assert whole.code == 0, whole.stderr
    expected = outcome(tmp_path / "whole")
    kills = losses = finished = 0
    resumes, phases = [], {"before training": 0, "training": 0, "saving": 0}
    while kills < KILLS:
        workdir, saved, code = tmp_path / f"run{finished}", 0, None
        while code != 0:
            # A run that goes on has less to do: not so late that few are killed.
            after = draw.uniform(0, 0.7 * whole.seconds) if kills < KILLS else None
            result = runner.run(workdir, kill_after=after)
            code = result.code
            assert code in (0, -9), result.stderr
            if result.began_at is not None:
                losses += result.began_at < saved
                if result.began_at and result.seconds_to_first_step:
                    resumes.append(result.seconds_to_first_step)
            saved = max([saved, *result.saved])
            if code == -9:
                kills += 1
                pending = any((workdir / "checkpoints").glob(".pending-*"))
                trained = result.seconds_to_first_step > 0
                phases[
                    "saving"
                    if pending and trained
                    else "training"
                    if trained
                    else "before training"
                ] += 1
        finished += 1
        if outcome(workdir) != expected:
            losses += 1
            say(capsys, f"{workdir} differs")
    median = statistics.median(resumes) if resumes else float("nan")
    say(
        capsys,
        f"{kills} kills in {finished} runs ({', '.join(f'{n} {k}' for k, n in phases.items())}), "
        f"{losses} losses, median time to the first step after a resume {median:.1f} s",
    )
    assert losses == 0


def say(capsys, line):
    with capsys.disabled():
        print(line, flush=True)
