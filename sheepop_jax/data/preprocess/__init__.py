"""Offline preprocessing: corpus to tokenizer and token shards."""
