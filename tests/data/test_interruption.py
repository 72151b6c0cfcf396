"""A preparation that is killed, stopped or out of room, and goes on."""

import logging
import signal

import pytest

from sheepop_jax.data import encode, progress
from sheepop_jax.data import prepare as module
from sheepop_jax.data.prepare import prepare
from sheepop_jax.errors import InputError
from tests.data.preparing import content_of, names_in, units_in

DEATHS = {
    "reading": ("spool", "_copy", 9, "before"),
    "read, not yet renamed": ("prepare", "write_spool", 1, "after"),
    "before the tokenizer": ("prepare", "train_bpe", 1, "before"),
    "after the tokenizer": ("prepare", "encode_units", 1, "before"),
    "before the first token file": ("encode", "_Writer.close", 1, "before"),
    "between the files of a unit": ("encode", "_Writer.close", 3, "after"),
    "before a unit's marker": ("encode", "write_text", 4, "before"),
    "between units": ("encode", "write_text", 4, "after"),
    "before the manifest": ("prepare", "make_manifest", 1, "before"),
    "before the rename": ("prepare", "write_text", 2, "after"),
    "after the rename": ("prepare", "_Preparation._open", 1, "before"),
    "while the text is deleted": ("cache", "shutil.rmtree", 1, "before"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_preparation_goes_on_from_the_units_that_are_done(
    config, tmp_path, start, encoded, death
):
    whole = prepare(config(cache_dir=str(tmp_path / "undisturbed")))
    total = len(encoded)
    assert total == len(whole.manifest["units"]) > 7
    encoded.clear()
    process = start(config(), die=DEATHS[death])
    output, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    [pending] = [*(tmp_path / "cache").glob(".tokens-*")] or [None]
    done = [int(p.stem[5:]) for p in pending.glob("unit-*.json")] if pending else []
    started = units_in(output)
    assert not pending or len(started) - len(done) in (0, 1)
    data = prepare(config())
    # None that is done is encoded again; none at all once the shards have their name.
    renamed = death in ("after the rename", "while the text is deleted")
    assert encoded == ([] if renamed else [n for n in range(total) if n not in done])
    assert content_of(data.directory) == content_of(whole.directory)
    assert data.identity == whole.identity
    left = [n for n in names_in(tmp_path / "cache") if n != data.directory.name]
    allowed = {"reading": ".reading", "read, not yet renamed": ".reading"}
    allowed |= {"after the rename": ".spool", "while the text is deleted": ".deleted"}
    assert [n.split("-")[0] for n in left] == ([allowed[death]] if death in allowed else [])


def test_text_that_was_read_is_not_read_again(config, start, monkeypatch, caplog):
    start(config(), die=DEATHS["between units"]).communicate(timeout=60)
    monkeypatch.setattr(module, "write_spool", None)
    monkeypatch.setattr(module, "train_bpe", None)
    with caplog.at_level(logging.INFO, "sheepop_jax"):
        prepare(config())
    assert "the text was read before" in caplog.text
    assert "were encoded before; going on" in caplog.text


def test_a_text_that_is_deleted_in_part_is_read_again(config, tmp_path, start):
    start(config(), die=DEATHS["between units"]).communicate(timeout=60)
    for name in ("text.bin", "documents.bin", "spool.json"):
        [spool] = (tmp_path / "cache").glob(".spool-*")
        (spool / name).unlink()
        process = start(config(), die=DEATHS["before the manifest"])
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
    [spool] = (tmp_path / "cache").glob(".spool-*")
    (spool / "spool.json").write_text("")
    assert prepare(config()).train_tokens > 0


def test_weights_are_those_asked_for_though_the_text_was_read_for_others(config, tmp_path, start):
    def mixture(weight):
        text = str(tmp_path / "text")
        parts = {"a": {"weight": weight, "path": f"{text}/0*"}}
        return {**parts, "b": {"weight": 1.0, "path": f"{text}/1*"}}

    process = start(config(mixture=mixture(1.0)), die=DEATHS["between units"])
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert prepare(config(mixture=mixture(4.0))).weights == [0.8, 0.2]
    assert prepare(config(mixture=mixture(1.0))).weights == [0.5, 0.5]  # not those that are there


@pytest.mark.parametrize(
    "where",
    ["reading", "reading for the tokenizer", "encoding", "gzip -9"],
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, LookupError])
def test_a_stop_is_obeyed_in_each_phase_and_the_work_goes_on(
    config, tmp_path, encoded, where, error, monkeypatch
):
    """LookupError stands for the program's own `StopRequested`."""
    labels = []
    inner = progress.Progress.__init__

    def note(self, label, *rest):
        labels.append(label)
        inner(self, label, *rest)

    monkeypatch.setattr(progress.Progress, "__init__", note)
    calls = []

    def check():
        calls.append(labels[-1])
        late = len(calls) - calls.index(labels[-1])
        if labels[-1].startswith(f"data: {where}") and late > (5 if where == "encoding" else 0):
            raise error

    with pytest.raises(error):
        prepare(config(), check=check)
    left = names_in(tmp_path / "cache")
    kinds = [name.split("-")[0] for name in left]
    assert kinds == ([] if where == "reading" else [".spool", ".tokens"])
    [tokens] = [*(tmp_path / "cache").glob(".tokens-*")] or [tmp_path]
    done = len([*tokens.glob("unit-*.json")])
    assert (done > 0) == (where in ("encoding", "gzip -9"))
    encoded.clear()
    data = prepare(config())
    assert len(encoded) == len(data.manifest["units"]) - done
    assert names_in(tmp_path / "cache") == [data.directory.name]


def test_each_phase_looks_at_the_stop_signal_within_a_document(config, tmp_path, monkeypatch):
    """Also where all the text is one document."""
    monkeypatch.setattr("sheepop_jax.data.tokenizer._PIECE_CHARS", 100)
    monkeypatch.setattr("sheepop_jax.data.stream._BATCH_CHARS", 100)
    path = tmp_path / "one.txt"
    path.write_text("the sheep and the hill " * 200)
    labels, calls = [], []
    inner = progress.Progress.__init__

    def note(self, label, *rest):
        labels.append(label)
        inner(self, label, *rest)

    monkeypatch.setattr(progress.Progress, "__init__", note)
    prepare(config(path=str(path), val_split="tail"), check=lambda: calls.append(labels[-1]))
    for label in ("data: reading for the tokenizer", "data: encoding"):
        assert calls.count(label) > 20, label


@pytest.mark.parametrize("phase", ["reading", "tokenizer", "unit", "manifest"])
def test_a_full_disk_is_said_and_what_is_done_is_kept(
    config, tmp_path, monkeypatch, encoded, phase
):
    def full(*arguments, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        match phase:
            case "reading":
                patch.setattr(module, "write_spool", full)
            case "tokenizer":
                patch.setattr(module, "write_text", full)
            case "unit":
                inner = encode.write_text

                def late(path, content):
                    if path.name == "unit-00003.json":
                        full()
                    inner(path, content)

                patch.setattr(encode, "write_text", late)
            case "manifest":
                patch.setattr(module, "make_manifest", full)
        said = rf"data\.cache_dir: got '{tmp_path}/cache \(No space left on device; \d+ MB free\)'"
        with pytest.raises(InputError, match=said) as caught:
            prepare(config())
    assert "\n" not in str(caught.value)
    kinds = (
        [name.split("-")[0] for name in names_in(tmp_path / "cache")] if phase != "reading" else []
    )
    assert kinds == ([] if phase == "reading" else [".spool", ".tokens"])
    if phase == "reading":
        assert not (tmp_path / "cache").exists()
    done = {"unit": 3, "manifest": len(encoded)}.get(phase, 0)
    encoded.clear()
    data = prepare(config())
    assert len(encoded) == len(data.manifest["units"]) - done
    assert names_in(tmp_path / "cache") == [data.directory.name]
