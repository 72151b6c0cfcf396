"""What a run trains: all parameters, or low-rank adapters of its linear layers (LoRA).

Adapters are a tree like the parameters', with `lora_A` [in, r] and `lora_B` [r, out] for each
linear layer and nothing else. The parameters that they adapt are frozen: they have no gradients and
no optimizer state.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sheepop_jax.config.schema import LoraConfig
from sheepop_jax.model.dropout import ADAPTERS, fold
from sheepop_jax.model.linear import Adapted
from sheepop_jax.model.transformer import Transformer, boxed_shapes, init_params


def trained_shapes(model: Transformer) -> Any:
    """Shapes of what is trained, boxed with their logical axis names, as `boxed_shapes`."""
    boxed = boxed_shapes(model)
    if model.lora is None:
        return boxed
    rank = model.lora.rank

    def factors(kernel: Any) -> dict[str, Any]:
        (inputs, outputs), (row, column) = kernel.value.shape, kernel.names
        return {
            "lora_A": _boxed((inputs, rank), (row, None)),
            "lora_B": _boxed((rank, outputs), (None, column)),
        }

    return _of_kernels(boxed, factors)


def init_trained(model: Transformer, seed: int) -> Any:
    """Initializes what is trained: fp32 arrays without Flax metadata.

    A ~ N(0, 1 / in) and B = 0, so that the adapted model is at first the model itself.
    """
    if model.lora is None:
        return init_params(model, seed)
    root = jax.random.fold_in(jax.random.key(seed), 2)  # 0: parameters, 1: dropout
    layers = itertools.count()

    def factors(kernel: Any) -> dict[str, jax.Array]:
        inputs, outputs = kernel.value.shape
        key = jax.random.fold_in(root, next(layers))
        a = jax.random.normal(key, (inputs, rank)) / math.sqrt(inputs)
        return {"lora_A": a, "lora_B": jnp.zeros((rank, outputs))}

    rank = model.lora.rank
    return _of_kernels(boxed_shapes(model), factors)


def adapted(
    params: Mapping[str, Any], adapters: Any, lora: LoraConfig, keys_B: jax.Array | None = None
) -> dict[str, Any]:
    """The parameters with each adapted kernel replaced with an `Adapted`.

    Args:
        params: the frozen parameters.
        adapters: the adapters.
        lora: their settings.
        keys_B: one random key per row of the batch; None drops nothing.
    """
    layers = itertools.count()
    roots_B = fold(keys_B, ADAPTERS) if lora.dropout else None

    def adapt(kernel: jax.Array, factors: Any) -> Adapted:
        keys = fold(roots_B, next(layers))
        a, b = factors["lora_A"], factors["lora_B"]
        return Adapted(kernel, a, b, keys, lora.scale, lora.dropout)

    return _replaced(params, adapters, adapt)


def merged(params: Mapping[str, Any], adapters: Any, lora: LoraConfig) -> dict[str, Any]:
    """Parameters that compute the same without adapters: W + scale · A B in place of each W."""

    @jax.jit
    def add(kernel: jax.Array, factors: Any) -> jax.Array:
        product = jnp.matmul(factors["lora_A"], factors["lora_B"], precision="highest")
        return kernel + lora.scale * product

    return _replaced(params, adapters, add)


def _boxed(shape: tuple[int, ...], names: tuple[str | None, ...]) -> Any:
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def _of_kernels(params: Mapping[str, Any], make: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """The tree of `make(kernel)` for each linear layer, in the order of their names."""
    found: dict[str, Any] = {}
    for name, part in sorted(params.items()):
        if isinstance(part, Mapping):
            made = make(part["kernel"]) if "kernel" in part else _of_kernels(part, make)
            found |= {name: made} if made else {}
    return found


def _replaced(
    params: Mapping[str, Any], adapters: Any, make: Callable[[Any, Any], Any]
) -> dict[str, Any]:
    """The parameters with `make(kernel, adapter)` for each kernel with an adapter."""
    if "lora_A" in adapters:
        return {**params, "kernel": make(params["kernel"], adapters)}
    return {
        name: _replaced(part, adapters[name], make) if name in adapters else part
        for name, part in sorted(params.items())
    }
