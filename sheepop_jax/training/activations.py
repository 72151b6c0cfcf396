"""How large activations and logits are, on one device.

Alphabet: B sequences in a microbatch (here: of one device), T time, M = B·T tokens, D model width,
H query heads, K key/value heads, C head width, F feed-forward width, V vocabulary (padded).
"""

from typing import NamedTuple

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.config.schema import Config
from sheepop_jax.model.attention import causal_share
from sheepop_jax.model.loss import chunk_elements, chunk_length
from sheepop_jax.model.transformer import Transformer, padded_vocab_size

FP32 = 4  # bytes


class Activations(NamedTuple):
    """Bytes of arrays on one device, in lists of those that exist at the same time.

    Attributes:
        tokens: M.
        block: what the backward pass of one block reads.
        kept: of all blocks, from the forward pass to the backward pass.
        head: the embeddings looked up, and the final norm.
        backward: gradients of activations of one sublayer, and with remat what it computes again.
        loss: of a chunk.
        loss_grads: what the loss hands on.
    """

    tokens: float
    block: list[float]
    kept: list[float]
    head: list[float]
    backward: list[float]
    loss: list[float]
    loss_grads: list[float]

    @classmethod
    def of(
        cls, config: Config, model: Transformer, mesh: Mesh | AbstractMesh, platform: str
    ) -> "Activations":
        """By the formula of docs/scaling.md."""
        m, tensor = config.model, mesh.shape["tensor"]
        rows = config.train.batch_size / (mesh.shape["data"] * mesh.shape["fsdp"])
        time = config.data.seq_len
        tokens = rows * time
        size = np.dtype(model.dtype).itemsize
        stream = tokens * m.d_model * size
        heads = tokens * m.d_model * size / tensor
        kv_heads = tokens * m.kv_heads * m.head_dim * size / tensor
        wide = tokens * m.d_ff * size / tensor
        # Dropout keeps the two random words that each element's decision came from.
        words = [2 * FP32 * tokens * m.d_model] if m.dropout else []
        # Two norms' outputs, what each sublayer adds; q and the attention's output; k and v; the
        # feed-forward layer before its activation and after it.
        block = 4 * [stream] + 2 * [heads] + 2 * [kv_heads] + 2 * [wide]
        pairs = rows * m.num_heads / tensor * time**2
        match model.implementation:
            case "xla":  # exponentials and weights of the pairs of positions that are formed
                pairs *= causal_share(time)
                scores = [FP32 * pairs, size * pairs]
                if m.attention_dropout:
                    scores += [2 * FP32 * pairs, size * pairs]
            case "cudnn":  # one sum of exponentials for each row
                scores = [FP32 * pairs / time]
            case _:
                raise ValueError(f"unknown attention {model.implementation!r}")
        block += scores
        padded = padded_vocab_size(model.vocab_size)
        most = chunk_elements(platform)
        chunk = chunk_length(int(tokens), padded, most)
        table = FP32 * padded * m.d_model / tensor  # its gradient, before it is split by fsdp
        logits = chunk * padded / tensor
        # Logits and their exponentials; elsewhere logits and their gradients: the rest is fused.
        loss = [FP32 * logits, (FP32 if platform == "cpu" else size) * logits]
        if platform == "cpu" and mesh.size > 1:  # a copy, of which the targets' logits are taken
            loss.append(FP32 * logits)
        if chunk < tokens:
            if platform == "cpu":  # gradients of the logits, and what they add to the table's
                loss[1] = max(loss[1], table)
            loss += [table, stream]  # carried, and stacked
        kept = {
            "none": block + 2 * words,  # random words that are drawn again are used at once
            # Its input, q, k, v, what attention adds, and the feed-forward layer before activation.
            "dots": 2 * [stream] + [heads] + 2 * [kv_heads] + [wide],
            "full": [stream],
        }
        # The larger sublayer's: by the time of attention's, the feed-forward layer's are gone.
        again = m.remat != "none"
        feed_forward = 3 * [stream] + [wide] + again * (2 * [stream] + [wide])
        attention = 3 * [stream] + scores[:1] + again * ([stream] + [heads] + scores)
        return cls(
            tokens=tokens,
            block=kept[m.remat] if again else block,
            kept=m.num_layers * kept[m.remat],
            head=2 * [stream] + words,
            backward=max(feed_forward, attention, key=sum),
            loss=loss,
            loss_grads=[table, stream],
        )
