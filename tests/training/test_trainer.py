"""The loop: exactly N updates, everything when it is due, and going on where it stopped."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import threading
import time

import jax
import numpy as np
import pytest

from sheepop_jax.checkpoint import storage, workdir
from sheepop_jax.checkpoint.checkpoints import MANIFEST
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.checkpoint.workdir import DirectoryLost, HeldDirectory
from sheepop_jax.config.schema import MeshConfig
from sheepop_jax.data.loader import PackingConfig, TrainBatches
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.errors import InputError, RunFailed
from sheepop_jax.model.partitioning import make_mesh
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.runtime import distributed
from sheepop_jax.training import loop, resume
from sheepop_jax.training.divergence import TrainingDiverged
from sheepop_jax.training.loop import Job, fit
from sheepop_jax.training.metrics import read_metrics
from sheepop_jax.training.signals import StopRequested, StopSignal
from sheepop_jax.training.throughput import Throughput
from tests.faults.harness import DAMAGED, SAVED

pytestmark = pytest.mark.usefixtures("fast_compile")

VOCAB = 101
FIGURES = {"val_perplexity": 2.0, "val_bits_per_byte": 1.0, "val_accuracy": 0.5}
COMPILED = {}  # by all that a step depends on


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """Runs share one compiled step, and draw no curves; `monkeypatch.undo()` takes it back."""
    compile_step, jit_init = loop._Loop._compile, resume.jit_init

    def compiled(self, batch):
        config = self.job.config
        assert config.optimizer.schedule == "constant"  # else it depends on the number of steps
        key = repr((config.model, config.optimizer, batch.inputs.shape))
        if key not in COMPILED:
            COMPILED[key] = compile_step(self, batch)
        return COMPILED[key]

    def initialised(fresh, shardings):
        if "init" not in COMPILED:
            COMPILED["init"] = jit_init(fresh, shardings)
        return COMPILED["init"]

    monkeypatch.setattr(loop._Loop, "_compile", compiled)
    monkeypatch.setattr(resume, "jit_init", initialised)
    monkeypatch.setattr(loop, "draw_curve", lambda directory: None)


@pytest.fixture
def make_job(make_config, tmp_path):
    """`make_job(num_steps=…, …)`: a run of a tiny model on random tokens."""

    def make(num_steps=7, evaluate=None, overrides=None, directory=tmp_path):
        settings = {
            "train.log_every": 1,
            "train.eval_every": 3,
            "checkpoint.save_every": 2,
            "train.num_steps": num_steps,
            "model.num_layers": 1,
            "optimizer.schedule": "constant",
        }
        config = make_config({**settings, **(overrides or {})})
        tokens = np.random.default_rng(0).integers(0, VOCAB, 500, dtype=np.int32)
        batches = TrainBatches(
            [TokenStream.from_array(tokens, 1, 1)],
            PackingConfig.of(config.data, end_of_text=0),
            seed=config.seed,
            accum=config.train.grad_accum_steps,
            batch_size=config.train.batch_size,
        )
        return Job(
            config=config,
            directory=directory,
            model=Transformer(config.model, VOCAB),
            mesh=make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]),
            batches=batches,
            num_steps=num_steps,
            evaluate=evaluate or (lambda params: {"val_loss": 3.0, **FIGURES}),
            sample=lambda params: "text",
            flops_per_token=1.0,
            peak_flops=0.0,
        )

    return make


def training_lines(directory):
    return [line for line in read_metrics(directory) if "loss" in line]


def arrays_of(job):
    """All arrays of the newest checkpoint of a finished run."""
    checkpoints = CheckpointSaver(job.directory / "checkpoints")
    root = job.directory / "checkpoints" / f"{checkpoints.steps()[-1]:08d}"
    import orbax.checkpoint as ocp

    restored = [ocp.StandardCheckpointer().restore(root / name) for name in ("params", "optimizer")]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def test_n_steps_are_n_updates_and_the_last_is_evaluated_and_saved(make_job, monkeypatch):
    drawn = []
    monkeypatch.setattr(loop, "draw_curve", drawn.append)
    job = make_job(num_steps=7)
    fit(job, StopSignal())
    lines = read_metrics(job.directory)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6, 7]
    checkpoints = CheckpointSaver(job.directory / "checkpoints")
    assert checkpoints.steps() == [3, 6, 7]  # the best (the first of equals) and the latest two
    assert len(drawn) == 6 and set(drawn) == {job.directory}  # with each save, and at the end
    train, is_val = lines[-2:]
    assert {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second"} <= set(train)
    assert (train["tokens"], train["epoch"]) == (7 * 5 * 2 * 13, job.batches.epochs(7))
    names = {"val_loss", "val_perplexity", "val_bits_per_byte", "val_accuracy", "train_seconds"}
    assert names <= set(is_val)


def test_only_an_evaluated_step_is_saved_with_held_out_figures(make_job):
    job = make_job(num_steps=7, overrides={"checkpoint.keep": 9})
    fit(job, StopSignal())
    checkpoints = CheckpointSaver(job.directory / "checkpoints")
    evaluated = {s: "val_loss" in checkpoints.manifest(s)["figures"] for s in checkpoints.steps()}
    assert evaluated == {2: False, 3: True, 4: False, 6: True, 7: True}


def test_steps_between_those_due_are_not_logged_and_samples_are_shown(make_job, capsys):
    job = make_job(num_steps=5, overrides={"train.log_every": 2, "train.eval_every": 0})
    fit(job, StopSignal())
    assert [line["step"] for line in training_lines(job.directory)] == [2, 4, 5]
    shown = capsys.readouterr().err
    assert shown.count("sample: text\n") == 1
    assert f"epoch {job.batches.epochs(4):.2f}  520 tokens  " in shown


def test_a_line_is_in_the_file_while_the_run_goes_on(make_job):
    """That of a step is written while the next one runs."""
    job = make_job(num_steps=4, overrides={"train.eval_every": 0, "checkpoint.save_every": 0})
    written = []

    class Watching(StopSignal):
        def check(self):
            written.append([line["step"] for line in training_lines(job.directory)])

    fit(job, Watching())
    assert written[-3:] == [[], [1], [1, 2]]  # before steps 2, 3 and 4


def test_the_logged_loss_is_the_mean_since_the_last_line(make_job, tmp_path):
    """Also where a run was resumed between two lines."""
    every = make_job(num_steps=7, directory=tmp_path / "every")
    every.directory.mkdir()
    fit(every, StopSignal())
    losses = [line["loss"] for line in training_lines(every.directory)]
    assert losses == [line["step_loss"] for line in training_lines(every.directory)]
    means = [np.mean(losses[:3]), np.mean(losses[3:6]), losses[6]]
    for name, parts in (("whole", [7]), ("parts", [4, 7])):
        directory = tmp_path / name
        directory.mkdir()
        for last in parts:
            overrides = {"train.log_every": 3, "train.eval_every": 0, "checkpoint.save_every": 2}
            job = make_job(num_steps=7, overrides=overrides, directory=directory)
            stop = StopSignal()
            if last < 7:
                stop = StopAt(CheckpointSaver(directory / "checkpoints"), last)
            with contextlib.suppress(StopRequested):
                fit(job, stop)
        lines = training_lines(directory)
        assert [line["step"] for line in lines] == [3, 6, 7]
        assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-7)
        assert [line["step_loss"] for line in lines] == [losses[2], losses[5], losses[6]]


class StopAt(StopSignal):
    """A signal that comes once a step is saved."""

    def __init__(self, checkpoints, step):
        super().__init__()
        self._checkpoints, self._step = checkpoints, step

    def check(self):
        if self._step in self._checkpoints.steps():
            raise StopRequested("SIGTERM")


def test_skipped_updates_do_not_count_in_the_mean():
    mean = loop.MeanLoss()
    for loss in (2.0, None, 4.0):
        mean.add(loss)
    assert (mean.take(default=9.0), mean.take(default=9.0)) == (3.0, 9.0)


def test_another_process_than_the_first_writes_no_log(make_job, capsys, monkeypatch):
    job = make_job(num_steps=2)
    monkeypatch.setattr(distributed, "is_main_process", lambda: False)
    fit(job, StopSignal())
    assert [entry.name for entry in job.directory.iterdir()] == ["checkpoints"]
    assert capsys.readouterr().err == ""


def test_the_clock_counts_updates_only_and_goes_on_after_a_restart(make_job, monkeypatch):
    clock, evaluations = time.perf_counter, []
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 1e4 * len(evaluations))

    def evaluate(params):
        evaluations.append(params)  # takes hours
        return {"val_loss": 3.0, **FIGURES}

    for num_steps in (3, 6):
        overrides = {"train.eval_every": 1, "checkpoint.keep": 9}
        fit(make_job(num_steps=num_steps, evaluate=evaluate, overrides=overrides), StopSignal())
    job = make_job()
    lines = training_lines(job.directory)
    seconds = [0.0] + [line["train_seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[-1] < 1e4
    for line, before, after in zip(lines, seconds[:-1], seconds[1:], strict=True):
        tokens = line["tokens_per_second"] * (after - before)
        if line["step"] != 4:  # a session of its own starts from what was saved, a little later
            assert tokens == pytest.approx(2 * 5 * 13)
    figures = CheckpointSaver(job.directory / "checkpoints").manifest(3)["figures"]
    assert seconds[3] <= figures["train_seconds"] <= seconds[4]
    resumed = lines[3]["tokens_per_second"] * (seconds[4] - figures["train_seconds"])
    assert resumed == pytest.approx(2 * 5 * 13)


def test_the_state_is_donated(make_job):
    held = []

    def evaluate(params):
        held.append(params)
        return {"val_loss": 3.0, **FIGURES}

    fit(make_job(num_steps=2, evaluate=evaluate, overrides={"train.eval_every": 1}), StopSignal())
    assert [leaf.is_deleted() for leaf in jax.tree.leaves(held[0])].count(False) == 0


def test_who_settles_memory_is_told_of_the_step_once(make_job, monkeypatch):
    monkeypatch.undo()
    told = []
    job = make_job(num_steps=3)
    fit(dataclasses.replace(job, on_compiled=lambda *figures: told.append(figures)), StopSignal())
    [(flops, temporaries)] = told
    assert (job.directory / "training_curve.png").exists()
    lines = training_lines(job.directory)
    a_token = lines[-1]["flops_per_second"] / lines[-1]["tokens_per_second"]
    train = job.config.train
    tokens = train.batch_size * train.grad_accum_steps * job.config.data.seq_len
    assert flops == pytest.approx(tokens * a_token)
    assert 1e4 < temporaries < 1e9


@pytest.mark.parametrize("first", [2, 3])
def test_a_run_in_two_parts_is_the_run_in_one(make_job, tmp_path, first):
    whole = make_job(num_steps=5, directory=tmp_path / "whole")
    parts = make_job(num_steps=5, directory=tmp_path / "parts")
    for job in (whole, parts):
        job.directory.mkdir()
    fit(whole, StopSignal())
    stop = StopSignal()

    class StopAt(StopSignal):
        """Asks to stop once the loop has done `first` steps."""

        def __init__(self):
            super().__init__()
            self.looked = 0

        def check(self):
            self.looked += 1
            if self.looked == first + 1:
                raise StopRequested("test")

        def something_to_save(self, agreed):
            assert self.looked == 0

    with pytest.raises(StopRequested):
        fit(parts, StopAt())
    assert CheckpointSaver(parts.directory / "checkpoints").steps()[-1] == first
    fit(parts, stop)
    for a, b in zip(training_lines(whole.directory), training_lines(parts.directory), strict=True):
        assert (a["step"], a["loss"], a["grad_norm"]) == (b["step"], b["loss"], b["grad_norm"])
    for a, b in zip(arrays_of(whole), arrays_of(parts), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_finished_run_is_left_alone(make_job):
    job = make_job(num_steps=3)
    expected = fit(job, StopSignal())
    before = read_metrics(job.directory)
    assert fit(job, StopSignal()) == expected != {}
    assert read_metrics(job.directory) == before


def test_a_damaged_newest_checkpoint_costs_only_its_own_steps(make_job, caplog):
    job = make_job(num_steps=4)
    fit(job, StopSignal())
    newest = job.directory / "checkpoints" / "00000004"
    (newest / MANIFEST).write_text("{}")
    fit(job, StopSignal())
    assert DAMAGED.search(caplog.text)
    assert CheckpointSaver(job.directory / "checkpoints").steps()[-1] == 4
    assert [line["step"] for line in training_lines(job.directory)] == [1, 2, 3, 4]


def test_only_damaged_checkpoints_are_an_error_not_a_fresh_start(make_job):
    job = make_job(num_steps=2)
    fit(job, StopSignal())
    (job.directory / "checkpoints" / "00000002" / MANIFEST).unlink()
    with pytest.raises(InputError) as error:
        fit(job, StopSignal())
    assert error.value.field == str(job.directory / "checkpoints")


def test_the_best_by_validation_loss_is_kept(make_job):
    losses = iter([2.0, 1.0, 3.0, 4.0])

    def evaluate(params):
        return {"val_loss": next(losses), **FIGURES}

    overrides = {"train.eval_every": 2, "checkpoint.save_every": 0, "checkpoint.keep": 1}
    job = make_job(num_steps=7, evaluate=evaluate, overrides=overrides)
    fit(job, StopSignal())
    checkpoints = CheckpointSaver(job.directory / "checkpoints")
    assert (checkpoints.best(), checkpoints.steps()) == (4, [4, 7])


def test_a_restart_remembers_the_best(make_job):
    losses = iter([2.0, 1.0, 1.5, 3.0])

    def evaluate(params):
        return {"val_loss": next(losses), **FIGURES}

    overrides = {"train.eval_every": 1, "checkpoint.save_every": 0, "checkpoint.keep": 9}
    for num_steps in (2, 4):
        fit(make_job(num_steps, evaluate, overrides), StopSignal())
    # Step 3 is the best of the second session, but not of the run.
    assert CheckpointSaver(make_job().directory / "checkpoints").steps() == [1, 2, 4]


def test_a_save_that_fails_does_not_hide_what_ended_the_run(make_job, monkeypatch, caplog):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    def evaluate(params):
        raise ZeroDivisionError

    monkeypatch.setattr(CheckpointSaver, "_write", full)
    with pytest.raises(ZeroDivisionError):
        fit(make_job(evaluate=evaluate), StopSignal())
    assert "00000002: not saved" in caplog.text


def test_a_stop_during_evaluation_saves_the_step(make_job):
    def evaluate(params):
        raise StopRequested("SIGTERM")

    job = make_job(num_steps=7, evaluate=evaluate)
    with pytest.raises(StopRequested):
        fit(job, StopSignal())
    assert CheckpointSaver(job.directory / "checkpoints").steps() == [2, 3]


def test_non_finite_updates_in_a_row_end_the_run(make_job, monkeypatch):
    job = make_job(num_steps=9, overrides={"train.max_skipped_steps": 3, "train.eval_every": 0})
    whole = TrainBatches.batch_at

    def poisoned(self, step):
        batch = whole(self, step)
        return batch._replace(weights=batch.weights * np.float32(np.inf if step > 1 else 1))

    monkeypatch.setattr(TrainBatches, "batch_at", poisoned)
    with pytest.raises(TrainingDiverged, match="3 .* at step 5"):
        fit(job, StopSignal())
    skipped = [line["step"] for line in training_lines(job.directory) if line["skipped"]]
    assert skipped == [3, 4]


def test_skipped_updates_that_are_not_in_a_row_end_nothing(make_job, monkeypatch):
    job = make_job(num_steps=5, overrides={"train.max_skipped_steps": 2, "train.eval_every": 0})
    whole = TrainBatches.batch_at

    def poisoned(self, step):
        batch = whole(self, step)
        return batch._replace(weights=batch.weights * np.float32(np.inf if step % 2 else 1))

    monkeypatch.setattr(TrainBatches, "batch_at", poisoned)
    fit(job, StopSignal())
    skipped = [line["step"] for line in training_lines(job.directory) if line["skipped"]]
    assert skipped == [2, 4]


def test_no_save_while_updates_are_skipped(make_job, monkeypatch, caplog):
    """What makes every update fail must not take the place of the checkpoints of before."""
    settings = {"train.eval_every": 0, "train.max_skipped_steps": 5, "checkpoint.keep": 1}
    job = make_job(num_steps=9, overrides=settings)
    whole = TrainBatches.batch_at

    def poisoned(self, step):
        batch = whole(self, step)
        return batch._replace(weights=batch.weights * np.float32(np.inf if step in bad else 1))

    monkeypatch.setattr(TrainBatches, "batch_at", poisoned)
    bad = range(2, 9)
    with caplog.at_level("INFO"), pytest.raises(TrainingDiverged):
        fit(job, StopSignal())
    assert CheckpointSaver(job.directory / "checkpoints").steps() == [2]
    bad = (3, 4)  # where 4 is due, they are skipped: saved once one is applied, and then as always
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(job, StopSignal())
    saved = [int(step) for step in SAVED.findall("\n".join(caplog.messages))]
    assert saved[0] in (6, 7) and saved[-2:] == [8, 9]


def test_the_best_is_kept_although_updates_are_skipped(make_job, monkeypatch):
    """Skipped updates leave parameters alone: what evaluates better than ever is worth keeping."""
    scores = iter([1.0, 2.0, 3.0])
    job = make_job(
        num_steps=8,
        evaluate=lambda params: {"val_loss": next(scores), **FIGURES},
        overrides={"checkpoint.save_every": 0, "checkpoint.keep": 1},
    )
    whole = TrainBatches.batch_at

    def poisoned(self, step):
        batch = whole(self, step)
        return batch._replace(weights=batch.weights * np.float32(np.inf if step == 2 else 1))

    monkeypatch.setattr(TrainBatches, "batch_at", poisoned)
    fit(job, StopSignal())
    checkpoints = CheckpointSaver(job.directory / "checkpoints")
    assert (checkpoints.steps(), checkpoints.best()) == ([3, 8], 3)


@pytest.mark.parametrize("interrupted", [3, 7], ids=["on the way", "at the end"])
def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(make_job, interrupted):
    class AtTheEvaluation(StopSignal):
        def check(self):
            if self._name:
                raise StopRequested(self._name)

    stop, figures = AtTheEvaluation(), {**FIGURES, "val_loss": 2.5}

    def evaluate(params):
        evaluations.append(None)
        if len(evaluations) == {3: 1, 7: 3}[interrupted] and not told:
            told.append(stop)
            stop._name = "SIGTERM"
            stop.check()
        return figures

    evaluations, told = [], []
    job = make_job(num_steps=7, evaluate=evaluate)
    with pytest.raises(StopRequested):
        fit(job, stop)
    checkpoints = CheckpointSaver(job.directory / "checkpoints")
    assert checkpoints.steps()[-1] == interrupted
    assert "val_loss" not in checkpoints.manifest(interrupted)["figures"]
    before = arrays_of(job)

    stop._name = ""
    assert fit(job, stop) == figures
    lines = [line["step"] for line in read_metrics(job.directory) if "val_loss" in line]
    assert lines == [3, 6, 7]
    assert checkpoints.verify(checkpoints.steps()[-1])["figures"]["val_loss"] == 2.5
    if interrupted == 7:
        for old, new in zip(before, arrays_of(job), strict=True):
            np.testing.assert_array_equal(old, new)


def test_nothing_compiles_after_the_first_steps(make_job, monkeypatch):
    monkeypatch.undo()
    job = make_job(num_steps=9)
    compiled = []

    def evaluate(params):
        compiled.append(len(events))
        return {"val_loss": 1.0, **FIGURES}

    events: list[str] = []

    def listen(event, duration, **labels):
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        fit(dataclasses.replace(job, evaluate=evaluate), StopSignal())
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled[0] > 0  # the listener hears compilations
    assert compiled[1] == compiled[2]  # from step 6, after the first evaluation and save, none


@pytest.mark.parametrize(("num_steps", "traced"), [(7, 2), (3, 1), (2, 0)])
def test_a_profile_holds_the_steps_after_the_second(make_job, num_steps, traced):
    job = make_job(num_steps=num_steps, overrides={"train.profile_steps": 2})
    fit(job, StopSignal())
    found = list(job.directory.rglob("perfetto_trace.json.gz"))
    assert len(found) == (traced > 0)
    for path in found:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        steps = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
        assert steps == {str(3 + i) for i in range(traced)}


def test_the_clock_stands_still_when_stopped(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Throughput(4, 10.0, tokens_per_step=6, flops=2.0, peak=100.0)
    clock.start()
    now[0] += 3
    clock.stop()
    now[0] += 50
    clock.start()
    now[0] += 1
    assert clock.seconds == 14.0
    assert clock.seconds_per_step(8) == 1.0
    clock.warmed_up(6)  # at 14 s
    now[0] += 4
    assert clock.seconds_per_step(8) == 2.0
    now[0] -= 4
    values = clock.interval(8)
    assert values["tokens_per_second"] == 6.0
    assert values["tokens"] == 48
    assert values["flops_per_second"] == 12.0
    assert values["mfu"] == 0.12
    assert json.dumps(values)


@pytest.fixture
def run_directory(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    return directory


@pytest.mark.parametrize("system", ["Linux", "another"])
@pytest.mark.parametrize("when", ["between saves", "during a save"])
def test_a_renamed_run_directory_stops_the_run_with_a_save_there(
    make_job, run_directory, tmp_path, monkeypatch, when, system
):
    """It is not created again under its old name, and the run resumes in the new one."""
    if system == "another":
        monkeypatch.setattr(workdir, "_BY_DESCRIPTOR", tmp_path / "no proc")
    moved, write, evaluated = tmp_path / "moved", storage.write, []

    def evaluate(params):
        evaluated.append(params)
        if when == "between saves":
            run_directory.rename(moved)
        return {"val_loss": 3.0, **FIGURES}

    def write_late(directory, items, *limit):
        if when == "during a save" and run_directory.exists():
            run_directory.rename(moved)
        write(directory, items, *limit)

    monkeypatch.setattr(storage, "write", write_late)
    job = make_job(num_steps=90, evaluate=evaluate, directory=run_directory)
    with pytest.raises(RunFailed) as error:
        fit(job, StopSignal())
    assert str(error.value).startswith(f"{run_directory}: renamed to {moved} ")
    assert not run_directory.exists()
    steps = CheckpointSaver(moved / "checkpoints").steps()
    assert f"step {steps[-1]} " in str(error.value) and 2 <= steps[-1] < 9

    fit(make_job(num_steps=9, directory=moved), StopSignal())
    assert [line["step"] for line in training_lines(moved)] == list(range(1, 10))


def test_a_deleted_run_directory_is_an_error_and_stays_deleted(make_job, run_directory):
    def evaluate(params):
        while run_directory.exists():  # a save may be writing to it
            shutil.rmtree(run_directory, ignore_errors=True)
        return {"val_loss": 3.0, **FIGURES}

    job = make_job(num_steps=90, evaluate=evaluate, directory=run_directory)
    with pytest.raises(RunFailed, match=f"{run_directory}: .*deleted"):
        fit(job, StopSignal())
    assert not run_directory.exists()
    saving = [t for t in threading.enumerate() if type(t).__module__.startswith("orbax")]
    assert [t for t in saving if not t.daemon] == []  # the process would wait for them when it ends


def test_without_proc_a_deleted_directory_is_not_taken_for_a_renamed_one(
    run_directory, tmp_path, monkeypatch
):
    monkeypatch.setattr(workdir, "_BY_DESCRIPTOR", tmp_path / "no proc")
    held = HeldDirectory(run_directory)
    run_directory.rmdir()
    run_directory.mkdir()  # another of its name
    fstat = os.fstat
    for links in (0, 2):  # not every file system counts none
        monkeypatch.setattr(os, "fstat", lambda file, n=links: with_links(fstat(file), n))
        with pytest.raises(DirectoryLost, match="resume it from its new place"):
            held.where()
    monkeypatch.undo()
    held.close()


def with_links(found, count):
    return os.stat_result(count if i == 3 else value for i, value in enumerate(found))


def test_a_directory_that_another_machine_renames_is_still_reached(run_directory, monkeypatch):
    """This one's kernel does not know the new name."""
    held = HeldDirectory(run_directory)
    samestat = os.path.samestat
    monkeypatch.setattr(os.path, "samestat", lambda *stats: False)
    where = held.where()
    monkeypatch.setattr(os.path, "samestat", samestat)
    (where / "file").write_text("x")
    assert where != run_directory and (run_directory / "file").read_text() == "x"
    held.close()
