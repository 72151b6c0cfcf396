"""The tensors of a Hugging Face model: names, shapes, and where they are in our parameters.

Alphabet: D model width, H heads, K key/value heads, C head width, F feed-forward width,
V vocabulary without padding.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sheepop_jax.errors import InputError
from sheepop_jax.interop.families import HubModel, has_bias
from sheepop_jax.model.transformer import padded_vocab_size

Path = tuple[str, ...]
Layout = Literal["same", "transposed", "rows", "joined", "per_head", "zeros"]


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file.

    Attributes:
        name: its name.
        shape: its shape in the file.
        paths: our parameters that it holds: keys into the nested dict, outermost first.
        layout: "same"; "transposed": [out, in] for our [in, out]; "rows": a table [V, D] of our
            padded one; "joined": query, key and value side by side along the last axis;
            "per_head": [H · 3 · C, D] or [H · 3 · C], query, key and value of each head in turn;
            "zeros": a bias that our model does not have.
        shapes: shapes of our parameters, as `paths`.
        heads: H for "per_head".
    """

    name: str
    shape: tuple[int, ...]
    paths: tuple[Path, ...]
    layout: Layout
    shapes: tuple[tuple[int, ...], ...]
    heads: int = 0

    def pack(self, params: Mapping[str, Any]) -> np.ndarray:
        """The tensor for the file: contiguous, in the dtype of our parameters.

        Args:
            params: our parameters, a nested dict of arrays.
        """
        arrays = [np.asarray(_at(params, path)) for path in self.paths]
        for path, array, shape in zip(self.paths, arrays, self.shapes, strict=True):
            if array.shape != shape:
                raise ValueError(f"{'/'.join(path)} is {array.shape}, not {shape}")
        match self.layout:
            case "same":
                [packed] = arrays
            case "transposed":
                packed = arrays[0].T
            case "rows":
                packed = arrays[0][: self.shape[0]]
            case "joined":
                packed = np.concatenate(arrays, -1)
            case "per_head":
                # [D, H · C] or [H · C] each → [H, 3, C, D] or [H, 3, C]
                split = [a.T.reshape(self.heads, -1, *self.shape[1:]) for a in arrays]
                packed = np.stack(split, 1).reshape(self.shape)
            case "zeros":
                packed = np.zeros(self.shape, np.float32)
        # safetensors writes the memory of an array and ignores its strides.
        return np.ascontiguousarray(packed)

    def unpack(self, array: np.ndarray) -> dict[Path, np.ndarray]:
        """Our parameters from the tensor in the file, in its dtype; padding is zero.

        Raises:
            InputError: another shape; or a bias that should be zero is not.
        """
        if array.shape != self.shape:
            raise InputError(self.name, f"shape {array.shape}", f"shape {self.shape}")
        match self.layout:
            case "same":
                found = [array]
            case "transposed":
                found = [array.T]
            case "rows":
                padding = self.shapes[0][0] - self.shape[0]
                found = [np.pad(array, ((0, padding), (0, 0))) if padding else array]
            case "joined":
                found = list(np.split(array, len(self.paths), -1))
            case "per_head":
                split = array.reshape(self.heads, 3, -1, *self.shape[1:])
                flat = [part.reshape(-1, *self.shape[1:]) for part in np.moveaxis(split, 1, 0)]
                found = [part.T for part in flat]
            case "zeros":
                if np.any(array):
                    expected = "zeros, as `sheepop_jax_biases` in config.json says"
                    raise InputError(self.name, "other values", expected, "removing that key")
                found = []
        pairs = zip(self.paths, self.shapes, found, strict=True)
        for path, shape, part in pairs:
            if part.shape != shape:
                raise ValueError(f"{'/'.join(path)} is {part.shape}, not {shape}")
        return {
            path: np.ascontiguousarray(part) for path, part in zip(self.paths, found, strict=True)
        }


def tensors(model: HubModel) -> tuple[Tensor, ...]:
    """The tensors of a model's file, in its order; every parameter of ours is in exactly one."""
    return tuple(_tensors(model))


# Buffers in files of earlier versions of transformers: causal masks and RoPE frequencies.
_BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.rotary_emb\.inv_freq$")
_PREFIXES = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}


def canonical_name(model: HubModel, name: str) -> str | None:
    """The name in `tensors` of a tensor in some file; None for a buffer without weights.

    Files of the model without its output layer, as GPT-2's, lack the prefix.
    """
    if _BUFFERS.search(name):
        return None
    output, prefix = output_name(model), _PREFIXES.get(model.family.name, "model.")
    if name in (output, "lm_head.weight"):  # transformers 5 also reads GPT-NeoX's by that name
        return output
    return name if name.startswith(prefix) else prefix + name


def output_name(model: HubModel) -> str:
    """The name of the output layer; in a tied model, a file may hold a copy of the embedding."""
    return "embed_out.weight" if model.family.name == "gpt_neox" else "lm_head.weight"


def _at(params: Mapping[str, Any], path: Path) -> Any:
    found: Any = params
    for name in path:
        found = found[name]
    return found


def _tensors(model: HubModel) -> Iterator[Tensor]:
    match model.family.name:
        case "gpt2":
            yield from _gpt2(model)
        case "gpt_neox":
            yield from _gpt_neox(model)
        case _:
            yield from _like_llama(model)
    if not model.config.tie_embeddings:
        yield _table(model, output_name(model), "output_embedding")


def _table(model: HubModel, name: str, parameter: str) -> Tensor:
    v, d = model.vocab_size, model.config.d_model
    return Tensor(name, (v, d), ((parameter,),), "rows", ((padded_vocab_size(v), d),))


