"""The run directory and its checkpoints: save, verify, quarantine, restore."""
