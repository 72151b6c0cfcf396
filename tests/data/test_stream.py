"""The layout of a stream, and reading it."""

import numpy as np
import pytest

from sheepop_jax.data import stream as module
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.preprocess.train_tokenizer import train_char
from sheepop_jax.data.stream import Piece, TokenStream, encode_pieces, encode_text
from sheepop_jax.data.token_file import TokenFile
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError


def test_the_layout_of_a_stream():
    tokenizer = train_char(["abc"])
    a, b, c = tokenizer.encode("abc")
    tokens = encode_text(tokenizer, ["ab", "", "c"])
    assert tokens.tolist() == [0, a, b, 0, 0, c, 0]
    assert tokens.dtype == np.int32
    assert encode_text(tokenizer, []).tolist() == [0]


def test_the_layout_of_a_stream_with_bos():
    plain = train_char(["<>abc"])
    tokenizer = Tokenizer.with_stream_tokens(plain.to_json(), "<", "<|endoftext|>")
    a, b, c = plain.encode("abc")
    bos = tokenizer.bos_id
    parts = encode_text(tokenizer, ["ab", "", "c"])
    assert parts.tolist() == [0, bos, a, b, 0, bos, 0, bos, c, 0]
    stream = TokenStream([parts[:1], parts[1:4], parts[4:]], 3, 3, has_bos=True)
    assert len(stream) == 9
    assert stream.read(0, 9).tolist() == [bos, a, b, 0, bos, 0, bos, c, 0]
    assert stream.read(2, 5).tolist() == [b, 0, bos]
    assert stream.num_targets == 6  # all but the first, and the other two BOS
    assert TokenStream([parts], 3, 3).num_targets == 9


@pytest.mark.parametrize("batch_chars", [1, 4, 100])
def test_pieces_go_to_their_sides_in_order(monkeypatch, batch_chars):
    monkeypatch.setattr(module, "_BATCH_CHARS", batch_chars)
    tokenizer = train_char(["abcdef"])
    pieces = [
        Piece("ab", False, True),
        Piece("c", False, False),
        Piece("d", True, True),
        Piece("", False, True),
        Piece("fe", True, False),
        Piece("f", False, False),
    ]
    given, sides = [], ([], [])
    for batch in encode_pieces(tokenizer, iter(pieces)):
        given += batch.pieces
        assert batch.restored == [True, True]
        for side, found in zip(sides, batch.sides, strict=True):
            assert found.dtype == np.int32
            side += found.tolist()
    assert given == pieces
    a, b, c, d, e, f = tokenizer.encode("abcdef")
    assert sides == ([0, a, b, c, 0, f], [0, d, f, e])


def test_no_more_is_read_ahead_than_a_few_batches(monkeypatch):
    monkeypatch.setattr(module, "_BATCH_CHARS", 10)
    read = []

    def pieces():
        for i in range(100):
            read.append(i)
            yield Piece("aaaaa", False, i == 0)

    batches = encode_pieces(train_char(["a"]), pieces())
    next(batches)
    assert len(read) <= 8
    batches.close()


def test_reading_across_files(small_pieces, data_config):
    [stream] = prepare(data_config()).train
    whole = stream.read(0, len(stream))
    borders = [0, *stream._starts.tolist()]
    for border in borders[:9]:
        for start, stop in ((border, border + 1), (max(border - 1, 0), border + 45), (0, border)):
            np.testing.assert_array_equal(stream.read(start, stop), whole[start:stop])
    assert stream.read(5, 29).dtype == np.int32
    for start, stop in ((-1, 3), (3, len(whole) + 1), (4, 3)):
        with pytest.raises(IndexError):
            stream.read(start, stop)
    memory = TokenStream.from_array(whole, 11, 3)
    np.testing.assert_array_equal(memory.read(5, 71), whole[5:71])
    assert (len(memory), memory.num_bytes, memory.num_documents) == (len(whole), 11, 3)


def test_where_documents_start(monkeypatch):
    tokens = np.array([9, 1, 2, 9, 9, 3, 9], np.int32)
    for scan in (1, 2, 3, 100):
        monkeypatch.setattr(module, "_SCAN_TOKENS", scan)
        stream = TokenStream([tokens[:2], tokens[2:2], tokens[2:]], 3, 3)
        assert stream.positions_of(9).tolist() == [0, 3, 4, 6]
    assert TokenStream.from_array(tokens[:0], 0, 0).positions_of(9).tolist() == []


def test_a_file_is_read_by_position_and_refused_once_it_has_shrunk(tmp_path):
    path = tmp_path / "t.bin"
    tokens = np.arange(70_000, 70_100, dtype="<u4")
    path.write_bytes(tokens.tobytes())
    file = TokenFile(path, "<u4")
    assert len(file) == 100
    for start, stop in ((0, 100), (99, 100), (5, 5), (3, 50)):
        np.testing.assert_array_equal(file[start:stop], tokens[start:stop])
    path.write_bytes(tokens.tobytes()[:-1])
    np.testing.assert_array_equal(file[0:99], tokens[:99])
    with pytest.raises(InputError, match="t.bin: got '399 bytes'; expected 400 bytes"):
        file[98:100]
