"""What depends on the machine: devices, platform, XLA flags, memory allocator, processes."""
