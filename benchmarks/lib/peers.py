"""PyTorch contenders: `python -m benchmarks.lib.peers WORK SHAPE …`, run by `contest`.

All use their best settings: fused AdamW, fused attention, set_to_none, inference mode, and
`torch.compile` if requested. `plain` is a minimal handwritten model like GPT-2; `gpt2` and
`starcoder2` are those of transformers, the latter with the architecture of sheepop_jax.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.lib.contest import first_tokens, serve
from benchmarks.lib.shapes import SHAPES, Shape

Work = tuple[Callable[[], Any], dict[str, Any]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class PlainBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, heads: int, feed_forward: int):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, D] → [B, T, D]."""
        b, t, d = x.shape
        qkv = self.qkv(self.norms[0](x)).view(b, t, 3, self.heads, d // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Plain(nn.Module):
    """Learned positions, blocks, tied output; on a GPU, V is padded to a multiple of 128."""

    def __init__(self, shape: Shape):
        super().__init__()
        rows = -(-shape.vocab // 128) * 128 if DEVICE == "cuda" else shape.vocab
        self.tokens = nn.Embedding(rows, shape.width)
        self.positions = nn.Embedding(shape.time, shape.width)
        self.blocks = nn.Sequential(
            *(PlainBlock(shape.width, shape.heads, shape.feed_forward) for _ in range(shape.layers))
        )
        self.norm = nn.LayerNorm(shape.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                layers = shape.layers if name.endswith(("out.weight", "down.weight")) else 0.5
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[B, T] → logits [B, T, V]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def make(kind: str, shape: Shape, context: int) -> nn.Module:
    """Creates a model of a shape, without dropout."""
    torch.manual_seed(0)
    if kind == "plain":
        return Plain(shape).to(DEVICE)
    import transformers

    transformers.logging.set_verbosity_error()
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=shape.vocab,
            n_positions=context,
            n_embd=shape.width,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.feed_forward,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="sdpa",
        )
        return transformers.GPT2LMHeadModel(config).to(DEVICE)
    config = transformers.Starcoder2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=context,
        hidden_act="gelu",
        use_bias=False,
        tie_word_embeddings=True,
        sliding_window=None,
        residual_dropout=0.0,
        embedding_dropout=0.0,
        attention_dropout=0.0,
        attn_implementation="sdpa",
    )
    return transformers.Starcoder2ForCausalLM(config).to(DEVICE)


def adamw(model: nn.Module, learning_rate: float, b2: float, decay: float) -> torch.optim.AdamW:
    """Creates AdamW with weight decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, b2), fused=True)


def train_step(shape: Shape, flags: argparse.Namespace) -> Work:
    """Forward, loss, backward, clipping, AdamW; a turn is `flags.steps` steps."""
    model = make(flags.kind, shape, shape.time)
    started = time.perf_counter()
    optimizer = adamw(model, 3e-4, 0.999, 0.01)
    half = torch.autocast(DEVICE, torch.bfloat16, enabled=flags.dtype == "bfloat16")
    batches = []
    for seed in range(4):
        ids = np.random.default_rng(seed).integers(0, shape.vocab, (shape.batch, shape.time + 1))
        batches.append(torch.from_numpy(ids).to(DEVICE))

    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with half:
            out = model(ids[:, :-1])
            logits = getattr(out, "logits", out)
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    run = torch.compile(loss_of) if flags.compile else loss_of  # including the loss

    def step(ids: torch.Tensor) -> torch.Tensor:
        loss = run(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    step(batches[0])
    compile_seconds = time.perf_counter() - started

    def work() -> float:
        for i in range(flags.steps):
            loss = step(batches[i % len(batches)])
        return loss.item()

    about = {"compile_s": round(compile_seconds, 1), "threads": torch.get_num_threads()}
    return work, about


def decode(shape: Shape, flags: argparse.Namespace) -> Work:
    """transformers' greedy `generate` with its key/value cache; a turn is one call."""
    model: Any = make(flags.kind, shape, 1024).eval()
    if flags.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    ids = np.random.default_rng(0).integers(0, shape.vocab, (flags.rows, flags.prompt))
    prompts = torch.from_numpy(ids).to(DEVICE)
    mask = torch.ones_like(prompts)

    def write(new_tokens: int) -> Any:
        with torch.inference_mode():
            return model.generate(
                prompts,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                use_cache=True,
                pad_token_id=0,
            ).cpu()

    about = first_tokens(write, flags.new_tokens)

    def work() -> int:
        written = write(flags.new_tokens)
        return int(written.shape[0] * (written.shape[1] - flags.prompt))

    return work, about


def main() -> None:
    """Serves the work selected by the flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=["train_step", "decode"])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--kind", choices=["plain", "gpt2", "starcoder2"], default="starcoder2")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=128)
    flags = parser.parse_args()
    shape = SHAPES[flags.shape]
    shape = dataclasses.replace(shape, batch=flags.batch or shape.batch)
    serve(lambda: globals()[flags.work](shape, flags))


if __name__ == "__main__":
    main()
