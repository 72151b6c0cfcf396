"""What `gzip -9` needs for a text: to compare a model with."""

import zlib
from collections.abc import Callable

from sheepop_jax.data.preprocess.corpus_store import CorpusStore
from sheepop_jax.data.preprocess.progress import Progress
from sheepop_jax.data.preprocess.split import Split

_GZIP_BYTES = 64_000_000  # held-out bytes that the figure covers at most


def held_out_gzip(spool: CorpusStore, split: Split, check: Callable[[], None]) -> float:
    """Bits for each held-out byte."""
    compressor = zlib.compressobj(9, wbits=31)  # 31: with gzip's header, as the command writes it
    zipped = unzipped = 0
    with Progress("data: gzip -9, to compare", 0, check) as progress:
        for segment in split.segments(spool):
            if not segment.held_out or unzipped >= _GZIP_BYTES:
                continue
            for text in spool.text(segment.start, segment.stop):
                if unzipped >= _GZIP_BYTES:
                    break
                content = text.encode()[: _GZIP_BYTES - unzipped]
                unzipped += len(content)
                zipped += len(compressor.compress(content))
                progress.update(len(content))
    return 8 * (zipped + len(compressor.flush())) / unzipped
