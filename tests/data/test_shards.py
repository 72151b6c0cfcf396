"""From text to token files and back; what the manifest says; what is refused."""

import hashlib
import importlib.metadata
import json
import resource
import shutil
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheepop_jax.data import shards
from sheepop_jax.data import tokenizer as tokenizer_module
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.preprocess.train_tokenizer import train_bpe, train_char
from sheepop_jax.data.shards import open_shards, verify_shards
from sheepop_jax.data.stream import encode_text
from sheepop_jax.errors import InputError
from sheepop_jax.files import sealed
from tests.data.conftest import WORDS

SPECIAL = "sheep <|endoftext|>\r\n e\u0301"


@settings(
    max_examples=10,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    texts=st.lists(
        st.text(max_size=20).filter(lambda text: text.strip("\ufeff").strip()),
        max_size=4,
        unique=True,
    ),
    kind=st.sampled_from(["bpe", "char"]),
    fraction=st.floats(0.1, 1),
)
def test_every_byte_of_any_text_comes_back(
    texts, kind, fraction, data_config, tmp_path_factory, small_pieces, documents_of
):
    texts = list(dict.fromkeys(text.lstrip("\ufeff") for text in texts))
    # The first holds every character, so that a character tokenizer knows the others' too.
    texts.insert(0, "a" + "".join(sorted(set("".join(texts) + SPECIAL))) + "a")
    texts.append(SPECIAL)
    root = tmp_path_factory.mktemp("texts")
    for i, text in enumerate(texts):
        (root / f"{i}.txt").write_bytes(text.encode())
    made = data_config(
        path=str(root),
        cache_dir=str(root / "cache"),
        tokenizer=kind,
        val_split="tail",
        val_fraction=fraction * len("".join(texts[1:])) / len("".join(texts)),
        seq_len=2,
    )
    data = prepare(made)
    [train] = data.train
    found = documents_of(train, data.tokenizer), documents_of(data.validation, data.tokenizer)
    # The cut makes two of one document, so the whole is compared without its borders.
    assert "".join(found[0] + found[1]) == "".join(texts)
    assert len(found[0]) == train.num_documents
    assert len("".join(found[0]).encode()) == train.num_bytes
    assert len("".join(found[1]).encode()) == data.validation.num_bytes
    assert train.num_documents + data.validation.num_documents - len(texts) in (0, 1)


def test_a_corpus_in_files_is_the_stream_of_its_documents(
    data_config, small_pieces, tmp_path, documents_of, monkeypatch
):
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 100)  # a space is near: ids stay
    data = prepare(data_config())
    [stream] = data.train
    texts = [path.read_bytes().decode() for path in sorted((tmp_path / "text").iterdir())]
    train, validation = (documents_of(s, data.tokenizer) for s in (stream, data.validation))
    assert sorted(train + validation) == sorted(texts)
    assert [text for text in texts if text in train] == train
    expected = encode_text(data.tokenizer, train)
    np.testing.assert_array_equal(stream.read(0, len(stream)), expected)
    assert data.tokenizer.fingerprint == train_bpe(iter(train), 307).fingerprint
    assert len(data.manifest["units"]) > 20


def test_the_manifest_says_what_was_counted_otherwise(
    data_config, small_pieces, tmp_path, documents_of, monkeypatch
):
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARS", 100)
    text = tmp_path / "text"
    (text / "zz.txt").write_bytes((text / "00.txt").read_bytes())
    (text / "blank.txt").write_text(" \n")
    other = tmp_path / "other"
    other.mkdir()
    for i in range(9):
        (other / f"{i}.txt").write_text(f"another hill {i} " * 5)
    parts = {
        "hills": {"weight": 3.0, "path": str(text)},
        "others": {"weight": 1.0, "path": str(other)},
    }
    data = prepare(data_config(mixture=parts, val_fraction=0.3))
    manifest = json.loads((data.directory / "manifest.json").read_text())
    assert manifest == data.manifest
    assert (manifest["format"], manifest["duplicates"]) == (3, 1)
    assert manifest["split"] == "document 0.3"
    assert manifest["tokenizer"] == data.tokenizer.fingerprint
    for package, version in manifest["versions"].items():
        assert version == importlib.metadata.version(package)
    assert {"numpy", "tokenizers", "grain"} <= set(manifest["versions"])
    hills, others = manifest["sources"]
    assert (hills["name"], others["name"]) == ("hills", "others")
    assert data.weights == [hills["weight"], others["weight"]] == [0.75, 0.25]
    assert (hills["split"], others["split"]) == ("document", "document")
    assert (hills["documents_read"], others["documents_read"]) == (32, 9)
    assert hills["skipped"] == {"empty or only white space": 1}
    is_val = documents_of(data.validation, data.tokenizer)
    for number, source in enumerate(manifest["sources"]):
        texts = documents_of(data.train[number], data.tokenizer)
        own = [t for t in is_val if t.startswith("another") == (number == 1)]
        for side, found in (("train", texts), ("validation", own)):
            assert source["documents"][side] == len(found)
            assert source["bytes"][side] == len("".join(found).encode())
            # An end-of-text stands before each document; the stream's last belongs to none.
            assert source["tokens"][side] == len(encode_text(data.tokenizer, found)) - 1
    assert data.train_tokens == sum(map(len, data.train))
    for unit in manifest["units"]:
        for side in ("train", "validation"):
            if side in unit:
                content = (data.directory / unit[side]["file"]).read_bytes()
                assert hashlib.sha256(content).hexdigest() == unit[side]["sha256"]
                assert len(content) == 2 * unit[side]["tokens"]
    digests = []
    for name, number in ((text, 0), (other, 1)):
        for path in sorted(name.iterdir()):
            if path.name != "blank.txt":
                digest = hashlib.sha256(path.read_bytes()).digest()
                digests.append(digest + bytes([False]) + number.to_bytes(2))
    assert manifest["source"] == hashlib.sha256(b"".join(digests)).hexdigest()
    assert data.identity["source"] == manifest["source"]
    assert data.identity["weights"] == [0.75, 0.25]


