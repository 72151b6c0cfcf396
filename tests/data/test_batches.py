"""Batches: rows in the order of windows, shares of processes, segments, evaluation's coverage."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop_jax.data.loader import EvaluationBatches, PackingConfig, TrainBatches, window_order
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.data.windows import DocumentWindows
from sheepop_jax.errors import InputError

T, SEED, EOT = 7, 42, 99
LAYOUT = PackingConfig(T, EOT)
PADDED = PackingConfig(T, EOT, "one_per_window", document_mask=True)


def stream(length: int) -> TokenStream:
    """A stream in which token i is i + 100, so that tokens tell where they stood."""
    return TokenStream.from_array(np.arange(100, 100 + length, dtype=np.uint16), 3 * length, 1)


def documents(*lengths: int) -> TokenStream:
    """Documents of these many tokens, with end-of-text between them."""
    tokens, number = [EOT], 100
    for length in lengths:
        tokens += [*range(number, number + length), EOT]
        number += length
    return TokenStream.from_array(np.array(tokens, np.int32), 1, len(lengths))


def train_batches(length=151, accum=2, batch_size=4, seed=SEED, layout=LAYOUT, **options):
    streams = options.pop("streams", None) or [stream(length)]
    return TrainBatches(streams, layout, seed=seed, accum=accum, batch_size=batch_size, **options)


def evaluation(tokens, layout=LAYOUT, **options):
    return EvaluationBatches(tokens, layout, **options)


def test_rows_lie_in_the_order_of_windows():
    batches, order = train_batches(), window_order([stream(151)], LAYOUT, SEED)
    for step in (0, 3, 1000):
        batch = batches.batch_at(step)
        assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (2, 4, T)
        assert [a.dtype for a in batch[:3]] == [np.int32, np.int32, np.float32]
        assert all(a.flags.c_contiguous for a in batch[:3])
        assert batch.segments is None
        for a, b in itertools.product(range(2), range(4)):
            _, start, stop = order.span(step * 8 + a * 4 + b)
            assert batch.inputs[a, b].tolist() == list(range(100 + start, 100 + stop - 1))
            assert batch.targets[a, b].tolist() == list(range(101 + start, 100 + stop))
        assert (batch.weights == 1).all()


def test_epochs_are_those_of_the_most_repeated_source():
    assert train_batches(length=151).epochs(5) == 5 * 8 / 20
    mixed = train_batches(streams=[stream(151), stream(29)], weights=(0.75, 0.25))
    assert mixed.epochs(5) == 40 * 0.25 / 3


def test_a_batch_does_not_depend_on_what_was_read_before():
    batches = train_batches()
    first = batches.batch_at(5)
    for step in (17, 0, 5):
        again = batches.batch_at(step)
    np.testing.assert_equal(again, first)
    np.testing.assert_equal(train_batches().batch_at(5), first)


MIXTURE = dict(streams=[documents(4, 30, 1, 9), documents(*[3] * 40)], weights=[0.75, 0.25])


# Which processes hold which rows of four.
SHARES = [[[0], [1], [2], [3]], [[0, 1], [2, 3]], [[0, 3], [1, 2]]]


@pytest.mark.parametrize("rows", SHARES, ids=str)
@pytest.mark.parametrize(
    "options", [{}, dict(layout=PADDED, **MIXTURE)], ids=["one source", "a padded mixture"]
)
def test_processes_hold_rows_of_the_same_global_batch(rows, options):
    def made(rows=None):
        return train_batches(**options, rows=rows)

    shares, order = [made(share) for share in rows], np.argsort(sum(rows, []))
    for step in (0, 11):
        parts = [[a for a in share.batch_at(step) if a is not None] for share in shares]
        joined = [np.concatenate(arrays, axis=1)[:, order] for arrays in zip(*parts, strict=True)]
        whole = [a for a in made().batch_at(step) if a is not None]
        np.testing.assert_equal(joined, whole)


def test_rows_of_a_mixture_come_from_their_sources():
    streams = [stream(151), TokenStream.from_array(np.arange(1000, 1080), 1, 1)]
    batches = train_batches(streams=streams, weights=[0.75, 0.25])
    order = window_order(streams, LAYOUT, SEED, [0.75, 0.25])
    for step in (0, 1, 20):
        inputs = batches.batch_at(step).inputs
        assert np.count_nonzero(inputs[..., 0] >= 1000) == 2  # of 8, in every batch
        for a, b in itertools.product(range(2), range(4)):
            source, start, _ = order.span(step * 8 + a * 4 + b)
            assert inputs[a, b, 0] == (100, 1000)[source] + start


def test_documents_shorter_than_a_window_are_padded():
    found = documents(4, 0, 16)
    batches = train_batches(streams=[found], layout=PADDED, accum=1, batch_size=1)
    assert batches.steps_per_epoch == 1 + 1 + 3
    rows = {}
    for step in range(5):
        batch = batches.batch_at(step)
        rows[tuple(batch.inputs[0, 0].tolist())] = [a[0, 0].tolist() for a in batch[1:]]
    # The last token to predict is an input too, of a target that does not count.
    assert rows[99, 100, 101, 102, 103, 99, 0][0] == [100, 101, 102, 103, 99, 0, 0]
    assert rows[99, 100, 101, 102, 103, 99, 0][1] == [1, 1, 1, 1, 1, 0, 0]
    assert rows[99, 99, 0, 0, 0, 0, 0][:2] == [[99, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert rows[99, *range(104, 110)][1] == [1] * 7
    assert rows[tuple(range(110, 117))][0] == list(range(111, 118))
    assert rows[117, 118, 119, 99, 0, 0, 0][:2] == [[118, 119, 99, 0, 0, 0, 0], [1] * 3 + [0] * 4]
    assert sum(sum(row[1]) for row in rows.values()) == len(found) - 1


@settings(max_examples=15, deadline=None, database=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    seq_len=st.integers(1, 9),
    batch_size=st.integers(1, 4),
)
def test_padded_batches_hold_each_target_once_in_an_epoch(lengths, seq_len, batch_size):
    found = documents(*lengths)
    layout = PackingConfig(seq_len, EOT, "one_per_window")
    tokens = found.read(0, len(found))
    windows = len(DocumentWindows(found, seq_len, EOT))
    training = TrainBatches([found], layout, seed=SEED, accum=1, batch_size=1)
    counted = []
    for step in range(windows):
        batch = training.batch_at(step)
        counted += batch.targets[batch.weights > 0].tolist()
    assert sorted(counted) == sorted(tokens[1:].tolist())
    is_val = EvaluationBatches(found, layout, batch_size=batch_size)
    counted = []
    for batch in is_val:
        counted += batch.targets[batch.weights > 0].tolist()
    assert counted == tokens[1:].tolist()
    assert len(is_val) == -(-windows // batch_size)


BOS = 98


def with_bos(*lengths: int) -> TokenStream:
    """`documents` with BOS before each."""
    tokens, number = [EOT], 100
    for length in lengths:
        tokens += [BOS, *range(number, number + length), EOT]
        number += length
    return TokenStream([np.array(tokens, np.int32)], 1, len(lengths), has_bos=True)


@settings(max_examples=15, deadline=None, database=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    seq_len=st.integers(1, 9),
    overlap=st.integers(0, 3),
)
def test_bos_is_given_and_every_other_token_predicted_once(lengths, seq_len, overlap):
    found = with_bos(*lengths)
    tokens = found.read(0, len(found))
    expected = tokens[tokens != BOS].tolist()
    assert len(expected) == found.num_targets
    for packing in ("stream", "one_per_window"):
        layout = PackingConfig(seq_len, EOT, packing, bos=BOS)
        counted = []
        repeated = min(overlap, seq_len - 1) if packing == "stream" else 0
        for batch in EvaluationBatches(found, layout, batch_size=2, overlap=repeated):
            counted += batch.targets[batch.weights > 0].tolist()
        assert counted == expected
    windows = DocumentWindows(found, seq_len, EOT, BOS)
    starts = [found.read(*windows.span(i))[0] for i in range(len(windows))]
    assert starts.count(BOS) == len(lengths) and EOT not in starts
    training = TrainBatches([found], layout, seed=SEED, accum=1, batch_size=1)
    batches = [training.batch_at(step) for step in range(len(windows))]
    counted = [t for b in batches for t in b.targets[b.weights > 0].tolist()]
    assert sorted(counted) == sorted(expected)


def test_a_segment_begins_with_bos():
    layout = PackingConfig(5, EOT, document_mask=True, bos=BOS)
    window = np.array([[BOS, 5, EOT, BOS, 6, EOT]], np.int32)
    batch = layout.batch(window, np.ones((1, 5), np.float32))
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1]]
    assert batch.weights.tolist() == [[1, 1, 0, 1, 1]] and batch.weights.dtype == np.float32


@pytest.mark.parametrize(
    "tokens, expected",
    [
        ([5, 6, 7, 8], [0, 0, 0]),
        ([EOT, 6, 7, 8], [0, 0, 0]),
        ([5, EOT, 7, 8], [0, 1, 1]),
        ([EOT, EOT, 7, EOT], [0, 1, 1]),
        ([5, 6, EOT, EOT], [0, 0, 1]),
        ([5, 6, 7, EOT], [0, 0, 0]),
    ],
)
def test_segments_count_the_documents_of_a_window(tokens, expected):
    layout = PackingConfig(3, EOT, document_mask=True)
    window = np.array([[tokens, tokens[::-1]]], np.int32)
    batch = layout.batch(window, np.ones((1, 2, 3), np.float32))
    assert batch.segments.dtype == np.int32
    assert batch.segments[0, 0].tolist() == expected
    assert (batch.segments[..., 0] == 0).all()
    assert PackingConfig(3, EOT).batch(window, np.ones((1, 2, 3))).segments is None


def test_evaluation_has_segments_too():
    layout = PackingConfig(T, EOT, document_mask=True)
    (batch,) = evaluation(documents(2, 9), layout, batch_size=2)
    assert batch.segments.tolist() == [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]]


def test_a_layout_is_as_configured(make_config):
    config = make_config({"data.packing": "one_per_window", "data.document_mask": True})
    assert PackingConfig.of(config.data, 5) == PackingConfig(13, 5, "one_per_window", True)
    assert PackingConfig.of(config.data, 5, 3).bos == 3
    assert PackingConfig.of(make_config().data, 0) == PackingConfig(13, 0, "stream", False)


def test_iterating_ahead_gives_the_same_batches():
    batches = train_batches()
    found = list(batches.iterate(3, 9))
    assert len(found) == 6
    for step, batch in enumerate(found, start=3):
        np.testing.assert_equal(batch, batches.batch_at(step))
    assert list(batches.iterate(5, 5)) == []


def test_an_error_while_reading_ahead_reaches_the_reader():
    class Broken(TokenStream):
        def read(self, start, stop):
            raise InputError("shard", "damage", "none")

    broken = Broken([np.zeros(50, np.int32)], 1, 1)
    batches = TrainBatches([broken], LAYOUT, seed=1, accum=1, batch_size=1)
    with pytest.raises(InputError, match="shard"):
        next(batches.iterate(0, 5))


def test_reading_ahead_can_be_given_up():
    batches = train_batches().iterate(0, 10**9)
    next(batches)
    batches.close()


def test_steps_per_epoch():
    def steps(length, accum, batch_size):
        return train_batches(length, accum, batch_size).steps_per_epoch

    assert steps(151, 2, 4) == 3  # 20 windows
    assert steps(151, 4, 5) == steps(151, 3, 7) == 1
    assert steps(151, 19, 1) == 2
    assert steps(8, 1, 3) == 1
    assert train_batches(**MIXTURE).steps_per_epoch == math.ceil((5 + 22) / 8)


def test_training_needs_a_window():
    with pytest.raises(InputError, match=r"data\.seq_len: got 7; expected at most 6"):
        train_batches(length=7)
    assert train_batches(length=8).batch_at(0).inputs[0, 0].tolist() == list(range(100, 107))


@pytest.mark.parametrize("overlap", [0, 1, 3, 6])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 14, 15, 16, 22, 36, 97])
def test_evaluation_counts_every_token_but_the_first_once(length, overlap):
    found = evaluation(stream(length), batch_size=3, overlap=overlap)
    batches = list(found)
    assert len(batches) == len(found)
    counted = []
    for batch in batches:
        assert [a.shape for a in batch[:3]] == [(3, T)] * 3
        assert [a.dtype for a in batch[:3]] == [np.int32, np.int32, np.float32]
        assert set(np.unique(batch.weights)) <= {0, 1}
        counted += batch.targets[batch.weights > 0].tolist()
        real = batch.weights > 0
        np.testing.assert_array_equal(batch.inputs[real] + 1, batch.targets[real])
    assert counted == list(range(101, 100 + length))
    if overlap == 0:
        windows = max(1, math.ceil((length - 1) / T))
        assert len(batches) == math.ceil(windows / 3)
    # Past the first window, a counted token has at least `overlap` tokens before it.
    rows = np.concatenate([batch.weights for batch in batches])[1:]
    assert not rows[:, :overlap].any()


def test_evaluation_pads_with_zeros():
    (batch,) = evaluation(stream(10), batch_size=3)
    assert batch.inputs[1].tolist() == [107, 108, 109, 0, 0, 0, 0]
    assert batch.targets[1].tolist() == [108, 109, 0, 0, 0, 0, 0]
    assert batch.weights[1].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert not batch.inputs[2].any() and not batch.weights[2].any()


def test_evaluation_stops_after_max_batches():
    whole = list(evaluation(stream(97), batch_size=2))
    part = evaluation(stream(97), batch_size=2, max_batches=3)
    np.testing.assert_equal(list(part), whole[:3])
    np.testing.assert_equal(list(part), whole[:3])  # from the start again
    assert len(part) == 3
    assert len(evaluation(stream(97), batch_size=2, max_batches=99)) == len(whole) == 7


@pytest.mark.parametrize("rows", SHARES, ids=str)
@pytest.mark.parametrize("layout, overlap", [(LAYOUT, 2), (PADDED, 0)], ids=["stream", "padded"])
def test_evaluation_shares_rows_between_processes(rows, layout, overlap):
    tokens = documents(20, 3, 0, 31, 8)
    options = dict(layout=layout, batch_size=4, overlap=overlap)
    whole = list(evaluation(tokens, **options))
    shares = [list(evaluation(tokens, rows=share, **options)) for share in rows]
    assert [len(share) for share in shares] == [len(whole)] * len(rows)
    order = np.argsort(sum(rows, []))
    for index, batch in enumerate(whole):
        parts = [[a for a in share[index] if a is not None] for share in shares]
        joined = [np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True)]
        np.testing.assert_equal(joined, [a for a in batch if a is not None])


def test_evaluation_refuses_what_cannot_be():
    for overlap in (-1, T):
        with pytest.raises(InputError, match=r"overlap: got .*integer in \[0, 7\)"):
            evaluation(stream(97), batch_size=2, overlap=overlap)
    with pytest.raises(InputError, match=r"overlap: got 2; expected 0 with"):
        evaluation(documents(9), PADDED, batch_size=2, overlap=2)
