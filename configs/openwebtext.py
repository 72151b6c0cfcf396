"""GPT-2's size on OpenWebText, from the Hugging Face hub: 40 GB of text."""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    """123.6M parameters at a vocabulary of 50257; 5 billion tokens."""
    c = gpt2_124m.get_config()
    c.data.source = "hub"
    c.data.name = "Skylion007/openwebtext"
    c.data.val_split = "document"
    c.data.val_fraction = 0.0005
    return c
