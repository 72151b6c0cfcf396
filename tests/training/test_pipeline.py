"""A configuration to a job: each field where it belongs, and a run that stays itself."""

import json
import logging
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from sheepop_jax import pipeline
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.checkpoint.workdir import WorkdirLock
from sheepop_jax.data.loader import PackingConfig, TrainBatches
from sheepop_jax.errors import InputError
from sheepop_jax.planning.flops import flops_per_token
from sheepop_jax.planning.memory import OutOfMemory
from sheepop_jax.runtime.devices import Runtime
from sheepop_jax.training.signals import StopRequested, StopSignal
from tests.faults.harness import CHANGED

pytestmark = pytest.mark.usefixtures("fast_compile")

MACHINE = Runtime("cpu", "cpu", 8, 123.0)


class Stopped(StopSignal):
    """A signal that came before anything began."""

    def check(self):
        raise StopRequested("SIGTERM")


@pytest.fixture(scope="module")
def planned():
    """Plans, by what they depend on: tracing a model takes a second."""
    return {}


@pytest.fixture
def plan(make_config, tmp_path, monkeypatch, planned):
    """`plan({"seed": 3, …})`: the job that `train` would have done, its evaluator."""
    make_plan = pipeline.make_plan

    def plan_once(config, model, mesh, machine):
        key = repr((config.model, config.optimizer, config.train, config.data.seq_len, model, mesh))
        if key not in planned:
            planned[key] = make_plan(config, model, mesh, machine)
        return planned[key]

    monkeypatch.setattr(pipeline, "make_plan", plan_once)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} says {i * i}\n" for i in range(120)))
    jobs, evaluations = [], []

    class Evaluator(pipeline.Evaluator):
        def __call__(self, params):
            evaluations.append(self)
            raise StopRequested

    monkeypatch.setattr(pipeline, "fit", lambda job, stop: jobs.append(job) or {})
    monkeypatch.setattr(pipeline, "Evaluator", Evaluator)

    def make(overrides=None, workdir=tmp_path / "run", stop=None):
        fixed = {
            "data.path": str(text),
            "data.cache_dir": str(tmp_path / "cache"),
            "data.tokenizer": "char",
            "train.batch_size": 8,
        }
        pipeline.train(make_config({**fixed, **(overrides or {})}), workdir, MACHINE, stop)
        with pytest.raises(StopRequested):
            jobs[-1].evaluate({})
        return jobs[-1], evaluations[-1]

    return make


