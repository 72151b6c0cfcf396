"""Windows and their order as functions: each once an epoch, shares, no memory."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop_jax.data.stream import TokenStream
from sheepop_jax.data.windows import DocumentWindows, MixtureSampler, StreamWindows, make_windows
from sheepop_jax.errors import InputError

T, SEED = 7, 42


def order_of(length, seed=SEED, seq_len=T):
    return MixtureSampler([StreamWindows(length, seq_len)], seed)


@pytest.mark.parametrize("length", [8, 9, 14, 15, 20, 21, 22, 151, 154, 157])
def test_each_epoch_has_every_window_once_in_an_order_of_its_own(length):
    order = order_of(length)
    n = order.num_windows
    assert n == max(1, (length - T) // T)
    slack = min(T - 1, length - 1 - n * T)
    epochs = []
    for epoch in range(4):
        spans = [order.span(epoch * n + i) for i in range(n)]
        assert all(source == 0 and stop - start == T + 1 for source, start, stop in spans)
        starts = [start for _, start, _ in spans]
        offset = min(starts)
        assert offset == order.offset(0, epoch)
        assert 0 <= offset <= slack
        assert sorted(starts) == [offset + w * T for w in range(n)]
        assert max(starts) + T + 1 <= length
        epochs.append(tuple(start - offset for start in starts))
    offsets = [order.offset(0, epoch) for epoch in range(40)]
    assert offsets[0] == 0
    assert set(offsets) == set(range(slack + 1))  # every offset turns up
    if n > 10:
        assert len(set(epochs)) == 4
        assert epochs[0] != tuple(sorted(epochs[0]))


def test_the_seed_decides_order_and_offsets():
    def spans(seed):
        order = order_of(151, seed)
        return [order.span(k) for k in range(10)], [order.offset(0, epoch) for epoch in range(10)]

    for part in (0, 1):
        assert spans(1)[part] == spans(1)[part]
        assert spans(1)[part] != spans(2)[part] != spans(2**32 - 1)[part]


def test_the_order_is_the_one_that_runs_were_made_with():
    """Another order would give a resumed run other data. Printed by grain 0.2.18 on 2026-11-24."""
    order = order_of(151)
    assert [order.span(k)[1] for k in range(5)] == [7, 49, 119, 77, 0]
    assert [order.offset(0, epoch) for epoch in range(8)] == [0, 4, 6, 1, 4, 4, 2, 5]


def test_a_window_far_away_costs_nothing():
    streams = [StreamWindows(10**12, 1024), StreamWindows(10**11, 1024)]
    tracemalloc.start()
    try:
        order = MixtureSampler(streams, SEED, [0.9, 0.1])
        for k in (10**11 + 17, 10**12):
            source, start, stop = order.span(k)
            assert 0 <= start < stop <= (10**12, 10**11)[source]
        assert tracemalloc.get_traced_memory()[1] < 2**21  # the pattern of 10,000 turns
    finally:
        tracemalloc.stop()


def test_a_stream_shorter_than_a_window_is_refused():
    with pytest.raises(InputError, match=r"data\.seq_len: got 7; expected at most 6"):
        StreamWindows(7, T)
    assert StreamWindows(8, T).span(0) == (0, 8)


def stream_of(lengths, end_of_text=0):
    """Documents of these many tokens, each token another number."""
    tokens, number = [end_of_text], 1
    for length in lengths:
        tokens += [*range(number, number + length), end_of_text]
        number += length
    return TokenStream.from_array(np.array(tokens, np.int32), 1, len(lengths))


@settings(max_examples=40, deadline=None, database=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=12), seq_len=st.integers(1, 12))
def test_windows_of_documents_hold_each_target_once(lengths, seq_len):
    stream = stream_of(lengths)
    windows = DocumentWindows(stream, seq_len, 0)
    assert windows.slack == 0
    borders = stream.positions_of(0).tolist()
    targets = []
    for index in range(len(windows)):
        start, stop = windows.span(index)
        assert 2 <= stop - start <= seq_len + 1
        targets += range(start + 1, stop)
        # None crosses a border, and one that is not full is the end of its document.
        assert not set(range(start + 1, stop - 1)) & set(borders)
        assert stop - start == seq_len + 1 or stop - 1 in borders
    assert targets == list(range(1, len(stream)))
    begun = {windows.span(index)[0] for index in range(len(windows))}
    assert set(borders[:-1]) <= begun
    assert len(windows) == sum(-(-(length + 1) // seq_len) for length in lengths)


def test_the_packing_decides_the_windows():
    stream = stream_of([3, 20, 1])
    assert len(make_windows(stream, T, "stream", 0)) == len(StreamWindows(len(stream), T)) == 3
    assert len(make_windows(stream, T, "one_per_window", 0)) == 1 + 3 + 1


def test_windows_of_documents_come_once_an_epoch_too():
    windows = DocumentWindows(stream_of([3, 20, 1, 8]), T, 0)
    order = MixtureSampler([windows], SEED)
    expected = sorted((0, *windows.span(i)) for i in range(len(windows)))
    epochs = []
    for epoch in range(4):
        spans = [order.span(epoch * len(windows) + i) for i in range(len(windows))]
        assert sorted(spans) == expected
        epochs.append(tuple(spans))
    assert len(set(epochs)) > 1


WEIGHTS = [
    [0.5, 0.5],
    [0.7, 0.2, 0.1],
    [0.29, 0.71],
    [1.0, 2.0, 4.0],
    [0.12345, 0.87655],
    [0.99999, 0.00001],
    [1 / 3, 1 / 3, 1 / 3],
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_shares_of_a_mixture_are_the_weights(weights, unshuffled):
    sources = [StreamWindows(1000 + 100 * i, T) for i in range(len(weights))]
    order = MixtureSampler(sources, SEED, weights)
    exact = np.array(weights) / sum(weights)
    np.testing.assert_allclose(order.shares, exact, atol=1.0001e-4)
    if weights == [1.0, 2.0, 4.0]:  # 1428.6, 2857.1 and 5714.3: the largest rest is rounded up
        assert order.shares == [0.1429, 0.2857, 0.5714]
    assert sum(order.shares) == pytest.approx(1)
    owners = np.array([order.span(k)[0] for k in range(10_000)])
    counts = np.bincount(owners, minlength=len(weights))
    np.testing.assert_allclose(counts / 10_000, exact, atol=1.0001e-4)
    # Evenly: wherever one looks, a source is no more than two windows off its share.
    for start in range(0, 10_000, 371):
        found = np.bincount(owners[start : start + 64], minlength=len(weights))
        assert np.abs(found - exact * len(owners[start : start + 64])).max() <= 2


def test_a_tiny_weight_has_a_turn(unshuffled):
    sources = [StreamWindows(100, T) for _ in range(4)]
    order = MixtureSampler(sources, SEED, [1.0, 1e-9, 1e-12, 1.0])
    owners = [order.span(k)[0] for k in range(10_002)]
    assert owners.count(1) == owners.count(2) == 1
    assert min(order.shares) > 0


def test_each_source_of_a_mixture_has_its_windows_once_in_its_epoch():
    lengths = (151, 83, 36)
    sources = [StreamWindows(length, T) for length in lengths]
    order = MixtureSampler(sources, SEED, [0.6, 0.3, 0.1])
    assert order.lengths == [20, 10, 4]
    assert order.num_windows == 34
    spans = [[], [], []]
    for k in range(140):
        source, start, stop = order.span(k)
        spans[source].append((start, stop))
    for number, windows in enumerate(sources):
        n, seen = len(windows), []
        assert len(spans[number]) > 3 * n
        for epoch in range(len(spans[number]) // n):
            part = spans[number][epoch * n : (epoch + 1) * n]
            offset = order.offset(number, epoch)
            assert sorted(part) == [windows.span(i, offset) for i in range(n)]
            seen.append(tuple(start - offset for start, _ in part))
        assert len(set(seen)) == len(seen)
    # The first source's order is that of a run on it alone; the others have their own.
    alone = order_of(151)
    assert spans[0][:30] == [alone.span(k)[1:] for k in range(30)]
    one = MixtureSampler([StreamWindows(151, T), StreamWindows(151, T)], SEED, [0.5, 0.5])
    both = [one.span(k) for k in range(40)]
    first, second = ([span[1:] for span in both if span[0] == source] for source in (0, 1))
    assert first != second  # already in the first epoch, where offsets are 0
    assert [one.offset(0, e) for e in range(9)] != [one.offset(1, e) for e in range(9)]
