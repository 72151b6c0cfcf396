"""The commands: one file each, flags to one library call to stdout."""
