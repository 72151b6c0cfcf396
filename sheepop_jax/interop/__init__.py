"""Weights and tokenizers in the formats of other programs, with proof that they agree."""