def test_fields_reach_the_loop_the_batches_and_the_evaluation(plan):
    stop = StopSignal()
    settings = {"train.eval_batches": 3, "train.sample_tokens": 0, "seed": 5}
    job, evaluation = plan(settings, stop=stop)
    assert (job.num_steps, job.peak_flops, job.sample) == (7, 123.0, None)
    assert job.flops_per_token == flops_per_token(job.model, 13)
    layout = PackingConfig(13, end_of_text=0)
    assert (evaluation.packing, evaluation.batch_size) == (layout, 8)
    assert (evaluation.max_batches, evaluation.check) == (3, stop.check)
    order = {"seed": 5, "accum": 2, "batch_size": 8}
    expected = TrainBatches(job.batches.streams, layout, **order).batch_at(4)
    for found, wanted_array in zip(job.batches.batch_at(4)[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(found, wanted_array)
    assert job.batches.batch_at(4).segments is None
    fields = {"data.packing": "one_per_window", "data.document_mask": True}
    job, evaluation = plan(fields, job.directory.with_name("masked"))
    assert evaluation.packing == PackingConfig(13, 0, "one_per_window", document_mask=True)
    assert job.batches.batch_at(4).segments is not None
    assert plan({"seed": 5})[0].sample is not None


def test_epochs_are_turned_into_steps(plan):
    job, _ = plan({"train.num_steps": 0, "train.num_epochs": 3})
    windows = (len(job.batches.streams[0]) - 13) // 13
    assert job.num_steps == 3 * -(-windows // 16) > 3


def test_a_warmup_longer_than_the_run_is_said(plan, caplog):
    caplog.set_level(logging.INFO)
    plan({"optimizer.warmup_steps": 6})
    assert "warmup is longer" not in caplog.text
    plan({"optimizer.warmup_steps": 7})
    assert "warmup is longer than the run of 7 updates" in caplog.text


def test_many_epochs_without_dropout_are_said_once(plan, tmp_path, caplog):
    for steps, dropout, said in ((70, 0.0, 0), (300, 0.0, 1), (300, 0.1, 0)):
        caplog.clear()
        settings = {"train.num_steps": steps, "model.dropout": dropout}
        job, _ = plan(settings, tmp_path / f"{steps}-{dropout}")
        assert (job.batches.epochs(steps) > 10) == (steps == 300)
        assert caplog.text.count("without dropout") == said


def test_what_the_run_needs_is_said_in_two_lines(plan, caplog):
    caplog.set_level(logging.INFO)
    plan()
    said = "\n".join(record.getMessage() for record in caplog.records)
    line = r"k parameters on 8 x cpu \(data 8 x fsdp 1 x tensor 1\); an update is 208 tokens and"
    assert re.search(rf"\d{line} \S+ FLOPs\neach device needs about \d\.\d+ MB: ", said)


def test_an_update_that_takes_a_cpu_minutes_is_said(plan, caplog):
    job, _ = plan()
    assert "a minute or more" not in caplog.text
    plan({"train.grad_accum_steps": 10**6}, job.directory.with_name("long"))
    assert "a minute or more" in caplog.text


REFUSED = {
    "seed": 9,
    "model.d_model": 120,
    "model.num_layers": 3,
    "model.num_heads": 3,
    "model.num_kv_heads": 2,
    "model.d_ff": 80,
    "model.max_seq_len": 31,
    "model.dropout": 0.2,
    "model.attention_dropout": 0.1,
    "model.activation": "relu",
    "model.position": "learned",
    "model.rope_theta": 5e3,
    "model.norm_eps": 1e-4,
    "model.use_bias": True,
    "model.qkv_bias": True,
    "model.qk_norm": True,
    "model.head_dim": 14,
    "model.norm": "rmsnorm",
    "model.feed_forward": "gated",
    "model.partial_rotary": 0.4,
    "model.rope_scaling": "linear",
    "model.rope_scaling_factor": 2.0,
    "model.rope_low_freq_factor": 2.0,
    "model.rope_high_freq_factor": 5.0,
    "model.rope_original_length": 512,
    "model.parallel_residual": True,
    "model.sliding_window": 5,
    "model.logit_softcap": 20.0,
    "model.tie_embeddings": False,
    "data.seq_len": 11,
    "data.packing": "one_per_window",
    "data.document_mask": True,
    "optimizer.name": "muon",
    "train.batch_size": 16,
    "train.grad_accum_steps": 3,
    "train.init_from": "another",
}
OTHER_DATA = {"data.val_fraction": 0.3, "data.val_split": "tail", "data.tokenizer": "bpe"}
TAKEN = {
    "model.remat": "dots",
    # Of fields that do not matter to this source, or lead to the same tokens.
    "data.source": "files",
    "data.name": "unused/name",
    "data.subset": "unused",
    "data.text_column": "unused",
    "data.join_rows": True,
    "data.query": "unused",
    "data.broken_rows": "skip",
    "data.chat_template": "chatml",
    "data.chat_loss": "all",
    "data.long_conversations": "truncate",
    "data.encoding_errors": "replace",
    "data.gitignore": False,
    "data.max_file_bytes": 10**9,
    "data.max_bytes": 10**9,
    "data.vocab_size": 400,
    "data.tokenizer_sample_bytes": 10**6,
    "optimizer.learning_rate": 0.5,
    "optimizer.b1": 0.8,
    "optimizer.b2": 0.95,
    "optimizer.eps": 1e-7,
    "optimizer.weight_decay": 0.3,
    "optimizer.warmup_steps": 3,
    "optimizer.schedule": "linear",
    "optimizer.final_lr_fraction": 0.2,
    "optimizer.max_grad_norm": 2.0,
    "optimizer.max_grad_zscore": 6.0,
    "train.platform": "auto",
    "train.num_steps": 9,
    "train.dtype": "bfloat16",
    "train.log_every": 3,
    "train.eval_every": 4,
    "train.eval_batches": 2,
    "train.sample_prompt": "line",
    "train.sample_tokens": 3,
    "train.max_skipped_steps": 4,
    "train.profile_steps": 2,
    "train.trackers": "",
    "checkpoint.save_every": 5,
    "checkpoint.keep": 7,
    "mesh.data": 4,
    "mesh.fsdp": 2,
    "mesh.tensor": 1,
}
# Those that cannot change alone, or change where things lie; each is in a test of its own.
ELSEWHERE = {
    "data.path",
    "data.val_path",
    "data.format",
    "data.mixture",
    "data.cache_dir",
    "train.num_epochs",
}
ELSEWHERE |= {f"train.lora_{name}" for name in ("rank", "alpha", "dropout")}  # test_lora.py


def test_every_field_is_refused_or_taken_when_a_run_goes_on(
    plan, planned, small_config, caplog, monkeypatch
):
    caplog.set_level(logging.INFO)
    job, _ = plan()
    fields = {
        f"{section}.{name}"
        for section, values in small_config.to_dict().items()
        if isinstance(values, dict)
        for name in values
    }
    assert {*REFUSED, *OTHER_DATA, *TAKEN, *ELSEWHERE} == fields | {"seed"}
    for name, value in {**REFUSED, **OTHER_DATA}.items():
        with pytest.raises(InputError) as error:
            plan({name: value})
        assert error.value.field == str(job.directory)
        assert re.search(rf"\b{name} .* -> {value}\b", error.value.got)
    before = plan()[0].config.to_dict()
    # No plan depends on what may change in a way that matters here.
    monkeypatch.setattr(pipeline, "make_plan", lambda *arguments: next(iter(planned.values())))
    saved = (job.directory / "config.json").read_text()
    for name, value in TAKEN.items():
        section, field = name.split(".")
        mesh = {"mesh.fsdp": 2} if name == "mesh.data" else {}  # 4 x 2 devices
        caplog.clear()
        changed, _ = plan({**mesh, name: value})
        assert changed.config.to_dict()[section][field] == value
        if value != before[section][field]:
            assert name in CHANGED.findall("\n".join(caplog.messages))
        assert open_run(job.directory).config == changed.config
        (job.directory / "config.json").write_text(saved)


def test_a_run_without_a_field_that_was_added_since_still_opens(plan):
    job, _ = plan()
    path = job.directory / "config.json"
    saved = json.loads(path.read_text())
    del saved["config"]["train"]["trackers"]
    path.write_text(json.dumps(saved))
    assert open_run(job.directory).config == job.config
    plan()


def test_a_tracker_that_is_missing_is_found_before_there_is_a_run(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        plan({"train.trackers": "wandb"}, tmp_path / "new")
    assert error.value.field == "train.trackers" and not (tmp_path / "new").exists()


def test_another_model_is_refused_before_any_text_is_read(plan, monkeypatch):
    plan()
    monkeypatch.setattr(pipeline, "prepare", None)
    with pytest.raises(InputError) as error:
        plan({"model.d_ff": 40})
    assert re.fullmatch(r"model\.d_ff \d+ -> 40", error.value.got)


def test_a_text_that_has_changed_is_said_to_have(plan):
    job, _ = plan()
    with Path(job.config.data.path).open("a") as text:
        text.write("one more line\n")
    with pytest.raises(InputError) as error:
        plan()
    assert error.value.field == str(job.directory) and "data." not in error.value.got
    assert "the text" in error.value.got


def test_the_same_batch_in_other_microbatches_is_the_same_run(plan, caplog):
    """What the error of a full device says to do can be done to a run that is under way."""
    job, _ = plan({"train.batch_size": 16, "train.grad_accum_steps": 2})
    other, _ = plan({"train.batch_size": 8, "train.grad_accum_steps": 4})
    assert other.directory == job.directory
    for first, second in zip(
        job.batches.batch_at(3)[:3], other.batches.batch_at(3)[:3], strict=True
    ):
        np.testing.assert_array_equal(first.reshape(32, 13), second.reshape(32, 13))
    with pytest.raises(InputError) as error:
        plan({"train.batch_size": 16, "train.grad_accum_steps": 4})
    assert error.value.got == "train.batch_size 8 -> 16"


def test_a_tokenizer_that_is_not_the_runs_is_refused(plan):
    job, _ = plan()
    path = job.directory / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "vocab_size": 3}))
    with pytest.raises(InputError) as error:
        open_run(job.directory)
    assert error.value.field == str(job.directory / "tokenizer.json")
    assert re.fullmatch(r"\d+ tokens", error.value.got) and "3" in error.value.expected


def test_held_out_text_comes_from_the_shards_of_the_run_or_from_its_source(plan):
    job, _ = plan()
    run = open_run(job.directory)
    text = Path(job.config.data.path)
    tokens = len(run.prepared_data().validation)
    moved = text.rename(text.with_name("moved.txt"))
    assert len(run.prepared_data().validation) == tokens  # the source is not needed
    shutil.rmtree(run.shards)
    with pytest.raises(InputError) as error:
        run.prepared_data()
    assert error.value.field.startswith(str(job.directory)) and "--data" in error.value.hint
    assert text.name in error.value.got
    moved.rename(text)
    assert len(run.prepared_data().validation) == tokens  # made again
    shutil.rmtree(run.shards)
    text.write_text(text.read_text().replace("says", "said"))
    with pytest.raises(InputError) as error:
        run.prepared_data()
    assert error.value.field.startswith(str(job.directory)) and "--data" in error.value.hint
    assert "->" in error.value.got


def test_a_run_keeps_the_split_that_it_was_started_with(plan, tmp_path, monkeypatch):
    """Before format 3, the validation split of a few files was the tail of the last one."""
    (tmp_path / "few").mkdir()
    for letter in "abcd":
        (tmp_path / "few" / f"{letter}.txt").write_text(f"{letter}{letter} " * 400)
    few = {"data.path": str(tmp_path / "few")}
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "FORMAT", 2)
        old, _ = plan(few)
    before = open_run(old.directory).data_identity
    assert "format" not in before
    _, evaluation = plan(few)  # goes on with the same data
    assert open_run(old.directory).data_identity == before
    read = evaluation.stream.read(0, len(evaluation.stream)).tolist()
    shutil.rmtree(open_run(old.directory).shards)
    again = open_run(old.directory).prepared_data().validation  # made again in its format
    assert again.read(0, len(again)).tolist() == read
    new, evaluation = plan(few, tmp_path / "new")
    tokenizer = open_run(new.directory).tokenizer
    found = tokenizer.decode(evaluation.stream.read(0, len(evaluation.stream)))
    assert set(found) == set("abcd ") and len(found) == 480
    assert set(tokenizer.decode(read)) == set("d ")


