"""The commands, one file each: parse flags, call the library, print the result."""
