"""Model shapes of the benchmarks. Imports neither JAX nor PyTorch, since both sides use it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A model and its batch: N layers of width D with H heads, V tokens, B windows of T."""

    layers: int
    width: int
    heads: int
    feed_forward: int
    vocab: int
    batch: int
    time: int
    remat: str = "none"

    @property
    def tokens(self) -> int:
        """Tokens per batch."""
        return self.batch * self.time

    @property
    def weights(self) -> int:
        """Weights in the matmuls of each token; the tied embedding counts once."""
        layer = 4 * self.width**2 + 2 * self.width * self.feed_forward
        return self.layers * layer + self.vocab * self.width

    @property
    def step_flops(self) -> float:
        """FLOPs per step: 6 per weight and 12 · N · T · D, per token (PaLM, appendix B)."""
        a_token = 6.0 * self.weights + 12.0 * self.layers * self.time * self.width
        return a_token * self.tokens


SHAPES = {
    "small": Shape(4, 128, 4, 512, 65, 12, 64),
    "base": Shape(6, 512, 8, 2048, 50257, 4, 512),
    "gpt2": Shape(12, 768, 12, 3072, 50257, 8, 1024),
    "long": Shape(6, 512, 8, 2048, 50257, 4, 8192),
}
