"""A weighted mixture of Python's standard library and the documentation of this repository.

Needs no download. Weights are fractions of the training windows; a small source with a large weight
is repeated several times per epoch.
"""

from ml_collections import ConfigDict

from configs import quickstart


def get_config() -> ConfigDict:
    """The quickstart model on two sources."""
    c = quickstart.get_config()
    c.data.mixture.code = ConfigDict({"weight": 0.9, "source": "stdlib"})
    c.data.mixture.prose = ConfigDict({"weight": 0.1, "path": "README.md,DESIGN.md,docs/"})
    return c
