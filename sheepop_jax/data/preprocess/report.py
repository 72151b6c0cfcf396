"""A text report on a prepared corpus."""

import numpy as np

from sheepop_jax.data.loader import PackingConfig, window_order
from sheepop_jax.data.shards import PreparedData

_SIDES = {"train": "train", "validation": "validation"}


def describe(data: PreparedData, layout: PackingConfig, seed: int) -> str:
    """Formats documents, bytes, tokens and skipped documents per source and split.

    Args:
        data: the corpus.
        layout: the packing to train with.
        seed: seed of the window order.
    """
    lines = [
        f"{'source':16}{'split':>12}{'documents':>12}{'bytes':>16}{'tokens':>16}{'bytes/token':>13}"
    ]
    for source in data.manifest["sources"]:
        for side, shown in _SIDES.items():
            documents, size, tokens = (
                source[what][side] for what in ("documents", "bytes", "tokens")
            )
            ratio = f"{size / tokens:.2f}" if tokens else "-"
            name = source["name"] or "all"
            lines.append(f"{name:16}{shown:>12}{documents:>12,}{size:>16,}{tokens:>16,}{ratio:>13}")
    order = window_order(data.train, layout, seed, data.weights)
    lines += ["", f"{'':16}{'split by':>12}{'read':>12}{'skipped':>16}"]
    for source in data.manifest["sources"]:
        skipped = sum(source["skipped"].values())
        name = source["name"] or "all"
        lines.append(f"{name:16}{source['split']:>12}{source['documents_read']:>12,}{skipped:>16,}")
        lines += [f"{'':24}skipped {n:,}: {reason}" for reason, n in source["skipped"].items()]
    lines.append(f"duplicate documents removed: {data.manifest['duplicates']:,}")
    if len(data.train) > 1:
        lines += ["", "per epoch of the mixture:"]
        for source, windows, share in zip(
            data.manifest["sources"], order.lengths, order.shares, strict=True
        ):
            passes = share * order.num_windows / windows
            lines.append(f"{source['name']:16}{share:>12.2%} of the windows, {passes:.2f} passes")
    lines += [
        "",
        f"vocabulary {data.tokenizer.vocab_size:,}; {order.num_windows:,} windows of "
        f"{layout.seq_len} tokens per epoch",
        f"gzip -9: {data.gzip_bits_per_byte:.3f} bits per byte on the validation text",
        f"shards: {data.directory}",
    ]
    return "\n".join(lines)


def random_windows(data: PreparedData, layout: PackingConfig, seed: int, count: int) -> list[str]:
    """Decodes `count` random training windows, end-of-text included."""
    order = window_order(data.train, layout, seed, data.weights)
    chosen = np.random.default_rng(seed).integers(order.num_windows, size=count)
    texts = []
    for k in chosen:
        source, start, stop = order.span(int(k))
        tokens = data.train[source].read(start, stop)
        texts.append(data.tokenizer.decode(tokens, skip_special=False))
    return texts