def test_a_sample_without_a_prompt_continues_the_validation_text(plan):
    job, evaluation = plan()
    tokens = evaluation.stream.read(1, 1 + len(job.sample.prompt_tokens)).tolist()
    assert job.sample.prompt_tokens == tokens and len(tokens) == 14  # half of the context of 29
    assert job.sample.prompt == open_run(job.directory).tokenizer.decode(tokens)
    assert plan({"train.sample_prompt": "line"})[0].sample.prompt == "line"


@pytest.mark.parametrize(
    ("batches", "said"),
    # The loop reports bits over the bytes of an average token. One of the 216 tokens is end-of-text
    # and has no byte, but it is not in the first batch.
    [(0, "text: 2.000 bits"), (1, f"text, first {17 / 217:.1%}: {2 * 215 / 216:.3f} bits")],
)
def test_gzip_is_compared_on_what_was_evaluated(plan, tmp_path, monkeypatch, caplog, batches, said):
    caplog.set_level(logging.INFO)
    compressed = []
    inner = pipeline.gzip_bits_per_byte

    def note(pieces):
        compressed.append(b"".join(pieces))
        return inner([compressed[-1]])

    monkeypatch.setattr(pipeline, "gzip_bits_per_byte", note)
    monkeypatch.setattr(pipeline, "fit", lambda job, stop: {"val_bits_per_byte": 2.0})
    text = {"data.seq_len": 2, "train.eval_batches": batches}
    with pytest.raises(IndexError):  # no job was recorded
        plan(text)
    assert [len(content) for content in compressed] == [16] * batches  # 8 windows of 2 tokens
    gzip = inner(compressed) if batches else open_run(tmp_path / "run").gzip_bits_per_byte
    assert f"{said} per byte; gzip -9 needs {gzip:.3f} on the same bytes" in caplog.text


