"""Run directory and checkpoints: save, verify, quarantine, restore."""
