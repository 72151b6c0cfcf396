"""train.py, sample.py and the tools on a run: files, output, exit codes.

One real process trains, one is stopped, and a few show what only a process can; all else calls the
programs' `main` in this process.
"""

import argparse
import json
import logging
import re
import shutil
import signal
import subprocess
import sys

import jax
import pytest

import sample
import train
from sheepop_jax import __main__ as tools
from sheepop_jax import pipeline
from sheepop_jax.checkpoint import storage
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.cli import train as train_command
from sheepop_jax.cli.common import command
from sheepop_jax.config.loading import load_config
from sheepop_jax.errors import InputError
from sheepop_jax.runtime import platform
from sheepop_jax.runtime.devices import Runtime
from sheepop_jax.training.signals import StopSignal
from tests.faults.harness import (
    CHANGED,
    FINISHED_BEFORE,
    ROOT,
    SAVED,
    STEP,
    TINY,
    environment,
    largest_difference,
    log_of,
    places,
)

pytestmark = pytest.mark.usefixtures("fast_compile")


def run(*words, cwd=ROOT, **options):
    """A real process."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def train_words(directory, workdir, **overrides):
    """Words for train.py; `directory` has the text and the cache."""
    fields = {**TINY, **places(directory)}
    fields |= {name.replace("__", "."): value for name, value in overrides.items()}
    words = ["--config", "configs/base.py", "--workdir", workdir]
    return [*map(str, words), *(f"--config.{name}={value}" for name, value in fields.items())]


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(main, *words)`: exit code, stdout and stderr of a program, called in this process."""
    first = jax.devices()[:1]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax, "devices", lambda: first)
    monkeypatch.setattr(platform, "prepare", lambda *asked: Runtime("cpu", "cpu", 1, 0.0))
    monkeypatch.setattr(StopSignal, "install", lambda self: self)

    def call(main, *words):
        code = 0
        try:
            code = main([*map(str, words)]) or 0
        except SystemExit as left:
            code = left.code or 0
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(words, code, out, err)

    return call


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A directory for the text and the cache of its tokens."""
    return tmp_path_factory.mktemp("text")


@pytest.fixture(scope="session")
def trained(texts, tmp_path_factory):
    """A finished run, and what its training printed."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    result = run("train.py", *train_words(texts, workdir))
    assert result.returncode == 0, result.stderr
    return workdir, result


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of that run."""
    return shutil.copytree(trained[0], tmp_path / "copy")


def log_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def log_steps(workdir):
    return [line["step"] for line in log_lines(workdir)]


def only_error(result, field):
    """The one line of a program that was refused its input, which begins with the field."""
    assert (result.returncode, result.stdout) == (2, "")
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {field}") and "Traceback" not in result.stderr, line
    return line


def test_training_leaves_a_whole_run(trained):
    workdir, result = trained
    names = {"config.json", "tokenizer.json", "metrics.jsonl", "training_curve.png", "checkpoints"}
    # Every line that was printed, also those from before there was a directory for it.
    # A record of several lines, such as a sample, has one time.
    time = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ")
    logged = [time.sub("", line) for line in (workdir / "train.log").read_text().splitlines()]
    assert logged == [*result.stderr.splitlines(), result.stdout.strip()]
    assert names <= {entry.name for entry in workdir.iterdir()}
    lines = log_lines(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 6]
    assert re.fullmatch(r".*tiny: val_loss \d+\.\d{4}  .*\n", result.stdout)
    assert [int(step) for step in STEP.findall(result.stderr)] == [1, 2, 3, 4, 5, 6]
    assert "Traceback" not in result.stderr


def test_settings_of_jax_and_a_home_that_cannot_be_written_change_nothing(
    trained, texts, tmp_path, monkeypatch
):
    """`data.cache_dir` is all that a run needs besides its own directory."""
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16")
    monkeypatch.setenv("HOME", "/proc")  # not even root can write there
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    result = run("train.py", *train_words(texts, tmp_path / "run"))
    assert result.returncode == 0, result.stderr
    assert "JAX_ENABLE_X64=True is ignored" in result.stderr
    assert "token shards reused" in result.stderr
    assert largest_difference(log_of(tmp_path / "run"), log_of(trained[0])) < 1e-5

    def arrays(workdir):
        root = workdir / "checkpoints" / "00000006"
        found = [storage.describe(root / name) for name in ("params", "optimizer")]
        leaves = jax.tree_util.tree_leaves_with_path(found)
        return {storage.name_of(path): (leaf.dtype, leaf.shape) for path, leaf in leaves}

    assert arrays(tmp_path / "run") == arrays(trained[0])


def test_the_same_command_on_a_finished_run_changes_nothing(trained, texts, call):
    workdir, first = trained
    logs = ("lock", "train.log")
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name not in logs}
    again = call(train.main, *train_words(texts, workdir))
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert FINISHED_BEFORE.search(again.stderr)
    for path, content in before.items():
        if path.suffix != ".png" and "tensorboard" not in path.parts:
            assert path.read_bytes() == content, path


def test_a_run_that_overfitted_says_which_checkpoint_is_the_best(copy, texts, call):
    saver = CheckpointSaver(copy / "checkpoints")
    first, last = saver.steps()[0], saver.steps()[-1]
    saver.record(first, {"val_loss": 0.25})
    result = call(train.main, *train_words(texts, copy))
    assert result.returncode == 0, result.stderr
    [note] = [line for line in result.stderr.splitlines() if line.startswith("the best")]
    assert f"step {first} (validation loss 0.2500)" in note and f"step {last} (" in note
    assert "--step latest" in note
    saver.record(first, {"val_loss": 9.0})
    assert "the best" not in call(train.main, *train_words(texts, copy)).stderr


def test_a_signal_saves_and_exits_with_75_and_meanwhile_the_run_is_locked(texts, tmp_path, call):
    """That SIGINT does the same is tested in training/test_stop.py."""
    quiet = {"train__eval_every": 0, "checkpoint__save_every": 0, "train__log_every": 50}
    words = train_words(texts, tmp_path, train__num_steps=10**6, **quiet)
    process = subprocess.Popen(
        [sys.executable, "train.py", *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        for line in process.stderr:
            if STEP.match(line):
                refused = call(train.main, *words)
                process.send_signal(signal.SIGTERM)
                break
        out, rest = process.communicate()
    assert (process.returncode, out) == (75, "")
    assert f"pid {process.pid}" in only_error(refused, "--workdir")
    [saved] = SAVED.findall(rest)
    assert int(saved) >= 50 and (tmp_path / "checkpoints" / f"{int(saved):08d}").is_dir()
    assert "Traceback" not in rest


def test_a_run_resumes_with_its_own_configuration(copy, texts, call):
    """Flags change it for good; a configuration named again changes it back, and says so."""

    def saved():
        return json.loads((copy / "config.json").read_text())["config"]

    first = saved()
    for words in (["--config.train.log_every=3"], []):
        result = call(train.main, "--workdir", copy, *words)
        assert result.returncode == 0 and FINISHED_BEFORE.search(result.stderr), result.stderr
        assert saved() == {**first, "train": {**first["train"], "log_every": 3}}
        assert CHANGED.findall(result.stderr) == ["train.log_every"] * len(words)
    result = call(train.main, *train_words(texts, copy))
    assert CHANGED.findall(result.stderr) == ["train.log_every"]
    assert result.stderr.index("changed since") < result.stderr.index("data: ")
    assert saved() == first


def test_the_run_directory_and_the_configuration_that_were_not_named_are_said(
    tmp_path, call, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipeline, "train", lambda config, workdir, *rest: {})
    words = ["--config", "quickstart", "--config.data.path=mine.txt"]
    said = call(train.main, *words)
    assert (said.returncode, said.stderr) == (0, "run directory: runs/quickstart-mine\n")
    config = load_config("quickstart", ["data.path=mine.txt"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps({"config": config.to_dict()}))
    said = call(train.main, "--workdir", "run")
    assert (said.returncode, said.stderr) == (0, "configuration: the one saved in run\n")
    assert call(train.main, *words, "--workdir", "run").stderr == ""


def test_without_a_configuration_there_must_be_a_run(tmp_path, call):
    assert "--workdir" in only_error(call(train.main), "--config: ")
    refused = call(train.main, "--workdir", tmp_path / "new")
    assert "--config" in only_error(refused, "--workdir: ")
    assert not (tmp_path / "new").exists()
    (tmp_path / "config.json").write_text("[]")
    only_error(call(train.main, "--workdir", tmp_path), tmp_path / "config.json")


def test_debug_ends_with_the_traceback_and_the_same_exit_code(tmp_path, call):
    words = ["--config", "base", "--config.model.d_model=3", "--workdir", tmp_path / "new"]
    result = call(train.main, *words, "--debug")
    assert (result.returncode, result.stdout) == (2, "")
    *above, raised, last = result.stderr.splitlines()
    assert "Traceback (most recent call last):" in above
    assert raised.startswith("sheepop_jax.errors.InputError: ")
    assert last.startswith("error: model.num_heads: ")


def test_a_log_on_a_full_disk_changes_nothing(texts, trained, tmp_path, call, monkeypatch):
    workdir = tmp_path / "run"
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        result = call(train.main, *train_words(texts, workdir))
    assert (result.returncode, result.stdout.startswith(str(workdir))) == (0, True)
    logged = (workdir / "train.log").read_text()
    assert logged.count("cannot write to stderr (No space left on device)") == 1
    assert logged.splitlines()[-1].endswith(result.stdout.strip())
    assert log_steps(workdir) == log_steps(trained[0])


def test_a_log_that_nobody_reads_any_more_changes_nothing(texts, tmp_path):
    """`train.py … 2>&1 | head -1`: in a process, whose last output is flushed as it ends."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *train_words(texts, tmp_path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process.stdout as lines:
        assert lines.readline()
    assert process.wait() == 0
    logged = (tmp_path / "train.log").read_text()
    assert "cannot write to stderr (Broken pipe)" in logged
    assert "cannot write to stdout (Broken pipe)" in logged
    assert logged.count("saved step 6\n") == 1