def _same(name: str, path: Path, *shape: int) -> Tensor:
    return Tensor(name, shape, (path,), "same", (shape,))


def _norm(model: HubModel, name: str, *path: str) -> Iterator[Tensor]:
    d = model.config.d_model
    yield _same(f"{name}.weight", (*path, "scale"), d)
    if model.config.norm == "layernorm":
        yield _same(f"{name}.bias", (*path, "bias"), d)


def _linear(model: HubModel, name: str, *path: str, transposed: bool = True) -> Iterator[Tensor]:
    """A linear layer; `path` ends with our name of it."""
    widths = _widths(model)[path[-1]]
    kernel = (*path, "kernel")
    if transposed:
        yield Tensor(f"{name}.weight", widths[::-1], (kernel,), "transposed", (widths,))
    else:
        yield _same(f"{name}.weight", kernel, *widths)
    yield from _bias(model, f"{name}.bias", *path)


def _bias(model: HubModel, name: str, *path: str) -> Iterator[Tensor]:
    shape = _widths(model)[path[-1]][1:]
    if has_bias(model.config, path[-1]):
        yield _same(name, (*path, "bias"), *shape)
    elif model.stores_biases:
        yield Tensor(name, shape, (), "zeros", ())


def _widths(model: HubModel) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer."""
    config = model.config
    d, f, c = config.d_model, config.d_ff, config.head_width
    query, key = config.num_heads * c, config.kv_heads * c
    return {
        "query": (d, query),
        "key": (d, key),
        "value": (d, key),
        "output": (query, d),
        "gate": (d, f),
        "up": (d, f),
        "down": (f, d),
    }


def _joined_qkv(model: HubModel, name: str, block: str, layout: Layout) -> Iterator[Tensor]:
    """Query, key and value as one linear layer; all three have D outputs here."""
    d, heads = model.config.d_model, model.config.num_heads
    paths = tuple((block, "attention", part) for part in ("query", "key", "value"))
    shape = (3 * d, d) if layout == "per_head" else (d, 3 * d)
    kernels = tuple((*path, "kernel") for path in paths)
    yield Tensor(f"{name}.weight", shape, kernels, layout, ((d, d),) * 3, heads)
    if has_bias(model.config, "query"):
        biases = tuple((*path, "bias") for path in paths)
        yield Tensor(f"{name}.bias", (3 * d,), biases, layout, ((d,),) * 3, heads)
    else:
        yield Tensor(f"{name}.bias", (3 * d,), (), "zeros", ())


def _gpt2(model: HubModel) -> Iterator[Tensor]:
    """GPT-2; its `Conv1D` keeps kernels [in, out], as we do."""
    config = model.config
    yield _table(model, "transformer.wte.weight", "embedding")
    yield _same("transformer.wpe.weight", ("positions",), config.max_seq_len, config.d_model)
    for i in range(config.num_layers):
        name, block = f"transformer.h.{i}", f"block_{i}"
        yield from _norm(model, f"{name}.ln_1", block, "attention_norm")
        yield from _joined_qkv(model, f"{name}.attn.c_attn", block, "joined")
        yield from _linear(
            model, f"{name}.attn.c_proj", block, "attention", "output", transposed=False
        )
        yield from _norm(model, f"{name}.ln_2", block, "feed_forward_norm")
        for theirs, ours in (("c_fc", "up"), ("c_proj", "down")):
            yield from _linear(
                model, f"{name}.mlp.{theirs}", block, "feed_forward", ours, transposed=False
            )
    yield from _norm(model, "transformer.ln_f", "final_norm")


def _gpt_neox(model: HubModel) -> Iterator[Tensor]:
    yield _table(model, "gpt_neox.embed_in.weight", "embedding")
    for i in range(model.config.num_layers):
        name, block = f"gpt_neox.layers.{i}", f"block_{i}"
        yield from _norm(model, f"{name}.input_layernorm", block, "attention_norm")
        yield from _norm(model, f"{name}.post_attention_layernorm", block, "feed_forward_norm")
        yield from _joined_qkv(model, f"{name}.attention.query_key_value", block, "per_head")
        yield from _linear(model, f"{name}.attention.dense", block, "attention", "output")
        yield from _linear(model, f"{name}.mlp.dense_h_to_4h", block, "feed_forward", "up")
        yield from _linear(model, f"{name}.mlp.dense_4h_to_h", block, "feed_forward", "down")
    yield from _norm(model, "gpt_neox.final_layer_norm", "final_norm")


def _like_llama(model: HubModel) -> Iterator[Tensor]:
    """Llama, Qwen2 and Qwen3; Starcoder2 differs in the names of the feed-forward layer."""
    config = model.config
    gated = config.feed_forward == "gated"
    layers = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    if not gated:
        layers = {"c_fc": "up", "c_proj": "down"}
    yield _table(model, "model.embed_tokens.weight", "embedding")
    for i in range(config.num_layers):
        name, block = f"model.layers.{i}", f"block_{i}"
        yield from _norm(model, f"{name}.input_layernorm", block, "attention_norm")
        for theirs, ours in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            yield from _linear(model, f"{name}.self_attn.{theirs}_proj", block, "attention", ours)
        if config.qk_norm:
            for theirs, ours in (("q", "query"), ("k", "key")):
                path = (block, "attention", f"{ours}_norm", "scale")
                yield _same(f"{name}.self_attn.{theirs}_norm.weight", path, config.head_width)
        yield from _norm(model, f"{name}.post_attention_layernorm", block, "feed_forward_norm")
        for theirs, ours in layers.items():
            yield from _linear(model, f"{name}.mlp.{theirs}", block, "feed_forward", ours)
    yield from _norm(model, "model.norm", "final_norm")
