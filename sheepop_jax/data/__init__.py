"""From text to batches; NumPy only, never JAX."""
