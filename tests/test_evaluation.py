"""Held-out figures against numpy over every token."""

import gzip
import json
import math
import subprocess

import numpy as np
import pytest
import tokenizers

from configs import base
from sheepop_jax import evaluation, pipeline
from sheepop_jax.config.schema import Config
from sheepop_jax.data.batch import Batch
from sheepop_jax.data.compression import gzip_bits_per_byte, xz_bits_per_byte
from sheepop_jax.data.loader import PackingConfig
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.evaluation import Evaluator, evaluate
from sheepop_jax.model.loss import EvaluationSums
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.signals import StopRequested
from tests import reference
from tests.tiny import MACHINE, one_device, tiny

pytestmark = pytest.mark.usefixtures("fast_compile")
VOCAB = 101
END_OF_TEXT = 0
LAYOUT = PackingConfig(13, END_OF_TEXT)


def evaluate_stream(model, params, stream, layout, **options):
    return Evaluator(model, stream, layout, **options)(params)


@pytest.fixture(scope="module")
def trained(make_config, random_params):
    model = Transformer(make_config().model, VOCAB)
    params = random_params(model)
    return model, {**params, "embedding": params["embedding"] * 0.3}


@pytest.mark.parametrize(("length", "overlap"), [(40, 0), (41, 5), (9, 0)])
def test_figures_are_those_of_numpy_over_all_tokens(small_config, trained, length, overlap):
    """Of one batch and a row, of several with an overlap, and of less than a window."""
    model, params = trained
    seq_len, batch = 13, 3
    tokens = np.random.default_rng(5).integers(0, VOCAB, length, dtype=np.int32)
    stream = TokenStream.from_array(tokens, num_bytes=77, num_documents=1)
    found = evaluate_stream(model, params, stream, LAYOUT, batch_size=batch, overlap=overlap)

    nats, right, counted = 0.0, 0, 0
    start, done = 0, 1  # `done`: the first token that is not yet predicted
    while done < length:
        window = tokens[start : start + seq_len + 1]
        logits = reference.logits(params, small_config.model, window[None, :-1])[0, :, :VOCAB]
        for t, target in enumerate(window[1:]):
            if start + t + 1 < done:
                continue  # context only
            nats += np.log(np.exp(logits[t] - logits[t].max()).sum()) + logits[t].max()
            nats -= logits[t, target]
            right += logits[t].argmax() == target
            counted += 1
        done = start + len(window)
        start += seq_len - overlap
    assert counted == length - 1
    assert found.tokens == counted and found.bytes == 77
    assert found.loss == pytest.approx(nats / counted, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / counted), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 77, rel=1e-5)
    assert found.accuracy == pytest.approx(right / counted)


def test_documents_of_a_window_are_evaluated_alone(small_config, trained):
    model, params = trained
    seq_len, lengths = 13, ((6, 7), (1, 12), (13,))
    draw = np.random.default_rng(5)
    tokens = draw.integers(0, VOCAB, (len(lengths), seq_len + 1), dtype=np.int32)
    segments = np.array([np.repeat(np.arange(len(row)), row) for row in lengths], np.int32)
    weights = draw.integers(0, 2, segments.shape).astype(np.float32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights, segments)

    nats = 0.0
    for inputs, targets, counts, row in zip(*batch[:3], lengths, strict=True):
        for piece in np.split(np.arange(seq_len), np.cumsum(row)[:-1]):
            logits = reference.logits(params, small_config.model, inputs[None, piece])[0, :, :VOCAB]
            nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(piece)), targets[piece]]
            nats += counts[piece] @ nll
    found = evaluate(model, params, [batch], 2.0)
    assert found.loss == pytest.approx(nats / weights.sum(), rel=1e-5)
    unmasked = evaluate(model, params, [batch._replace(segments=None)], 2.0)
    assert unmasked.loss != pytest.approx(found.loss, rel=1e-3)


