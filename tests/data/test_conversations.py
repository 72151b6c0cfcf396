"""Rows of conversations to token shards: what is read, refused, skipped, dropped and packed."""

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sheepop_jax.config.loading import load_config
from sheepop_jax.data.chat import ChatEncoder
from sheepop_jax.data.loader import EvaluationBatches, PackingConfig, TrainBatches
from sheepop_jax.data.marks import BEGINS, COUNTED
from sheepop_jax.data.preprocess import conversations as encoding
from sheepop_jax.data.preprocess import encode
from sheepop_jax.data.preprocess.prepare import encode_path, prepare
from sheepop_jax.data.shards import open_shards, verify_shards
from sheepop_jax.data.sources.conversations import messages_of
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.data.windows import ConversationWindows
from sheepop_jax.errors import InputError
from tests.data.conftest import hurry, make_data_config
from tests.data.preparing import content_of

ASKED, ANSWER = "How many sheep?", "Seven."
USER, ASSISTANT = ({"role": r, "content": t} for r, t in (("user", ASKED), ("assistant", ANSWER)))
SYSTEM = {"role": "system", "content": "Be short."}
KINDS = {
    "messages": {"messages": [SYSTEM, USER, ASSISTANT], "id": 3},
    "conversations": {
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": ASKED},
            {"from": "gpt", "value": ANSWER},
        ]
    },
    "prompt and completion": {"prompt": ASKED, "completion": ANSWER},
}


def row(number, turns=1):
    texts = [(f"question {number}.{i}", f"answer {number * i}") for i in range(turns)]
    roles = ("user", "assistant")
    pairs = (zip(roles, pair, strict=True) for pair in texts)
    return {"messages": [{"role": r, "content": t} for pair in pairs for r, t in pair]}


ROWS = [row(number, 1 + number % 3) for number in range(40)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def chat_config(tmp_path, make_config, monkeypatch):
    """`chat_config(rows, **fields)`: the `data` section for conversations in a file."""
    hurry(monkeypatch)

    def make(rows=ROWS, **fields):
        fixed = {"format": "chat", "packing": "whole", "seq_len": 120, "tokenizer": "char"}
        path = write(tmp_path / "rows.jsonl", rows)
        fields = {**fixed, "path": path, "val_split": "auto", **fields}
        fields = {"model.max_seq_len": 2**12} | {f"data.{n}": v for n, v in fields.items()}
        cache = {"data.cache_dir": str(tmp_path / "cache")}
        return make_config({**cache, **fields}).data

    return make


@pytest.fixture
def data(chat_config):
    return prepare(chat_config())


def conversations_of(stream):
    """(ids, counted) of each conversation."""
    borders = [*stream.conversation_starts(), len(stream)]
    return [
        (stream.read(start, stop).tolist(), stream.weights(start, stop).tolist())
        for start, stop in zip(borders, borders[1:], strict=False)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "hub"])
def test_every_kind_of_row_is_recognised(kind, suffix, chat_config, tmp_path, caplog):
    text = json.dumps(KINDS[kind])
    others = [json.loads(text.replace("Seven", f"Seven{number}")) for number in range(2)]
    fields = {}
    if suffix == "jsonl":
        config = chat_config(others)
    else:
        directory = tmp_path / "copy"
        directory.mkdir()
        pq.write_table(pa.Table.from_pylist(others), directory / "train.parquet")
        fields = {"path": str(directory / "train.parquet")}
        if suffix == "hub":
            fields = {"path": "", "name": str(directory)}
        config = chat_config(others, **fields)
    caplog.set_level(logging.INFO)
    data = prepare(config)
    assert f"conversations in {kind}" in caplog.text
    encoder = ChatEncoder(data.tokenizer)
    wanted = {tuple(e.ids) for e in encoder.examples([messages_of(o, "text") for o in others])}
    found = [*conversations_of(data.train[0]), *conversations_of(data.validation)]
    assert {tuple(ids) for ids, _ in found} == wanted and len(wanted) == 2


