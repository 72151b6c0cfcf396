"""Machine-dependent setup: devices, platform, XLA flags, memory allocator, processes."""
