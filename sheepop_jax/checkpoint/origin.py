"""The parameters and the tokenizer that a run takes from another one (`train.init_from`)."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp

from sheepop_jax.checkpoint.checkpoints import Checkpoints, DamagedCheckpoint
from sheepop_jax.checkpoint.frozen import FrozenParams, sha256_of_params
from sheepop_jax.checkpoint.run import Run, open_run
from sheepop_jax.checkpoint.workdir import record_origin
from sheepop_jax.config.initial import FIELD, check_model, tokenizer_of
from sheepop_jax.config.schema import Config
from sheepop_jax.data.chat import with_chat_template
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.model.transformer import TABLES, init_params, padded_vocab_size
from sheepop_jax.runtime import distributed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Origin:
    """What a run takes from another one.

    Attributes:
        directory: the new run.
        run: the other one; once the new run has a checkpoint, read only for its adapters.
        step: the checkpoint of the other run; None if the new one has a checkpoint.
        vocab_size: of the model.
        frozen: the parameters that the new run's adapters adapt, if it has a checkpoint.
    """

    directory: Path
    run: Path
    step: int | None
    vocab_size: int
    frozen: FrozenParams | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the other run; that of the new one if it has a checkpoint."""
        where = self.directory if self.step is None else self.run
        return Tokenizer.from_file(where / "tokenizer.json")

    def load(self, target: Any, num_tokens: int) -> Any:
        """Loads the parameters, logs and records where they came from.

        The rows of tokens that the other run's tokenizer lacks become the mean of its others.

        Every process must call this.

        Args:
            target: abstract parameters with the shardings of the new run.
            num_tokens: of the new run's tokenizer.

        Raises:
            InputError: the checkpoint has been deleted or changed since it was chosen, or since the
                adapters were trained.
        """
        if self.frozen:
            return self.frozen.load(target)
        if self.step is None:
            checkpoints = str(self.directory / "checkpoints")
            raise InputError(checkpoints, "no checkpoint", "the one that was there", "again")
        rows = padded_vocab_size(self.vocab_size)
        smaller = {
            name: leaf.update(shape=(rows, *leaf.shape[1:])) if name in TABLES else leaf
            for name, leaf in target.items()
        }
        try:
            params = Checkpoints(self.run / "checkpoints").restore_params(self.step, smaller)
        except DamagedCheckpoint as damage:
            raise _not_whole(str(self.run), self.step, damage) from None
        sha256 = sha256_of_params(params)
        log.info("parameters: step %d of %s, SHA-256 %s", self.step, self.run, sha256)
        origin = {"path": str(self.run.absolute()), "step": self.step, "sha256": sha256}
        distributed.broadcast_from_main(lambda: record_origin(self.directory, origin))
        known = self.tokenizer.vocab_size
        if num_tokens <= known:
            return params
        log.info("parameters: %d new tokens start at the mean of the others", num_tokens - known)
        grown = {
            name: grow_table(params[name], target[name], known, num_tokens)
            for name in TABLES
            if name in params
        }
        return {**params, **grown}


def grow_table(table_VD: Any, target: Any, known: int, num_tokens: int) -> jax.Array:
    """Adds the rows of new tokens to an embedding or output table.

    Args:
        table_VD: the table; V is padded.
        target: the abstract table with as many rows or more, and its sharding.
        known: tokens that the table has rows for.
        num_tokens: tokens with the new ones, whose rows become the mean of the `known` ones.
    """

    @partial(jax.jit, out_shardings=target.sharding)
    def grow(table_VD: jax.Array) -> jax.Array:
        mean_D = jnp.mean(table_VD[:known], axis=0)
        more = target.shape[0] - table_VD.shape[0]
        index_V1 = jnp.arange(target.shape[0])[:, None]
        is_new_V1 = (index_V1 >= known) & (index_V1 < num_tokens)
        return jnp.where(is_new_V1, mean_D[None], jnp.pad(table_VD, ((0, more), (0, 0))))

    return cast(jax.Array, grow(table_VD))


def open_origin(config: Config, directory: Path) -> tuple[Config, Origin]:
    """Opens the run that `train.init_from` names, unless the new run has a checkpoint of its own.

    Args:
        config: the configuration of the new run.
        directory: its run directory.

    Returns:
        The configuration with the path of the tokenizer, and what it takes from the other run.

    Raises:
        InputError: the other run is missing, has no valid checkpoint, or contradicts `config`.
    """
    name = config.train.init_from
    chosen = distributed.broadcast_from_main(lambda: _choose(config, directory))
    data = replace(config.data, tokenizer=tokenizer_of(name))
    adapts = chosen["step"] is None and config.train.lora is not None
    frozen = FrozenParams.of(open_run(directory)) if adapts else None
    return replace(config, data=data), Origin(directory, Path(name), **chosen, frozen=frozen)


def _choose(config: Config, directory: Path) -> dict[str, Any]:
    """The step to start from, and the size of the vocabulary."""
    name, own = config.train.init_from, Checkpoints(directory / "checkpoints")
    has_begun = bool(own.steps() or own.aside())
    run = open_run(directory) if has_begun else _open(name)
    _check_tokenizer(config, run.tokenizer)
    vocab_size = run.model().vocab_size
    if has_begun:
        if config.train.lora:
            FrozenParams.of(run).check(run.model())
        return {"step": None, "vocab_size": vocab_size}
    if run.config.train.lora:
        expected = "a run with all its parameters (this one has adapters of another)"
        raise InputError(FIELD, name, expected, "'export --format hf' of it, and 'import' of that")
    check_model(config.model, run.config.model, name)
    target = jax.eval_shape(lambda: init_params(run.model(), 0))

    def whole(step: int) -> int:
        try:
            run.checkpoints.check_params(step, target)
        except DamagedCheckpoint as damage:
            raise _not_whole(name, step, damage) from None
        return step

    return {"step": run.checkpoints.read(None, whole), "vocab_size": vocab_size}


def _open(name: str) -> Run:
    try:
        return open_run(name)
    except InputError as error:
        if error.field != "ckpt":
            raise
        raise InputError(FIELD, name, error.expected) from None


def _check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer file with another content than the run's."""
    name, path = config.train.init_from, config.data.tokenizer
    if path in ("bpe", "char", tokenizer_of(name)):
        return
    given = Tokenizer.from_file(path)
    if config.data.is_chat:
        template = config.data.chat_template
        given, tokenizer = (with_chat_template(one, template) for one in (given, tokenizer))
    if given.fingerprint != tokenizer.fingerprint:
        expected = f"the tokenizer of {name} (`{FIELD}`)"
        raise InputError("data.tokenizer", path, expected, "leaving it out: it is taken from there")


def _not_whole(name: str, step: int, damage: DamagedCheckpoint) -> InputError:
    hint = f"another run, or 'checkpoints --ckpt {name} --delete {step} --force' for another step"
    return InputError(FIELD, name, f"a run with a valid step {step} ({damage})", hint)
