"""train.py, sample.py and evaluate as a user runs them: fresh processes, files, exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = {
    "model.d_model": 24,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.d_ff": 40,
    "model.max_seq_len": 32,
    "data.tokenizer": "char",
    "data.seq_len": 16,
    "optimizer.warmup_steps": 2,
    "train.platform": "cpu",
    "train.num_steps": 6,
    "train.batch_size": 3,
    "train.grad_accum_steps": 2,
    "train.log_every": 1,
    "train.eval_every": 4,
    "train.sample_tokens": 5,
    "checkpoint.save_every": 2,
}


def environment():
    """The tests' own flags left out: a user has none."""
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return {**kept, "PYTHONPATH": str(ROOT)}


def command(*words):
    return [sys.executable, *map(str, words)]


def pinned(*words):
    """Words for Python that run on one core: it pins itself, then becomes the command."""
    code = (
        "import os, sys; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))});"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    return ["-c", code, *words]


def run(*words, cwd=ROOT, **options):
    return subprocess.run(
        command(*words),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def train_words(text, workdir, **overrides):
    fields = {**TINY, "data.path": text, **{k.replace("__", "."): v for k, v in overrides.items()}}
    fields["data.cache_dir"] = Path(text).parent / "cache"
    return [
        "train.py",
        "--config",
        "configs/base.py",
        "--workdir",
        workdir,
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"line {i} says {i * i}\n" for i in range(120)))
    return path


@pytest.fixture(scope="session")
def trained(text_file, tmp_path_factory):
    """A finished run, and what its training printed."""
    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    result = run(*train_words(text_file, workdir))
    assert result.returncode == 0, result.stderr
    return workdir, result


def log_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def digests(workdir):
    """SHA-256 over the bytes of each array of the newest checkpoint, read in a fresh process."""
    code = """
import hashlib, sys
import jax, numpy as np, orbax.checkpoint as ocp
from pathlib import Path
newest = sorted(p for p in Path(sys.argv[1]).glob("checkpoints/0*"))[-1]
for name in ("params", "optimizer"):
    tree = ocp.StandardCheckpointer().restore(newest.absolute() / name)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        print(newest.name, path, hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest())
"""
    result = run("-c", code, workdir)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_training_leaves_a_whole_run(trained):
    workdir, result = trained
    names = {"config.json", "tokenizer.json", "metrics.jsonl", "training_curve.png", "checkpoints"}
    assert names <= {entry.name for entry in workdir.iterdir()}
    lines = log_lines(workdir)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [4, 6]
    assert re.fullmatch(r".*tiny: val_loss \d+\.\d{4}  .*\n", result.stdout)
    assert "about" in result.stderr and "to go" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_same_command_on_a_finished_run_changes_nothing(trained, text_file):
    workdir, first = trained
    before = {p: p.read_bytes() for p in workdir.rglob("*") if p.is_file() and p.name != "lock"}
    again = run(*train_words(text_file, workdir))
    assert (again.returncode, again.stdout) == (0, first.stdout)
    assert "nothing to do" in again.stderr
    for path, content in before.items():
        if path.suffix != ".png" and "tensorboard" not in path.parts:
            assert path.read_bytes() == content, path


def test_a_killed_run_goes_on_bit_for_bit(trained, text_file, tmp_path):
    """On one core, where XLA's sums have one order."""

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = {"model__dropout": 0.1, "train__num_steps": 8}
    result = run(*pinned(*train_words(text_file, whole, **words)))
    assert result.returncode == 0, result.stderr
    process = subprocess.Popen(
        command(*pinned(*train_words(text_file, killed, **words))),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("saved step"):
            process.kill()
            break
    process.stderr.close()
    assert process.wait() == -signal.SIGKILL
    assert max(line["step"] for line in log_lines(killed)) <= 8
    result = run(*pinned(*train_words(text_file, killed, **words)))
    assert result.returncode == 0, result.stderr
    assert "going on from step" in result.stderr
    assert digests(killed) == digests(whole)
    same = ("step", "loss", "grad_norm", "learning_rate", "val_loss", "val_accuracy")

    def comparable(workdir):
        return [[line.get(name) for name in same] for line in log_lines(workdir)]

    assert comparable(killed) == comparable(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75(text_file, tmp_path, number):
    words = train_words(text_file, tmp_path, train__num_steps=10**6, train__eval_every=0)
    process = subprocess.Popen(
        command(*words, "--config.checkpoint.save_every=0", "--config.train.log_every=50"),
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 50/"):
            process.send_signal(number)
            break
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 75
    saved = re.findall(r"saved step (\d+)", rest)
    assert len(saved) == 1 and int(saved[0]) >= 50
    assert "Traceback" not in rest


def test_more_steps_go_on_and_other_identity_is_refused(trained, text_file, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    result = run(*train_words(text_file, workdir, train__num_steps=7))
    assert result.returncode == 0, result.stderr
    assert "train.num_steps 6 -> 7" in result.stderr
    assert [line["step"] for line in log_lines(workdir) if "loss" in line] == [1, 2, 3, 4, 5, 6, 7]
    for name, value in {"model__d_ff": 48, "seed": 1, "train__batch_size": 6}.items():
        result = run(*train_words(text_file, workdir, **{name: value}))
        assert result.returncode == 2
        assert f"{name.replace('__', '.')} " in result.stderr.splitlines()[-1]


def test_other_data_is_refused(trained, text_file, tmp_path):
    other = tmp_path / "text.txt"
    other.write_text(text_file.read_text().replace("says", "said"))
    result = run(*train_words(other, trained[0]))
    assert result.returncode == 2
    assert f"other data (data.path {text_file} -> {other}" in result.stderr.splitlines()[-1]


def test_a_second_process_is_refused_by_the_lock(trained, text_file):
    import fcntl

    with (trained[0] / "lock").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run(*train_words(text_file, trained[0]))
    assert result.returncode == 2
    assert "in use by" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.model.d_modle=3"], "--config.model.d_modle: .* try --config.model.d_model"),
        (["--config.model.d_model=wide"], "model.d_model: got 'wide'; expected a whole number"),
        (["--config.model.num_heads=7"], "model.num_heads: got 7; expected a divisor"),
        (["--config.optimizer.learning_rate=nan"], "optimizer.learning_rate: got nan"),
        (["--config.train.num_epochs=2"], "train.num_steps: got 20000; expected exactly one"),
        (["--config.train.sample_tokens"], "write --config.train.sample_tokens=VALUE"),
        (["--wokdir=x"], "unknown argument --wokdir=x"),
        (["--work=x"], "unknown argument --work=x"),
    ],
)
def test_a_bad_field_is_one_line_before_jax_is_imported(tmp_path, words, message):
    workdir = tmp_path / "run"
    result = run(
        *["-X", "importtime", "train.py", "--config", "configs/base.py", "--workdir", workdir],
        *words,
    )
    assert result.returncode == 2 and result.stdout == ""
    shown = [line for line in result.stderr.splitlines() if not line.startswith("import time:")]
    assert len(shown) == 1 and re.match(f"error: .*{message}", shown[0]), shown
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
    path = tmp_path / "mine.py"
    path.write_text(content)
    result = run("train.py", "--config", path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --config: got ") and message in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        ("InputError('--x', 3, 'less')", 2, "error: --x: got 3; expected less"),
        ("OSError(28, 'No space left', 'f')", 1, "error: [Errno 28] No space left: 'f'"),
        ("ModuleNotFoundError(name='flax')", 2, "error: the Python package flax is missing here;"),
        ("KeyboardInterrupt()", 130, ""),
        ("BrokenPipeError()", 0, ""),
    ],
)
def test_each_error_has_its_line_and_its_exit_code(error, code, shown):
    program = (
        "from sheepop_jax.cli import command\n"
        "from sheepop_jax.errors import InputError\n"
        f"with command(DEBUG):\n    raise {error}\n"
    )
    result = run("-c", program.replace("DEBUG", "False"))
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(shown) and result.stderr.count("\n") == bool(shown)
    if shown:
        assert "Traceback" in run("-c", program.replace("DEBUG", "True")).stderr


def test_a_python_without_the_packages_says_what_to_do():
    result = run("-S", "train.py", "--config", "configs/base.py")  # -S: no site-packages
    assert result.returncode == 2
    assert re.fullmatch(
        r"error: the Python package \w+ is missing here; .*setup.sh.*\n", result.stderr
    )


def test_a_missing_config_file_lists_those_that_are_there():
    result = run("train.py", "--config", "configs/bse.py")
    assert result.returncode == 2
    assert "configs/base.py" in result.stderr


@pytest.mark.parametrize(
    "script", ["train.py", "sample.py", "-m sheepop_jax", "-m sheepop_jax bench"]
)
def test_help_teaches(script):
    result = run(*script.split(), "--help")
    assert result.returncode == 0
    assert "--" in result.stdout and result.stderr == ""
    if "bench" not in script:
        assert "examples:" in result.stdout and "exit codes" in result.stdout


def test_a_copied_run_samples_the_same_text(trained, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(trained[0], copy)
    (copy / "config.py").write_text("raise SystemExit('a config found beside a run was executed')")
    words = ["--prompt", "line 1", "--num_samples", 2, "--max_new_tokens", 9, "--json"]
    results = [run("sample.py", "--ckpt", path, *words) for path in (trained[0], copy)]
    assert [r.returncode for r in results] == [0, 0], results[1].stderr
    assert results[0].stdout == results[1].stdout
    records = [json.loads(line) for line in results[0].stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["line 1", "line 1"]
    assert {"completion", "tokens", "stop_reason"} <= set(records[0])
    assert len(records[0]["tokens"]) <= 9
    assert records[0]["tokens"] != records[1]["tokens"]


def test_evaluate_agrees_with_training_and_takes_any_text(trained, text_file, tmp_path):
    workdir, _ = trained
    result = run("-m", "sheepop_jax", "evaluate", "--ckpt", workdir, "--json")
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    logged = [line for line in log_lines(workdir) if "val_loss" in line][-1]
    assert figures["loss"] == pytest.approx(logged["val_loss"], rel=1e-5)
    assert figures["accuracy"] == pytest.approx(logged["val_accuracy"])
    content = text_file.read_text()
    tail = content[int(len(content) * 0.9) :]
    assert (figures["bytes"], figures["tokens"]) == (len(tail), len(tail) + 1)

    held_out = tmp_path / "tail.txt"
    held_out.write_text(tail)
    result = run("-m", "sheepop_jax", "evaluate", "--ckpt", workdir, "--data", held_out, "--json")
    assert json.loads(result.stdout)["loss"] == pytest.approx(figures["loss"], rel=1e-5)


def test_int8_weights_sample_evaluate_and_bench(trained, tmp_path):
    workdir, _ = trained
    words = ["--ckpt", workdir, "--quantize", "int8"]
    result = run("sample.py", *words, "--prompt", "line 1", "--max_new_tokens", 9, "--json")
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["tokens"]) <= 9

    result = run("-m", "sheepop_jax", "evaluate", *words, "--json")
    logged = [line for line in log_lines(workdir) if "val_loss" in line][-1]["val_loss"]
    loss = json.loads(result.stdout)["loss"]
    assert loss == pytest.approx(logged, rel=0.005) and loss != pytest.approx(logged, rel=1e-6)

    peak_bytes = {}
    for quantize, options in (None, words[:2]), ("int8", words):
        out = tmp_path / str(quantize)
        sizes = ["--prompt_lengths", 4, "--batch_sizes", 1, "--new_tokens", 2, "--repeats", 1]
        result = run("-m", "sheepop_jax", "bench", *options, *sizes, "--out", out)
        assert result.returncode == 0, result.stderr
        measured = json.loads((out / "inference.json").read_text())
        assert measured["quantize"] == quantize
        peak_bytes[quantize] = measured["rows"][0]["peak_bytes"]
    assert peak_bytes["int8"] < peak_bytes[None]


def test_evaluate_without_the_text_says_what_to_do(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained[0], copy)
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["data"]["path"] = str(tmp_path / "gone.txt")
    saved["shards"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(saved))
    result = run("-m", "sheepop_jax", "evaluate", "--ckpt", copy)
    assert result.returncode == 2
    assert "--data FILE" in result.stderr.splitlines()[-1]


def test_damage_to_a_sampled_checkpoint_is_an_error(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained[0], copy)
    for path in (copy / "checkpoints").rglob("params/**/*"):
        if path.is_file() and path.stat().st_size > 100:
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = run("sample.py", "--ckpt", copy, "--prompt", "line")
    assert result.returncode == 2 and result.stdout == ""
    assert "its content has changed" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [["sample.py"], ["-m", "sheepop_jax", "evaluate"]])
def test_a_directory_that_is_no_run(words, trained, tmp_path):
    result = run(*words, "--ckpt", tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: --ckpt: got ")
    beside = run(*words, "--ckpt", trained[0].parent / "tnyi")
    assert "tiny" in beside.stderr.splitlines()[-1]


def test_a_full_disk_is_one_line_and_costs_no_older_checkpoint(trained, text_file, tmp_path):
    """A limit on the size of files stands for the full disk."""
    workdir = tmp_path / "copy"
    shutil.copytree(trained[0], workdir)
    code = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    result = run("-c", code, *train_words(text_file, workdir, train__num_steps=9))
    assert result.returncode == 1, result.stderr
    assert "saved step" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(r"error: .*0000000[789]: not saved \(.*MB free", last), last
    assert {"00000004", "00000006"} <= {p.name for p in (workdir / "checkpoints").iterdir()}
    again = run(*train_words(text_file, workdir, train__num_steps=9))
    assert again.returncode == 0 and "going on from step 6" in again.stderr


def test_the_checkpoints_of_a_run_are_listed_verified_and_deleted(trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained[0], copy)

    def checkpoints(*words):
        return run("-m", "sheepop_jax", "checkpoints", "--ckpt", copy, *words)

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
    assert result.stderr == f"error: 1 of {len(saved)} checkpoints are damaged\n"
    shown = result.stdout.splitlines()
    assert "DAMAGED" in shown[1] and largest.name in shown[1] and "verified" in shown[-1]

    for words, said in (
        (["--delete", "77"], "--delete: got 77; expected some of"),
        (["--keep", str(saved[0])], "at least one whole checkpoint left"),
        (["--delete", *map(str, saved)], "at least one whole checkpoint left"),
        (["--delete", "1", "--keep", "2"], "not allowed with"),
    ):
        result = checkpoints(*words)
        assert (result.returncode, result.stdout) == (2, "")
        assert said in result.stderr and result.stderr.count("\n") == 1
    assert sorted(int(p.name) for p in (copy / "checkpoints").glob("0*")) == saved
    assert checkpoints("--delete", str(saved[0])).returncode == 0
    assert sorted(int(p.name) for p in (copy / "checkpoints").glob("0*")) == saved[1:]
    result = checkpoints("--keep", str(saved[-1]))
    gone = ", ".join(map(str, saved[1:-1])) or "none"
    assert (result.returncode, result.stderr) == (0, f"deleted: {gone}\n")
    assert sorted(int(p.name) for p in (copy / "checkpoints").glob("0*")) == saved[-1:]
