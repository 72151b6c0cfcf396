"""A new run from the parameters of another (`train.init_from`): what it takes from there."""

from pathlib import Path

from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.errors import InputError

FIELD = "train.init_from"


def free_fields(position: str) -> tuple[str, ...]:
    """The fields of the model section that leave the meaning of the parameters as it is."""
    free = ("dropout", "attention_dropout", "remat")
    return free if position == "learned" else (*free, "max_seq_len")


def check_model(model: ModelConfig, of_run: ModelConfig, run: str) -> None:
    """Checks that a model can start from the parameters of a run.

    Args:
        model: the model section of the new run.
        of_run: that of the run.
        run: the run, for the message.

    Raises:
        InputError: names the first field that contradicts the run.
    """
    for field, wanted in vars(of_run).items():
        if field not in free_fields(of_run.position):
            check_field(f"model.{field}", getattr(model, field), wanted, run)


def check_field(field: str, value: object, wanted: object, run: str) -> None:
    """Refuses a value that is not the one of a run."""
    if value != wanted:
        expected = f"{wanted!r}, as in {run} (`{FIELD}`)"
        raise InputError(field, value, expected, "leaving it out: it is taken from there")


def tokenizer_of(run: str) -> str:
    """The path of a run's tokenizer."""
    return str(Path(run) / "tokenizer.json")
