"""The order of training windows as a function, shares of processes, and evaluation's coverage."""

import itertools
import math

import numpy as np
import pytest

from sheepop_jax.data.batches import (
    TrainBatches,
    WindowOrder,
    evaluation_batches,
    num_evaluation_batches,
    steps_per_epoch,
)
from sheepop_jax.data.shards import TokenStream
from sheepop_jax.errors import InputError

T, SEED = 7, 42


def stream(length: int) -> TokenStream:
    """A stream in which token i is i + 100, so that tokens tell where they stood."""
    return TokenStream.from_array(np.arange(100, 100 + length, dtype=np.uint16), 3 * length, 1)


def train_batches(length=151, accum=2, batch_size=4, seed=SEED, **processes):
    return TrainBatches(
        stream(length), seq_len=T, seed=seed, accum=accum, batch_size=batch_size, **processes
    )


@pytest.mark.parametrize("length", [8, 9, 14, 15, 20, 21, 22, 151, 154, 157])
def test_each_epoch_has_every_window_once_in_an_order_of_its_own(length):
    order = WindowOrder(length, T, SEED)
    n = order.num_windows
    assert n == max(1, (length - T) // T)
    slack = min(T - 1, length - 1 - n * T)
    epochs, offsets = [], []
    for epoch in range(23):
        starts = [order.span(epoch * n + i)[0] for i in range(n)]
        offset = min(starts)
        assert 0 <= offset <= slack
        assert sorted(starts) == [offset + w * T for w in range(n)]
        assert max(starts) + T + 1 <= length
        epochs.append(tuple(start - offset for start in starts))
        offsets.append(offset)
    assert offsets[0] == 0
    if length >= 2 * T:  # with room for it, every offset turns up
        assert set(offsets) == set(range(slack + 1))
    if n > 10:
        assert len(set(epochs)) == 23
        assert epochs[0] != tuple(sorted(epochs[0]))


def test_the_seed_decides_order_and_offsets():
    spans = {
        seed: [WindowOrder(151, T, seed).span(k) for k in range(60)] for seed in (1, 2, 2**32 - 1)
    }
    assert spans[1] != spans[2] != spans[2**32 - 1]
    assert spans[1] == [WindowOrder(151, T, 1).span(k) for k in range(60)]


def test_the_order_is_the_one_that_runs_were_made_with():
    """Another order would give a resumed run other data. Printed by grain 0.2.18 on 2026-11-24."""
    order = WindowOrder(151, T, SEED)
    assert [order.span(k)[0] for k in range(5)] == [7, 49, 119, 77, 0]
    assert [order.offset(epoch) for epoch in range(8)] == [0, 4, 6, 1, 4, 4, 2, 5]


def test_a_window_far_away_costs_nothing():
    order = WindowOrder(10**12, 1024, SEED)
    start, stop = order.span(10**11 + 17)
    assert 0 <= start < stop <= 10**12


def test_rows_lie_in_the_order_of_windows():
    batches, order = train_batches(), WindowOrder(151, T, SEED)
    for step in (0, 3, 1000):
        batch = batches.batch_at(step)
        assert batch.inputs.shape == batch.targets.shape == batch.weights.shape == (2, 4, T)
        assert [a.dtype for a in batch] == [np.int32, np.int32, np.float32]
        for a, b in itertools.product(range(2), range(4)):
            start, stop = order.span(step * 8 + a * 4 + b)
            assert batch.inputs[a, b].tolist() == list(range(100 + start, 100 + stop - 1))
            assert batch.targets[a, b].tolist() == list(range(101 + start, 100 + stop))
        assert (batch.weights == 1).all()


def test_a_batch_does_not_depend_on_what_was_read_before():
    batches = train_batches()
    first = batches.batch_at(5)
    for step in (17, 0, 5):
        again = batches.batch_at(step)
    np.testing.assert_equal(again, first)
    np.testing.assert_equal(train_batches().batch_at(5), first)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_hold_contiguous_shares_of_the_same_global_batch(count):
    shares = [train_batches(process_index=i, process_count=count) for i in range(count)]
    for step in (0, 11):
        parts = [share.batch_at(step) for share in shares]
        joined = [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
        np.testing.assert_equal(joined, list(train_batches().batch_at(step)))
    with pytest.raises(InputError, match=r"train\.batch_size: got 4; expected a multiple of the 3"):
        train_batches(process_index=0, process_count=3)


def test_iterating_ahead_gives_the_same_batches():
    batches = train_batches()
    found = list(batches.iterate(3, 20))
    assert len(found) == 17
    for step, batch in enumerate(found, start=3):
        np.testing.assert_equal(batch, batches.batch_at(step))
    assert list(batches.iterate(5, 5)) == []


def test_an_error_while_reading_ahead_reaches_the_reader():
    class Broken(TokenStream):
        def read(self, start, stop):
            raise InputError("shard", "damage", "none")

    broken = Broken([np.zeros(50, np.int32)], 1, 1)
    batches = TrainBatches(broken, seq_len=T, seed=1, accum=1, batch_size=1)
    with pytest.raises(InputError, match="shard"):
        next(batches.iterate(0, 5))


def test_reading_ahead_can_be_given_up():
    batches = train_batches().iterate(0, 10**9)
    next(batches)
    batches.close()


def test_steps_per_epoch():
    assert steps_per_epoch(151, T, 8) == 3  # 20 windows
    assert steps_per_epoch(151, T, 20) == steps_per_epoch(151, T, 21) == 1
    assert steps_per_epoch(8, T, 3) == 1


def test_training_needs_a_window():
    with pytest.raises(InputError, match=r"data\.seq_len: got 7; expected at most 6"):
        train_batches(length=7)
    assert train_batches(length=8).batch_at(0).inputs[0, 0].tolist() == list(range(100, 107))


@pytest.mark.parametrize("overlap", [0, 1, 3, 6])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 14, 15, 16, 22, 36, 97])
def test_evaluation_counts_every_token_but_the_first_once(length, overlap):
    options = dict(seq_len=T, batch_size=3, overlap=overlap)
    batches = list(evaluation_batches(stream(length), **options))
    assert len(batches) == num_evaluation_batches(length, **options)
    counted = []
    for batch in batches:
        assert [a.shape for a in batch] == [(3, T)] * 3
        assert [a.dtype for a in batch] == [np.int32, np.int32, np.float32]
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
    (batch,) = evaluation_batches(stream(10), seq_len=T, batch_size=3)
    assert batch.inputs[1].tolist() == [107, 108, 109, 0, 0, 0, 0]
    assert batch.targets[1].tolist() == [108, 109, 0, 0, 0, 0, 0]
    assert batch.weights[1].tolist() == [1, 1, 0, 0, 0, 0, 0]
    assert not batch.inputs[2].any() and not batch.weights[2].any()