def test_what_ends_before_there_is_a_run_leaves_no_directory(plan, tmp_path):
    workdir = tmp_path / "new"
    with pytest.raises(InputError):
        plan({"data.path": str(tmp_path / "nowhere.txt")}, workdir)
    assert not workdir.exists()
    with pytest.raises(StopRequested):
        plan(workdir=workdir, stop=Stopped())
    assert not workdir.exists()


def test_a_run_has_one_process_at_a_time(tmp_path):
    first, second = WorkdirLock(tmp_path), WorkdirLock(tmp_path)
    with first:
        (tmp_path / "config.json").touch()
        with pytest.raises(InputError) as error, second:
            pass
        assert error.value.field == "workdir"
    with second:
        pass


def test_a_sample_prompt_that_fills_the_context_is_refused(plan):
    prompt = {"train.sample_prompt": "line " * 6}
    with pytest.raises(InputError) as error:
        plan(prompt)
    assert (error.value.field, error.value.got) == ("train.sample_prompt", "30 tokens")
    assert "sample_tokens=0" in error.value.hint
    assert plan({**prompt, "train.sample_tokens": 0})[0].sample is None


def test_a_sample_without_a_prompt_fills_the_context_after_the_validation_text(plan):
    job, _ = plan({"train.sample_prompt": "", "train.sample_tokens": 99})
    assert len(job.sample.prompt_tokens) == 14  # half of the 29 positions
    assert job.sample.config.max_new_tokens == 15


def test_the_loss_is_chunked_as_its_platform_needs(plan, monkeypatch):
    monkeypatch.setattr(pipeline, "chunk_elements", {"cpu": 77}.get)
    assert plan()[0].chunk_elements == 77


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes.", True),
        ("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory", True),
        ("INVALID_ARGUMENT: shapes differ", False),
    ],
)
def test_a_full_device_is_a_line_that_says_what_to_do(plan, monkeypatch, said, meant):
    plan()  # so that the fixture's settings are known to be good

    def full(job, stop):
        raise jax.errors.JaxRuntimeError(said)

    monkeypatch.setattr(pipeline, "fit", full)
    with pytest.raises(OutOfMemory if meant else jax.errors.JaxRuntimeError) as error:
        plan()
    if meant:
        line = str(error.value)
        for words in ("MB of activations", "train.batch_size", "model.remat", "mesh.fsdp"):
            assert words in line
        assert "\n" not in line