def test_a_broken_pipe_that_is_not_the_logs_is_an_error(texts, tmp_path, call, monkeypatch):
    """As of a socket to a file server."""

    def broken(*arguments):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(pipeline, "fit", broken)
    result = call(train.main, *train_words(texts, tmp_path))
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        1,
        "error: [Errno 32] Broken pipe",
    )
    assert (tmp_path / "train.log").read_text().endswith("error: [Errno 32] Broken pipe\n")


def test_another_run_in_the_same_directory_is_refused(trained, texts, call):
    """Which fields may change is tested in training/test_pipeline.py."""
    refused = call(train.main, *train_words(texts, trained[0], seed=1))
    assert re.search(r"\bseed \d+ -> 1\b", only_error(refused, trained[0]))


def test_a_bad_field_is_one_line_before_jax_is_imported(tmp_path):
    """The lines for other fields are in test_bad_input.py."""
    workdir = tmp_path / "run"
    words = ["--config", "configs/base.py", "--workdir", workdir, "--config.model.d_modle=3"]
    result = run("-X", "importtime", "train.py", *words)
    shown = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(shown) == 1
    only_error(result, "model.d_modle: ")
    assert not re.search(r"\| +jax$", result.stderr, re.MULTILINE)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import nothing_of_the_kind\n", "ModuleNotFoundError"),
        ("x = (\n", "SyntaxError"),
        ("x = 1\n", "get_config"),
    ],
)
def test_a_config_file_that_does_not_work(tmp_path, content, message):
    """In a process: the module of a config file keeps the names of the one loaded before."""
    path = tmp_path / "mine.py"
    path.write_text(content)
    result = run("train.py", "--config", path)
    assert message in only_error(result, "--config: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (InputError("--x", 3, "less"), 2, "error: --x: "),
        (OSError(28, "No space left", "f"), 1, "error: [Errno 28] "),
        (ModuleNotFoundError(name="flax"), 2, "error: the Python package flax "),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_each_error_has_its_line_and_its_exit_code(capsys, error, code, shown):
    with pytest.raises(SystemExit) as left, command(argparse.Namespace(debug=False)):
        raise error
    out, err = capsys.readouterr()
    assert (left.value.code, out) == (code, "")
    assert err.startswith(shown) and err.count("\n") == bool(shown)
    if shown:
        with pytest.raises(SystemExit) as left, command(argparse.Namespace(debug=True)):
            raise error
        assert left.value.code == code
        traced = capsys.readouterr().err
        assert "Traceback" in traced and traced.endswith(err)


SECRET = "https://me:s3cret@h/x.csv?X-Amz-Signature=s3cret"


@pytest.mark.parametrize(
    "error", [OSError(5, f"GET {SECRET}"), InputError("x", 1, "less"), ValueError(SECRET)]
)
def test_tracebacks_and_debug_lines_have_no_secrets_of_urls(capsys, monkeypatch, tmp_path, error):
    """Neither of the error, nor of its cause, nor of what other libraries log, nor of a bug."""
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    flags = argparse.Namespace(debug=True)
    with pytest.raises((SystemExit, ValueError)) as left:
        with command(flags), train_command._recorded(flags) as run_log:
            run_log.open(tmp_path)
            logging.getLogger("other").debug("GET %s", SECRET)
            try:
                raise RuntimeError(f"a cause with {SECRET}")
            except RuntimeError as cause:
                logging.getLogger("other").debug("failed", exc_info=True)
                raise error from cause
    if left.value is error:  # as the interpreter shows a bug
        sys.excepthook(type(error), error, error.__traceback__)
    said, logged = capsys.readouterr().err, (tmp_path / "train.log").read_text()
    assert "s3cret" not in said + logged
    shown = "https://\u2026@h/x.csv?X-Amz-Signature=\u2026"
    assert f"GET {shown}" in said and said.count(f"a cause with {shown}") >= 2
    assert f"GET {shown}" in logged and f"a cause with {shown}" in logged


def test_a_flag_that_is_refused_shows_no_secret_of_a_url(call):
    result = call(train.main, f"--confg.data.path={SECRET}")
    assert "https://\u2026@h/x.csv" in result.stderr and "s3cret" not in result.stderr


def test_a_reader_that_is_gone_is_no_error():
    program = (
        "import argparse\nfrom sheepop_jax.cli.common import command\n"
        "with command(argparse.Namespace(debug=False)):\n    raise BrokenPipeError"
    )
    result = run("-c", program)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_python_without_the_packages_says_what_to_do():
    result = run("-S", "train.py", "--config", "configs/base.py")  # -S: no site-packages
    assert "setup.sh" in only_error(result, "the Python package ")
    assert result.stderr.count("\n") == 1


def test_a_missing_config_file_lists_those_that_are_there(call):
    result = call(train.main, "--config", "configs/bse.py")
    assert "base, " in only_error(result, "--config: ")


@pytest.mark.parametrize(
    ("main", "words"),
    [(train.main, []), (sample.main, []), (tools.main, []), (tools.main, ["bench"])],
)
def test_help_teaches(call, main, words):
    result = call(main, *words, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--" in result.stdout
    if not words:
        assert "examples:" in result.stdout and "exit codes" in result.stdout


def test_a_copied_run_samples_the_same_text(trained, copy, call):
    (copy / "config.py").write_text("raise SystemExit('a config found beside a run was executed')")
    words = ["--prompt", "line 1", "--num_samples", 2, "--max_new_tokens", 9, "--json"]
    results = [call(sample.main, "--ckpt", path, *words) for path in (trained[0], copy)]
    assert [r.returncode for r in results] == [0, 0], results[1].stderr
    assert results[0].stdout == results[1].stdout
    records = [json.loads(line) for line in results[0].stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["line 1", "line 1"]
    assert {"completion", "tokens", "stop_reason"} <= set(records[0])
    assert len(records[0]["tokens"]) <= 9
    assert records[0]["tokens"] != records[1]["tokens"]


def test_evaluate_agrees_with_training_and_takes_any_text(trained, texts, tmp_path, call):
    workdir, _ = trained
    result = call(tools.main, "evaluate", "--ckpt", workdir, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    logged = [line for line in log_lines(workdir) if "val_loss" in line][-1]
    assert figures["loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
    assert figures["accuracy"] == pytest.approx(logged["val_accuracy"])
    content = (texts / "text.txt").read_text()
    tail = content[int(len(content) * 0.9) :]
    assert (figures["bytes"], figures["tokens"]) == (len(tail), len(tail) + 1)

    is_val = tmp_path / "tail.txt"
    is_val.write_text(tail)
    result = call(tools.main, "evaluate", "--ckpt", workdir, "--data", is_val, "--json")
    assert json.loads(result.stdout)["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_int8_weights_sample_evaluate_and_bench(trained, tmp_path, call):
    workdir, _ = trained
    words = ["--ckpt", workdir, "--quantize", "int8"]
    result = call(sample.main, *words, "--prompt", "line 1", "--max_new_tokens", 9, "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) <= 9

    result = call(tools.main, "evaluate", *words, "--json")
    logged = [line for line in log_lines(workdir) if "val_loss" in line][-1]["val_loss"]
    loss = json.loads(result.stdout)["loss"]
    assert loss == pytest.approx(logged, rel=0.005) and loss != pytest.approx(logged, rel=1e-6)

    peak_bytes = {}
    for quantize, options in (None, words[:2]), ("int8", words):
        out = tmp_path / str(quantize)
        sizes = ["--prompt_lengths", 4, "--batch_sizes", 1, "--new_tokens", 2, "--repeats", 1]
        result = call(tools.main, "bench", *options, *sizes, "--out", out)
        assert result.returncode == 0, result.stderr
        measured = json.loads((out / "inference.json").read_text())
        assert measured["quantize"] == quantize
        peak_bytes[quantize] = measured["rows"][0]["peak_bytes"]
    assert peak_bytes["int8"] < peak_bytes[None]


def test_evaluate_without_the_text_says_what_to_do(copy, tmp_path, call):
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["data"]["path"] = str(tmp_path / "gone.txt")
    saved["shards"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(saved))
    result = call(tools.main, "evaluate", "--ckpt", copy)
    assert "--data FILE" in only_error(result, copy)


def test_damage_to_a_sampled_checkpoint_is_an_error(copy, call):
    for path in (copy / "checkpoints").rglob("params/**/*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = call(sample.main, "--ckpt", copy, "--prompt", "line")
    assert "params/" in only_error(result, "--step: ")


@pytest.mark.parametrize(
    ("main", "words"), [(sample.main, ["--prompt", "x"]), (tools.main, ["evaluate"])]
)
def test_a_directory_that_is_no_run(main, words, trained, tmp_path, call):
    only_error(call(main, *words, "--ckpt", tmp_path), "--ckpt: ")
    beside = call(main, *words, "--ckpt", trained[0].parent / "tnyi")
    assert "tiny" in only_error(beside, "--ckpt: ")


def test_the_checkpoints_of_a_run_are_listed_verified_and_deleted(copy, call):
    def checkpoints(*words):
        return call(tools.main, "checkpoints", "--ckpt", copy, *words)

    shown = checkpoints()
    assert shown.returncode == 0 and shown.stderr == ""
    head, *rows = shown.stdout.splitlines()
    assert head.split() == ["step", "MB", "val_loss", "state"]
    saved = sorted(int(p.name) for p in (copy / "checkpoints").glob("0*"))
    assert [int(row.split()[0]) for row in rows] == saved and len(saved) >= 2
    assert "latest" in rows[-1] and sum("best" in row for row in rows) == 1
    assert not any("verified" in row for row in rows)
    items = [json.loads(line) for line in checkpoints("--json", "--verify").stdout.splitlines()]
    assert [item["step"] for item in items] == saved
    assert all(item["damage"] == "" and item["bytes"] > 1000 for item in items)

    largest = max(
        (copy / "checkpoints" / f"{saved[0]:08d}").rglob("*"), key=lambda p: p.stat().st_size
    )
    content = largest.read_bytes()
    largest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = checkpoints("--verify")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: 1 of {len(saved)} ")
    shown = result.stdout.splitlines()
    assert "DAMAGED" in shown[1] and largest.name in shown[1] and "verified" in shown[-1]

    for words, said in (
        (["--delete", "77"], "--delete: "),
        (["--keep", str(saved[0])], "--keep: "),
        (["--delete", *map(str, saved)], "--delete: "),
        (["--delete", "1", "--keep", "2"], "argument --keep: "),
    ):
        result = checkpoints(*words)
        only_error(result, said)
        assert result.stderr.count("\n") == 1
    assert sorted(int(p.name) for p in (copy / "checkpoints").glob("0*")) == saved
    assert checkpoints("--force", "--delete", str(saved[0])).returncode == 0
    assert sorted(int(p.name) for p in (copy / "checkpoints").glob("0*")) == saved[1:]
    result = checkpoints("--force", "--keep", str(saved[-1]))
    gone = ", ".join(map(str, saved[1:-1])) or "none"
    assert (result.returncode, result.stderr) == (0, f"deleted: {gone}\n")
    assert sorted(int(p.name) for p in (copy / "checkpoints").glob("0*")) == saved[-1:]