BROKEN = {
    "columns text": {"text": "x"},
    "columns completion, id, prompt": {"prompt": "x", "completion": None, "id": 3},
    "messages holds str": {"messages": "x"},
    "message 2 has the role 'tool'": {"messages": [USER, {"role": "tool", "content": "x"}]},
    "message 1 has the role None": {"messages": [{"role": None, "content": "x"}, ASSISTANT]},
    "message 2 has no role": {"messages": [USER, "x"]},
    "message 2, by assistant, holds no text": {
        "messages": [USER, {"role": "assistant", "content": " \n"}]
    },
    "message 2, by assistant, holds NoneType": {"messages": [USER, {"role": "assistant"}]},
    "message 1, by user, holds list": {"messages": [{"role": "user", "content": []}, ASSISTANT]},
    "no message by the assistant": {"messages": [SYSTEM, USER]},
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_broken_row_is_one_line_or_skipped(said, chat_config, caplog):
    rows = [*ROWS[:5], {**BROKEN[said]}, *ROWS[5:]]
    with pytest.raises(InputError) as error:
        prepare(chat_config(rows))
    name = "rows.jsonl#5"
    assert error.value.field == "data.path" and f"{name} ({said}" in str(error.value.got)
    assert error.value.hint == "`data.broken_rows=skip`"
    caplog.set_level(logging.INFO)
    data = prepare(chat_config(rows, broken_rows="skip"))
    assert "skipped: 1 broken rows" in caplog.text
    assert data.train[0].num_documents + data.validation.num_documents == len(ROWS)


def test_the_column_of_the_messages_may_have_another_name(chat_config):
    rows = [{"chosen": row["messages"], "messages": 3} for row in ROWS]
    data = prepare(chat_config(rows, text_column="chosen"))
    assert data.train[0].num_documents + data.validation.num_documents == len(ROWS)


def test_the_streams_hold_each_conversation_once(data):
    encoder = ChatEncoder(data.tokenizer)
    examples = encoder.examples([row["messages"] for row in ROWS])
    wanted = sorted((e.ids.tolist(), (e.marks & COUNTED).tolist()) for e in examples)
    streams = [*data.train, data.validation]
    assert sorted(pair for stream in streams for pair in conversations_of(stream)) == wanted
    assert sum(s.num_targets for s in streams) == sum(sum(counted) for _, counted in wanted)
    assert sum(s.num_bytes for s in streams) == sum(e.num_bytes for e in examples)
    assert 0 < data.validation.num_documents < len(ROWS)
    assert verify_shards(data.directory, data.manifest) == 5


def test_small_units_give_the_same_stream_and_resume(chat_config, data, monkeypatch, tmp_path):
    monkeypatch.setattr(encode, "_UNIT_BYTES", 30)  # less than half of most conversations
    monkeypatch.setattr(encoding, "_BATCH_BYTES", 90)
    split = prepare(chat_config(cache_dir=str(tmp_path / "units")))
    assert len(split.manifest["units"]) > 5
    for found, wanted in zip(
        [*split.train, split.validation], [*data.train, data.validation], strict=True
    ):
        assert conversations_of(found) == conversations_of(wanted)
        np.testing.assert_array_equal(found.weights(3, 99), wanted.weights(3, 99))
    whole = content_of(split.directory)

    inner, calls = encode._encode_unit, []

    def stops(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        inner(*arguments)

    monkeypatch.setattr(encode, "_encode_unit", stops)
    again = chat_config(cache_dir=str(tmp_path / "again"))
    with pytest.raises(KeyboardInterrupt):
        prepare(again)
    resumed = prepare(again)
    assert len(calls) == 1 + len(split.manifest["units"])
    assert content_of(resumed.directory) == whole


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\x07" * 9])
def test_damaged_marks_are_found(data, damage):
    path = data.directory / "train-00000.marks"
    content = path.read_bytes()
    path.write_bytes(damage(content))
    with pytest.raises(InputError, match=r"train-00000\.marks"):
        open_shards(data.directory)
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(InputError, match="SHA-256"):
        open_shards(data.directory)


def windows_of(config, data, **options):
    layout = PackingConfig.of(config, data.tokenizer.end_of_text, data.tokenizer.document_bos)
    batches = TrainBatches(data.train, layout, seed=3, accum=2, batch_size=2)
    return [batches.batch_at(step) for step in range(batches.steps_per_epoch)], batches


@pytest.mark.parametrize("packing", ["whole", "one_per_window"])
def test_windows_hold_whole_conversations(packing, chat_config):
    config = chat_config(packing=packing, document_mask=True)
    data = prepare(config)
    known = conversations_of(data.train[0])
    batches, order = windows_of(config, data)
    seen = []
    for batch in batches:
        rows = (array.reshape(-1, config.seq_len) for array in batch)
        for inputs, targets, weights, segments in zip(*rows, strict=True):
            ids, position, number = [*inputs.tolist(), int(targets[-1])], 0, 0
            while position < len(ids) and ids[position]:
                found = next(k for k in known if ids[position : position + len(k[0])] == k[0])
                stop = position + len(found[0])
                assert [0.0, *weights.tolist()][position + 1 : stop] == found[1][1:]
                assert position == 0 or weights[position - 1] == 0
                assert set(segments[position : min(stop, len(inputs))].tolist()) == {number}
                position, number = stop, number + 1
                seen.append(found)
            assert not weights[position:].any() and number
            assert packing == "whole" or number == 1
    assert all(pair in seen for pair in known)
    if packing == "whole":
        assert len(order._order._sources[0]) < 0.7 * len(known)
    layout = order.packing
    counted = sum(
        float(batch.weights.sum())
        for batch in EvaluationBatches(data.validation, layout, batch_size=3)
    )
    assert counted == data.validation.num_targets
    with pytest.raises(InputError, match=r"data\.packing"):
        EvaluationBatches(data.validation, layout, batch_size=3, overlap=1)
    short = PackingConfig(20, layout.end_of_text, packing)
    with pytest.raises(InputError, match="a conversation has"):
        EvaluationBatches(data.validation, short, batch_size=3)


def test_long_conversations_are_dropped_or_lose_their_oldest_turns(chat_config, caplog):
    long = {"messages": [SYSTEM, *row(50, 9)["messages"]]}
    huge = {"messages": [{"role": "user", "content": "question " * 20}, ASSISTANT]}
    asked = {"messages": [SYSTEM, USER, ASSISTANT, huge["messages"][0]]}  # no answer is left
    rows = [*ROWS, long, huge, asked]
    rows += [{"messages": [{"role": "system", "content": "?!"}, ASSISTANT]}]  # no user at all
    dropped = prepare(chat_config(rows))
    assert "3 conversations dropped: longer than data.seq_len" in caplog.text
    caplog.clear()
    config = chat_config(rows, long_conversations="truncate")
    data = prepare(config)
    assert "2 conversations dropped: longer" in caplog.text
    assert "1 conversations truncated to data.seq_len" in caplog.text
    assert data.directory != dropped.directory
    streams = [*data.train, data.validation]
    found = [pair for stream in streams for pair in conversations_of(stream)]
    assert max(len(ids) for ids, _ in found) <= config.seq_len + 1
    encoder = ChatEncoder(data.tokenizer)
    ends = encoder.examples([[SYSTEM, *long["messages"][-2 * n :]] for n in range(1, 9)])
    number = sum(len(end.ids) <= config.seq_len + 1 for end in ends)
    one = ends[number - 1]
    assert 1 < number < 8
    [truncated] = [pair for pair in found if pair[0] == one.ids.tolist()]
    assert truncated[1] == (one.marks & COUNTED).tolist()
    # A longer window holds them all.
    whole = prepare(chat_config(rows, seq_len=400))
    assert whole.train[0].num_documents + whole.validation.num_documents == len(rows)


def test_a_conversation_that_fills_a_window_is_kept(chat_config, data):
    """The last of T + 1 tokens is a target only."""
    streams = [*data.train, data.validation]
    lengths = [len(ids) for stream in streams for ids, _ in conversations_of(stream)]
    for seq_len, dropped in (
        (max(lengths) - 1, 0),
        (max(lengths) - 2, lengths.count(max(lengths))),
    ):
        found = prepare(chat_config(seq_len=seq_len))
        number = found.train[0].num_documents + found.validation.num_documents
        assert number == len(ROWS) - dropped


def test_a_limit_of_bytes_cuts_no_conversation(chat_config):
    data = prepare(chat_config(max_bytes=400))
    streams = [*data.train, data.validation]
    number = sum(stream.num_documents for stream in streams)
    assert 2 < number < len(ROWS)


def test_few_conversations_are_split_whole(chat_config):
    data = prepare(chat_config(ROWS[:3]))
    assert (data.train[0].num_documents, data.validation.num_documents) == (2, 1)
    with pytest.raises(InputError) as error:
        prepare(chat_config(ROWS[:1]))
    assert error.value.hint == "more conversations"


def test_a_new_tokenizer_is_trained_on_the_contents(chat_config):
    data = prepare(chat_config(tokenizer="bpe", vocab_size=280, chat_template="chatml"))
    assert [data.tokenizer.token_text(i) for i in (278, 279, 280, 281)][2:] == [
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert data.tokenizer.encode("question") != [*map(ord, "question")]
    assert not any('["' in (data.tokenizer.token(i) or "") for i in range(280))
    characters = prepare(chat_config(chat_template="qwen", seq_len=400)).tokenizer
    assert characters.token_text(1) == "\n" and characters.end_ids[1] == characters.vocab_size - 1


def test_a_template_that_refuses_a_row_is_one_line_or_skipped(chat_config, tmp_path, caplog):
    from tests.data.test_chat import OWN, ChatSettings, Tokenizer, train_bpe

    chat = ChatSettings(chat_template=OWN["alternating"])
    content = train_bpe(iter(["sheep"] * 3), 280).to_json()
    tokenizer = Tokenizer.with_stream_tokens(content, None, "<|endoftext|>", chat=chat)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    rows = [*ROWS[:7], {"messages": [USER, USER, ASSISTANT]}, *ROWS[7:]]
    fields = {"tokenizer": str(tmp_path / "tokenizer.json"), "chat_template": "", "seq_len": 2000}
    with pytest.raises(InputError, match=r"must alternate.*rows\.jsonl#7") as error:
        prepare(chat_config(rows, **fields))
    assert error.value.hint == "`data.broken_rows=skip`"
    data = prepare(chat_config(rows, **fields, broken_rows="skip"))
    assert "1 conversations skipped: the chat template refuses them" in caplog.text
    assert data.train[0].num_documents + data.validation.num_documents == len(ROWS)


def test_other_conversations_are_encoded_for_evaluation(chat_config, data, tmp_path):
    path = write(tmp_path / "other.jsonl", ROWS[3:5])
    encoded = encode_path(chat_config(), path, data.tokenizer, "data")
    encoder = ChatEncoder(data.tokenizer)
    examples = encoder.examples([row["messages"] for row in ROWS[3:5]])
    wanted = [(e.ids.tolist(), (e.marks & COUNTED).tolist()) for e in examples]
    assert conversations_of(encoded.stream) == wanted
    path = write(tmp_path / "long.jsonl", [row(3, 9)])
    with pytest.raises(InputError, match="no longer than a window"):
        encode_path(chat_config(), path, data.tokenizer, "data")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"packing": "stream"}, "data.packing"),
        ({"val_split": "tail"}, "data.val_split"),
        ({"val_split": "tails"}, "data.val_split"),
        ({"join_rows": True}, "data.join_rows"),
        ({"chat_template": ""}, "data.chat_template"),
        ({"path": "a.txt"}, "data.format"),
        ({"path": "a.csv"}, "data.format"),
        ({"format": "text"}, "data.packing"),
    ],
)
def test_what_would_cut_a_conversation_is_refused(chat_config, fields, field):
    with pytest.raises(InputError) as error:
        chat_config(**fields)
    assert error.value.field == field


