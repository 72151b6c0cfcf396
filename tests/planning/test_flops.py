"""FLOPs of a token by hand, and of jaxprs with inner ones."""

import jax
import jax.numpy as jnp
import pytest

from sheepop_jax.config.schema import LoraConfig
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.planning.flops import flops_per_token
from sheepop_jax.planning.program import dot_flops

pytestmark = pytest.mark.usefixtures("fast_compile")

VOCAB = 97


@pytest.mark.parametrize(
    "overrides",
    [{}, {"model.tie_embeddings": False}, {"model.position": "learned"}, {"data.seq_len": 263}],
    ids=str,
)
def test_flops_of_a_token_by_hand(make_config, overrides):
    """PaLM's 6 N + 12 L T D; several causal blocks of attention change nothing."""
    fields = {"model.num_kv_heads": 6, "model.num_layers": 5, "model.max_seq_len": 300}
    config = make_config({**fields, **overrides})
    d, f, layers, time = 60, 79, 5, config.data.seq_len
    weights = 128 * d + layers * (4 * d * d + 2 * d * f + 4 * d) + 2 * d
    expected = 6 * weights + 12 * layers * time * d
    assert flops_per_token(Transformer(config.model, VOCAB), time) == expected


def test_grouped_heads_and_biases(make_config):
    config = make_config({"model.use_bias": True})
    d, f, kv, time = 60, 79, 30, 13
    block = 2 * d * d + 2 * d * kv + 2 * d * f + 4 * d + (2 * d + 2 * kv + f + d)
    expected = 6 * (128 * d + 2 * block + 2 * d) + 12 * 2 * time * d
    assert (
        flops_per_token(Transformer(config.model, VOCAB, jnp.bfloat16, "cudnn"), time) == expected
    )


def test_options_of_the_architecture(make_config):
    """A gated layer has a third matrix, a head its own width, and a window fewer scores."""
    options = {"feed_forward": "gated", "norm": "rmsnorm", "qk_norm": True, "head_dim": 14}
    fields = {f"model.{name}": value for name, value in options.items()}
    config = make_config({**fields, "model.sliding_window": 4})
    d, f, q, kv = 60, 79, 6 * 14, 3 * 14
    block = d * q + 2 * d * kv + q * d + 3 * d * f + 2 * d + 2 * 14
    expected = 6 * (128 * d + 2 * block + d) + 12 * 2 * 4 * q
    assert flops_per_token(Transformer(config.model, VOCAB), config.data.seq_len) == expected


def test_frozen_weights_have_no_gradients(make_config):
    config = make_config({"model.num_kv_heads": 6})
    d, f, layers, rank, time = 60, 79, 2, 4, 13
    weights = 128 * d + layers * (4 * d * d + 2 * d * f + 4 * d) + 2 * d
    adapters = layers * rank * (4 * 2 * d + 2 * (d + f))
    model = Transformer(config.model, VOCAB, lora=LoraConfig(rank, 8.0, 0.0))
    expected = 4 * weights + 6 * adapters + 12 * layers * time * d
    assert flops_per_token(model, time) == expected


def test_inner_jaxprs_are_counted():
    x, w = jnp.ones((3, 5)), jnp.ones((5, 5))
    one = 2 * 3 * 5 * 5

    def scanned(x):
        return jax.lax.scan(lambda x, _: (jax.jit(jnp.dot)(x, w), None), x, None, length=7)[0]

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)

    def recomputed(x):
        return jax.vjp(jax.checkpoint(lambda x: jnp.sin(x @ w) @ w), x)[1](x)

    for function, times in ((scanned, 7), (branched, 2), (recomputed, 5)):
        assert dot_flops(jax.make_jaxpr(function)(x).jaxpr) == times * one
