"""A server process with the fake engine: `python -m tests.serving.fake_server SECONDS`.

A text whose prompt begins with `HOLD` gets its second step when a line comes on standard input; one
that begins with `FAIL` ends the engine.
"""

import logging
import sys
from collections.abc import Sequence

from sheepop_jax.errors import RunFailed
from sheepop_jax.serving.server import bind, serve
from sheepop_jax.serving.service import ServedModel
from sheepop_jax.serving.settings import Access, Limits
from sheepop_jax.serving.worker import Worker
from tests.serving.fakes import CONTEXT, FakeEngine, Output, fake_score, make_tokenizer

HOLD, FAIL = 7, 8  # token ids


class Held(FakeEngine):
    """Waits for standard input."""

    def step(self) -> Sequence[Output]:
        for request, place in self.rows.values():
            if request.prompt[:1] == (FAIL,):
                raise RuntimeError("the device\nis gone")
            if request.prompt[:1] == (HOLD,) and place:
                sys.stdin.readline()
                break
        return super().step()


def main() -> int:
    """Runs until a signal."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    tokenizer = make_tokenizer()
    access, limits = Access(port=0), Limits(shutdown_seconds=float(sys.argv[1]))
    model = ServedModel("tiny", tokenizer, tokenizer.vocab_size, CONTEXT, slots=2)
    worker = Worker(lambda: Held(tokenizer.end_of_text), fake_score, tokenizer)
    try:
        return serve(model, worker, access, limits, bind(access))
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