def test_options_of_conversations_have_no_effect_on_text():
    with pytest.raises(InputError, match=r"no effect on data\.format=text") as error:
        load_config("base", ["data.chat_loss=all"])
    assert error.value.field == "data.chat_loss"
    assert load_config("base", ["data.chat_loss=assistant"])


def test_text_keeps_its_shards(make_config, tmp_path, monkeypatch):
    """The options of conversations are no part of the names of text shards."""
    hurry(monkeypatch)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("sheep and grass " * 40)
    first = prepare(make_data_config(make_config, tmp_path, val_split="auto"))
    other = make_data_config(
        make_config, tmp_path, val_split="auto", chat_loss="all", chat_template="qwen"
    )
    assert prepare(other).directory == first.directory and "chat" not in first.manifest


def test_windows_are_filled_to_the_last_token():
    lengths = [3, 3, 1, 6, 2, 5, 4, 1, 1]
    marks = np.concatenate([np.array([BEGINS] + [COUNTED] * (n - 1), np.uint8) for n in lengths])
    tokens = np.arange(len(marks), dtype=np.int32)
    stream = TokenStream.of_conversations([tokens], [marks], 1, len(lengths), 17)
    for several, wanted in ((True, [6, 1, 6, 2, 5, 6]), (False, lengths)):
        windows = ConversationWindows(stream, 5, several)
        spans = [windows.span(number) for number in range(len(windows))]
        assert [stop - start for start, stop in spans] == wanted
        assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
        assert spans[-1][1] == len(stream)
    with pytest.raises(InputError, match="at least 5: a conversation has 6 tokens"):
        ConversationWindows(stream, 4, True)
