"""What is shown of a corpus."""

import re

import numpy as np
import pytest

from sheepop_jax.data.loader import PackingConfig, window_order
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.preprocess.report import describe, random_windows


def number(text):
    return int(text.replace(",", ""))


def table(data, report):
    """Rows of the first table by (source, side): documents, bytes, tokens, bytes a token."""
    rows = {}
    for line in report.splitlines():
        match = re.match(
            r"(\S+) +(train|validation) +([\d,]+) +([\d,]+) +([\d,]+) +([\d.]+|-)$", line
        )
        if match:
            name, side, *counts, ratio = match.groups()
            rows[name, side] = (*map(number, counts), ratio)
    return rows


def test_a_table_of_the_sources(data_config, tmp_path):
    text = tmp_path / "text"
    (text / "zz.txt").write_bytes((text / "00.txt").read_bytes())
    (text / "blank.txt").write_text(" ")
    (text / "picture.png").write_bytes(b"\x00")
    data = prepare(data_config())
    layout = PackingConfig(13, 0)
    report = describe(data, layout, 3)
    rows = table(data, report)
    train, is_val = rows["all", "train"], rows["all", "validation"]
    assert train[:2] == (data.train[0].num_documents, data.train[0].num_bytes)
    assert is_val[:2] == (data.validation.num_documents, data.validation.num_bytes)
    assert train[0] + is_val[0] == 31
    assert train[2] == len(data.train[0]) - 1
    assert is_val[2] == len(data.validation) - 1
    assert train[3] == f"{train[1] / train[2]:.2f}"
    assert re.search(r"all +document +32 +2$", report, re.M)  # split by, read, skipped
    assert "skipped 1: empty or only white space" in report
    assert "skipped 1: .png files" in report
    assert "duplicate documents removed: 1\n" in report
    windows = (len(data.train[0]) - 13) // 13
    assert (
        f"vocabulary {data.tokenizer.vocab_size}; {windows:,} windows of 13 tokens per epoch"
        in report
    )
    assert f"{data.gzip_bits_per_byte:.3f} bits per byte" in report
    assert str(data.directory) in report
    assert "mixture" not in report


@pytest.mark.parametrize("packing", ["stream", "one_per_window"])
def test_the_shares_of_a_mixture(data_config, tmp_path, packing, unshuffled):
    other = tmp_path / "other"
    other.mkdir()
    for i in range(90):
        (other / f"{i}.txt").write_text(f"hill {i}")
    parts = {
        "first": {"weight": 3.0, "path": str(tmp_path / "text")},
        "second": {"weight": 1.0, "path": str(other)},
    }
    data = prepare(data_config(mixture=parts, val_fraction=0.2))
    report = describe(data, PackingConfig(13, 0, packing), 3)
    rows = table(data, report)
    assert set(rows) == {(n, s) for n in ("first", "second") for s in ("train", "validation")}
    if packing == "one_per_window":
        windows = [
            sum(-(-(len(data.tokenizer.encode(text)) + 1) // 13) for text in texts)
            for texts in texts_of(data)
        ]
    else:
        windows = [(len(stream) - 13) // 13 for stream in data.train]
    for name, share, own in zip(("first", "second"), (0.75, 0.25), windows, strict=True):
        line = rf"{name} +{share:.2%} of the windows, {share * sum(windows) / own:.2f} passes"
        assert re.search(line, report), (line, report)
    assert f"{sum(windows):,} windows of 13" in report
    order = window_order(data.train, PackingConfig(13, 0, packing), 3, data.weights)
    drawn = np.bincount([order.span(k)[0] for k in range(10_000)]) / 10_000
    assert [source["share"] for source in data.manifest["sources"]] == drawn.tolist()


def texts_of(data):
    for stream in data.train:
        text = data.tokenizer.decode(stream.read(1, len(stream) - 1), skip_special=False)
        yield text.split("<|endoftext|>")


def test_random_windows_are_windows(data_config):
    data = prepare(data_config())
    whole = data.tokenizer.decode(data.train[0].read(0, data.train_tokens), skip_special=False)
    for packing in ("stream", "one_per_window"):
        layout = PackingConfig(13, 0, packing)
        shown = random_windows(data, layout, 3, 40)
        assert shown[:9] == random_windows(data, layout, 3, 9)
        assert shown[:9] != random_windows(data, layout, 4, 9)
        assert len(shown) == 40 and len(set(shown)) > 20
        assert any("<|endoftext|>" in text for text in shown)
        for text in shown:  # a character may be cut in two at either end
            assert text.strip("\ufffd") in whole
    assert random_windows(data, PackingConfig(13, 0), 3, 0) == []
