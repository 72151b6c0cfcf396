"""What the tests of the server share."""

import pytest

from sheepop_jax.data.tokenizer import Tokenizer
from tests.conftest import _OUTSIDE
from tests.serving.fakes import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with a few merges."""
    return make_tokenizer()


@pytest.fixture(scope="module")
def process_env_of_module() -> dict[str, str]:
    """`process_env` for a server that a module's tests share."""
    return _OUTSIDE | {"JAX_PLATFORMS": "cpu"}
