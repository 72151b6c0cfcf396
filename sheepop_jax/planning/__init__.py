"""The memory, communication and FLOPs of a run, from the model itself."""