def test_evaluation_stops_after_max_batches():
    options = dict(seq_len=T, batch_size=2)
    whole = list(evaluation_batches(stream(97), **options))
    part = list(evaluation_batches(stream(97), max_batches=3, **options))
    np.testing.assert_equal(part, whole[:3])
    assert num_evaluation_batches(97, max_batches=3, **options) == 3
    assert num_evaluation_batches(97, max_batches=99, **options) == len(whole) == 7


@pytest.mark.parametrize("count", [2, 4])
def test_evaluation_shares_rows_between_processes(count):
    options = dict(seq_len=T, batch_size=4, overlap=2)
    whole = list(evaluation_batches(stream(75), **options))
    shares = [
        list(evaluation_batches(stream(75), process_index=i, process_count=count, **options))
        for i in range(count)
    ]
    for index, batch in enumerate(whole):
        parts = [share[index] for share in shares]
        joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
        np.testing.assert_equal(joined, list(batch))


def test_evaluation_refuses_what_cannot_be():
    for overlap in (-1, T):
        with pytest.raises(InputError, match=r"overlap: got .*whole number in \[0, 7\)"):
            next(evaluation_batches(stream(97), seq_len=T, batch_size=2, overlap=overlap))
    with pytest.raises(InputError, match=r"train\.batch_size"):
        next(evaluation_batches(stream(97), seq_len=T, batch_size=3, process_count=2))
