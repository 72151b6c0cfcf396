"""GPT-2 124M on the 10-billion-token sample of FineWeb-Edu, from the Hugging Face Hub."""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    """123.6M parameters with a vocabulary of 50257; 5 billion training tokens."""
    c = gpt2_124m.get_config()
    c.data.name = "HuggingFaceFW/fineweb-edu"
    c.data.subset = "sample-10BT"
    c.data.val_split = "document"
    c.data.val_fraction = 0.0005
    return c