def test_gzip_figure(data_config, tmp_path, documents_of, monkeypatch):
    words = np.random.default_rng(7).choice(WORDS, 30_000)
    (tmp_path / "text" / "long.txt").write_text(" ".join(words), encoding="utf-8")
    config = data_config(val_split="tail")
    data = prepare(config)
    content = "".join(documents_of(data.validation, data.tokenizer)).encode()
    # `gzip -9` writes the same bytes as zlib at level 9, in a frame of 18 bytes.
    size = len(zlib.compress(content, 9)) - 6 + 18
    assert data.gzip_bits_per_byte == pytest.approx(8 * size / len(content))
    monkeypatch.setattr("sheepop_jax.data.preprocess.prepare.GZIP_BYTES", 1003)
    limited = prepare(data_config(val_split="tail", cache_dir=str(tmp_path / "second")))
    size = len(zlib.compress(content[:1003], 9)) - 6 + 18
    assert limited.gzip_bits_per_byte == pytest.approx(8 * size / 1003)


@pytest.mark.parametrize(("last", "dtype"), [(65535, "<u2"), (65536, "<u4")])
def test_a_vocabulary_beyond_16_bits(tmp_path, data_config, documents_of, last, dtype):
    about = json.loads(train_char(["ab"]).to_json())
    about["model"]["vocab"]["b"] = last
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    (tmp_path / "a.txt").write_text("ab" * 50)
    fields = dict(path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer.json"))
    data = prepare(data_config(**fields, val_split="tail"))
    assert (data.tokenizer.vocab_size, data.manifest["dtype"]) == (last + 1, dtype)
    assert data.train[0].read(2, 3).tolist() == [last]
    assert documents_of(data.train[0], data.tokenizer) == ["ab" * 40]


@pytest.fixture
def prepared(undisturbed, tmp_path):
    """A directory of shards, to be damaged."""
    return shutil.copytree(undisturbed.directory, tmp_path / "shards")


FILES = ["train-00000.bin", "train-00002.bin", "validation-00001.bin", "tokenizer.json"]


@pytest.mark.parametrize("damage", ["truncate", "append", "flip", "delete"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_is_refused(prepared, monkeypatch, name, damage):
    path = prepared / name
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert verify_shards(prepared, manifest) == 1 + sum(len(unit) - 1 for unit in manifest["units"])
    content = path.read_bytes()
    match damage:
        case "truncate":
            path.write_bytes(content[:-9])
        case "append":
            path.write_bytes(content + b"xx")
        case "flip":
            path.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
        case "delete":
            path.unlink()

    def refused(check, *arguments):
        with pytest.raises(InputError) as error:
            check(prepared, *arguments)
        assert str(path) in f"{error.value.field} {error.value.got}"
        assert error.value.hint.startswith(f"deleting {prepared};")

    refused(open_shards)
    if name == "manifest.json":
        return
    refused(verify_shards, manifest)
    monkeypatch.setattr(shards, "_HASH_BYTES", 0)  # as for large corpora: by size alone
    if damage == "flip" and name.endswith(".bin"):
        open_shards(prepared)
    else:
        refused(open_shards)


def test_damaged_shards_are_not_reused(data_config):
    path = prepare(data_config()).directory / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError) as error:
        prepare(data_config())
    assert error.value.field == str(path)


def test_a_manifest_that_says_other_things_than_it_did_is_refused(prepared):
    path = prepared / "manifest.json"
    content = path.read_text()
    manifest = json.loads(content)
    for key in manifest:
        path.write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        with pytest.raises(InputError, match=r"manifest\.json.*try deleting"):
            open_shards(prepared)
    for other in ("[]", "null", "{}", "3", content.replace("0.2", "0.3")):
        path.write_text(other)
        with pytest.raises(InputError, match=r"manifest\.json.*try deleting"):
            open_shards(prepared)
    path.write_text(content)
    open_shards(prepared)


def test_a_manifest_names_no_file_outside_its_directory(prepared):
    path = prepared / "manifest.json"
    manifest = json.loads(path.read_text())
    name = manifest["units"][0]["train"]["file"]
    (prepared / name).rename(prepared.parent / name)
    manifest["units"][0]["train"]["file"] = f"../{name}"
    del manifest["sha256"]
    manifest = sealed(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=rf"{prepared.name}/{name}"):
        open_shards(prepared)
    with pytest.raises(InputError, match=rf"{prepared.name}/{name}"):
        verify_shards(prepared, manifest)


def test_a_file_that_shrinks_during_the_run_is_an_error_not_a_crash(prepared):
    data = open_shards(prepared)
    for size in (10, 9):  # 9: half a token
        with (prepared / "train-00000.bin").open("rb+") as file:
            file.truncate(size)
        with pytest.raises(InputError, match=f"train-00000.bin: got '{size} bytes'"):
            data.train[0].read(0, 13)


def test_more_files_than_a_shell_lets_a_process_open(prepared, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    manifest = json.loads((prepared / "manifest.json").read_text())
    manifest["units"] *= 40
    del manifest["sha256"]
    manifest = sealed(manifest)
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        data = open_shards(prepared)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
        assert len(data.train[0].read(0, data.train_tokens)) == data.train_tokens
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
