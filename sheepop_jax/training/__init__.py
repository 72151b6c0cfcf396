"""The training loop, the optimizer step, and what they report."""
