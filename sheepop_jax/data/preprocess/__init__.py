"""Offline: from a corpus to a tokenizer and token shards."""
