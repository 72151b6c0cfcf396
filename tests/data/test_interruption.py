"""A preparation that is killed, stopped or out of room, and goes on."""

import logging
import re
import shutil

import pytest

from sheepop_jax import progress
from sheepop_jax.data.preprocess import encode
from sheepop_jax.data.preprocess import prepare as module
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.errors import InputError
from tests.data.preparing import content_of, killed, names_in

ALL = 99  # units
# Where, and how many units are done by then.
DEATHS = {
    "reading": (("corpus_store", "_copy", 9, "before"), 0),
    "read, not yet renamed": (("prepare", "write_corpus_store", 1, "after"), 0),
    "before the tokenizer": (("prepare", "train_bpe", 1, "before"), 0),
    "after the tokenizer": (("prepare", "encode_units", 1, "before"), 0),
    "before the first token file": (("encode", "_Writer.close", 1, "before"), 0),
    "between the files of a unit": (("encode", "_Writer.close", 3, "after"), 1),
    "before a unit's marker": (("encode", "write_atomic", 4, "before"), 3),
    "between units": (("encode", "write_atomic", 4, "after"), 4),
    "before the manifest": (("prepare", "make_manifest", 1, "before"), ALL),
    "before the rename": (("prepare", "write_atomic", 2, "after"), ALL),
    "after the rename": (("prepare", "_Preparation._open", 1, "before"), ALL),
    "while the text is deleted": (("cache", "shutil.rmtree", 1, "before"), ALL),
}
LEFT = {"reading": [".reading"], "read, not yet renamed": [".reading"]}
LEFT |= {"after the rename": [".spool"], "while the text is deleted": [".deleted"]}


@pytest.mark.parametrize("death", DEATHS)
def test_a_killed_preparation_resumes_from_the_units_that_are_done(
    config, tmp_path, undisturbed, encoded, death, monkeypatch, caplog
):
    place, done = DEATHS[death]
    killed(config(), place)
    begun = death not in ("reading", "read, not yet renamed")
    if begun:  # the text is not read again, nor does a tokenizer that is there learn again
        monkeypatch.setattr(module, "write_corpus_store", None)
        if death != "before the tokenizer":
            monkeypatch.setattr(module, "train_bpe", None)
    with caplog.at_level(logging.INFO, "sheepop_jax"):
        data = prepare(config())
    # None that is done is encoded again.
    assert encoded == list(range(done, len(undisturbed.manifest["units"])))
    assert content_of(data.directory) == content_of(undisturbed.directory)
    assert data.identity == undisturbed.identity
    left = [n.split("-")[0] for n in names_in(tmp_path / "cache") if n != data.directory.name]
    assert left == LEFT.get(death, [])
    if death == "between units":
        assert "the text is already read" in caplog.text
        assert "MB already encoded" in caplog.text


def test_a_text_that_is_deleted_in_part_is_read_again(config, tmp_path, undisturbed):
    killed(config(), DEATHS["between units"][0])
    for name in ("text.bin", "documents.bin", "spool.json", "spool.json, empty"):
        cache = tmp_path / name
        shutil.copytree(tmp_path / "cache", cache)
        [spool] = cache.glob(".spool-*")
        file = spool / name.removesuffix(", empty")
        file.unlink() if file.name == name else file.write_text("")
        data = prepare(config(cache_dir=str(cache)))
        assert content_of(data.directory) == content_of(undisturbed.directory)


def test_weights_are_those_asked_for_though_the_text_was_read_for_others(config, tmp_path):
    def mixture(weight):
        text = str(tmp_path / "text")
        parts = {"a": {"weight": weight, "path": f"{text}/0*"}}
        return {**parts, "b": {"weight": 1.0, "path": f"{text}/1*"}}

    killed(config(mixture=mixture(1.0)), DEATHS["between units"][0])
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
                patch.setattr(module, "write_corpus_store", full)
            case "tokenizer":
                patch.setattr(module, "write_atomic", full)
            case "unit":
                inner = encode.write_atomic

                def late(path, content):
                    if path.name == "unit-00003.json":
                        full()
                    inner(path, content)

                patch.setattr(encode, "write_atomic", late)
            case "manifest":
                patch.setattr(module, "make_manifest", full)
        with pytest.raises(InputError) as error:
            prepare(config())
    assert error.value.field == "data.cache_dir"
    said = rf"{tmp_path}/cache \(No space left on device; \d+ MB free\)"
    assert re.fullmatch(said, str(error.value.got))
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