def test_a_masked_stream_is_its_documents_one_by_one(small_config, trained):
    """From the layout, through batches that carry segments, to the figures."""
    model, params = trained
    draw = np.random.default_rng(8)
    documents = [draw.integers(1, VOCAB, length, dtype=np.int32) for length in (3, 1, 2, 1)]
    parts = [part for document in documents for part in ([END_OF_TEXT], document)]
    tokens = np.concatenate([*parts, [END_OF_TEXT]]).astype(np.int32)
    nats = 0.0
    for document in documents:
        inputs = np.concatenate([[END_OF_TEXT], document])
        targets = np.append(document, END_OF_TEXT)
        logits = reference.logits(params, small_config.model, inputs[None])[0, :, :VOCAB]
        nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(targets)), targets]
        nats += nll.sum()
    stream = TokenStream.from_array(tokens, num_bytes=50, num_documents=4)
    masked = PackingConfig(13, END_OF_TEXT, document_mask=True)  # one window holds them all
    found = evaluate_stream(model, params, stream, masked, batch_size=3)
    alone = evaluate_stream(
        model, params, stream, PackingConfig(13, END_OF_TEXT, "one_per_window"), batch_size=3
    )
    for figures in (found, alone):
        assert figures.tokens == len(tokens) - 1
        assert figures.loss == pytest.approx(nats / figures.tokens, rel=1e-5)
    plain = evaluate_stream(model, params, stream, LAYOUT, batch_size=3)
    assert plain.loss != pytest.approx(found.loss, rel=1e-3)


def test_compression_figures_are_those_of_the_commands(tmp_path):
    content = b"sheep and grass, " * 500 + bytes(range(256))
    path = tmp_path / "text"
    path.write_bytes(content)
    found = {
        "gzip": gzip_bits_per_byte([content[:99], content[99:]]),
        "xz": xz_bits_per_byte(content),
    }
    for program in ("gzip", "xz"):
        size = len(subprocess.run([program, "-9c", path], capture_output=True, check=True).stdout)
        spare = len(path.name) + 1 if program == "gzip" else 0  # gzip also writes the file's name
        assert found[program] == pytest.approx(8 * (size - spare) / len(content))


def test_a_part_of_the_stream_has_its_share_of_the_bytes(trained):
    model, params = trained
    tokens = np.random.default_rng(6).integers(0, VOCAB, 53, dtype=np.int32)
    stream = TokenStream.from_array(tokens, num_bytes=520, num_documents=1)
    part = evaluate_stream(model, params, stream, LAYOUT, batch_size=3, max_batches=1)
    assert (part.tokens, part.bytes) == (39, 390)
    assert part.bits_per_byte == pytest.approx(part.loss / math.log(2) * 39 / 390)


def test_every_batch_is_checked_for_a_stop(trained):
    model, params = trained
    tokens = np.random.default_rng(7).integers(0, VOCAB, 53, dtype=np.int32)
    stream = TokenStream.from_array(tokens, num_bytes=52, num_documents=1)
    settings = {"layout": LAYOUT, "batch_size": 3}
    looks = iter([None, StopRequested("SIGTERM")])

    def check():
        if error := next(looks):
            raise error

    with pytest.raises(StopRequested):
        evaluate_stream(model, params, stream, **settings, check=check)


def test_sums_beyond_2_to_the_24_are_exact(trained, monkeypatch):
    sizes = iter([2**24, 1, 1])
    monkeypatch.setattr(
        evaluation, "_batch_sums", lambda *args: EvaluationSums(*[np.float32(next(sizes))] * 3)
    )
    assert evaluate(*trained, [()] * 3, 1.0).tokens == 2**24 + 2


def test_a_loss_too_high_for_its_perplexity_is_no_crash(trained):
    model, params = trained
    params = {**params, "embedding": 1e4 * params["embedding"]}
    stream = TokenStream.from_array(np.arange(9, dtype=np.int32), num_bytes=8, num_documents=1)
    found = evaluate_stream(model, params, stream, LAYOUT, batch_size=3)
    assert found.loss > 710 and math.isfinite(found.perplexity)


