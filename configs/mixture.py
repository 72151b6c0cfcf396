"""A mixture of sources by weight: Python's standard library, and the documents of this repository.

An example that needs no download. The weights are shares of the windows trained on; a small source
with a large weight is seen several times in an epoch.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """The model of quickstart."""
    c = quickstart.get_config()
    c.data.mixture.code = ConfigDict({"weight": 0.9, "source": "stdlib"})
    c.data.mixture.prose = ConfigDict({"weight": 0.1, "path": "README.md,DESIGN.md,docs/"})
    return c
