"""What the tests of sampling, decoding and the benchmark share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sheepop_jax.model.transformer import Transformer

VOCAB = 307


@pytest.fixture(scope="session")
def build(make_config: Callable[..., Any], random_params: Callable[..., Any]) -> Callable[..., Any]:
    """`build({"model.position": "learned"}, dtype)` → a small model and random parameters."""

    def make(overrides: dict[str, Any] | None = None, dtype: Any = jnp.float32) -> Any:
        model = Transformer(make_config(overrides).model, VOCAB, dtype)
        params = random_params(model)
        # As they are, such models soon write one token for ever: a tied output favours what was
        # just read, and biases favour the same tokens whatever was read.
        signs = np.sign(np.random.default_rng(1).standard_normal(60)).astype(np.float32)
        params["final_norm"]["scale"] *= signs
        params["embedding"] *= 1.0 if model.config.position == "sinusoidal" else 0.35
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x * 0.1 if path[-1].key == "bias" else x, params
        )
        return model, params

    return make