def test_nothing_to_evaluate_is_an_error(trained):
    with pytest.raises(ValueError, match="all weights are 0"):
        evaluate(*trained, [], 1.0)


def test_other_text_is_read_as_in_training(tiny_root, tmp_path, run_program):
    """Documents of tables, of compressed files and of directories, and not the files' own bytes."""
    documents = ["line 1 says 1\n", "line 2 says 4\n" * 3, "says"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    (tmp_path / "texts").mkdir()
    for number, document in enumerate(documents):
        with gzip.open(tmp_path / "texts" / f"{number}.txt.gz", "wt") as file:
            file.write(document)
    found = []
    for name in ("rows.jsonl", "texts", "texts/0.txt.gz"):
        words = ["evaluate", "--ckpt", str(tiny_root / "run"), "--data", str(tmp_path / name)]
        code, out, _, _ = run_program("tools", [*words, "--json"])
        assert code == 0
        found.append(json.loads(out))
    assert found[0] == found[1]
    assert found[0]["bytes"] == len("".join(documents))
    assert found[0]["tokens"] == len("".join(documents)) + 3  # of which 3 are end-of-text
    assert found[0]["gzip_bits_per_byte"] == gzip_bits_per_byte(["".join(documents).encode()])
    assert found[2]["tokens"] == len(documents[0]) + 1


def test_bits_per_byte_of_lost_text_are_left_out(trained):
    model, params = trained
    stream = TokenStream.from_array(np.arange(9, dtype=np.int32), num_bytes=8, num_documents=1)
    figures = [
        Evaluator(model, stream, LAYOUT, 3, lossless=lossless).validate(params)
        for lossless in (True, False)
    ]
    assert set(figures[0]) - set(figures[1]) == {"val_bits_per_byte"}


@pytest.fixture(scope="module")
def lossy_run(tmp_path_factory):
    """A run whose tokenizer knows one word, and whose validation text has others."""
    root = tmp_path_factory.mktemp("lossy")
    vocabulary = {"\u2581a": 0, "?": 1, "\u2581": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Metaspace()
    inner.add_special_tokens(["</s>"])
    (root / "words.json").write_text(inner.to_str())
    (root / "text.txt").write_text("a " * 900 + "b " * 99)
    config = base.get_config()
    more = {"data.tokenizer": str(root / "words.json"), "data.val_split": "tail"}
    config.update_from_flattened_dict({**tiny(root), **more, "train.num_steps": 1})
    with one_device():
        figures = pipeline.train(Config.from_dict(config), root / "run", MACHINE)
    assert "val_loss" in figures and "val_bits_per_byte" not in figures
    return root / "run"


@pytest.mark.parametrize(
    ("text", "lossless"), [(None, False), ("a a a a b", False), ("a a a a", True)]
)
def test_evaluate_has_no_bits_per_byte_of_lost_text(
    lossy_run, tmp_path, run_program, text, lossless
):
    """Of the run's validation split, and of other text, which the tokenizer may restore."""
    words = ["evaluate", "--ckpt", str(lossy_run)]
    if text:
        (tmp_path / "text.txt").write_text(text)
        words += ["--data", str(tmp_path / "text.txt")]
    code, out, err, _ = run_program("tools", [*words, "--json"])
    found = json.loads(out)
    assert code == 0 and math.isfinite(found["loss"]) and found["gzip_bits_per_byte"] > 0
    assert ("bits_per_byte is left out" in err) is not lossless
    if lossless:
        nats = found["loss"] * found["tokens"]
        assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text))
    else:
        assert found["bits_per_byte"] is None
        _, out, _, _ = run_program("tools", words)
        assert "  loss  " in out and "  bits_per_byte" not in out


def test_what_is_evaluated_of_a_stream(trained):
    stream = TokenStream.from_array(np.arange(53, dtype=np.int32), num_bytes=52, num_documents=1)
    sizes = {
        n: Evaluator(trained[0], stream, LAYOUT, 3, max_batches=n).num_tokens for n in (0, 1, 9)
    }
    assert sizes == {0: 53, 1: 40, 9: 53}
