"""A run with random weights: `python -m benchmarks.lib.random_run SHAPE CONTEXT DIRECTORY`.

Also its GGUF, if the package `gguf` is installed. Greedy texts of the model do not end: the output
row of end-of-text is 0, and its logit is therefore never the largest.
"""

import itertools
import json
import string
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from benchmarks.lib.ours import model_config
from benchmarks.lib.servers import GGUF, RUN
from benchmarks.lib.shapes import SHAPES
from configs import base
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.config.schema import SCHEMA, Config
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.runtime import platform

END_OF_TEXT = 0


def main() -> None:
    """Writes the files."""
    shape, context, out = SHAPES[sys.argv[1]], int(sys.argv[2]), Path(sys.argv[3])
    platform.prepare("cpu")
    import jax

    from sheepop_jax.model.transformer import Transformer, init_params
    from sheepop_jax.training.step import jit_init

    config = Config.from_dict(base.get_config())
    config = replace(config, model=model_config(shape, context))
    model = Transformer(config.model, shape.vocab)
    params: dict[str, Any] = jit_init(lambda: init_params(model, 0))()
    params["embedding"] = params["embedding"].at[END_OF_TEXT].set(0.0)
    run = out / RUN
    run.mkdir(parents=True)
    (run / "tokenizer.json").write_text(tokenizer(shape.vocab).to_json(), encoding="utf-8")
    record = {"schema": SCHEMA, "config": config.to_dict(), "vocab_size": shape.vocab}
    record["imported"] = {"format": "random weights"}
    (run / "config.json").write_text(json.dumps(record))
    CheckpointSaver(run / "checkpoints").save_params(params)
    try:
        from sheepop_jax.interop.export_gguf import export_gguf, import_gguf

        import_gguf()
    except ValueError as error:
        print(f"no GGUF: {error}", file=sys.stderr)
        return
    export_gguf(open_run(run), jax.tree.map(np.asarray, params), 0, out / GGUF)


def tokenizer(size: int) -> Tokenizer:
    """A byte-level tokenizer whose merges are the first pairs and triples of ASCII characters."""
    tokens = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    letters = [c for c in string.printable if c.isprintable() and c != " "]
    pairs = [(a, b) for a, b in itertools.product(letters, letters)]
    triples = ((a + b, c) for (a, b), c in itertools.product(pairs, letters))
    merges = list(itertools.islice(itertools.chain(pairs, triples), size - len(tokens)))
    vocabulary = {token: id for id, token in enumerate([*tokens, *map("".join, merges)])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(tokens[:1])
    return Tokenizer(inner)


if __name__ == "__main__":
    main()
