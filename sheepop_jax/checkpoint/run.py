"""A run directory, opened for sampling and evaluation.

It is self-contained: `config.json`, `tokenizer.json`, `metrics.jsonl`, `train.log`,
`training_curve.png`, `checkpoints/`. Sampling works from a copy on another machine; evaluation
there needs a text file or the training data.
"""

import contextlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

from sheepop_jax.checkpoint.checkpoints import Checkpoints, DamagedCheckpoint
from sheepop_jax.config.schema import Config
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.model.linear import quantized
from sheepop_jax.model.transformer import Transformer, init_params

if TYPE_CHECKING:
    from sheepop_jax.data.shards import PreparedData


@dataclass(frozen=True)
class Run:
    """A run directory, opened for reading. No file in it is executed.

    Attributes:
        directory: the run directory.
        config: the resolved training configuration.
        tokenizer: the run's tokenizer.
        vocab_size: V, the size of the model's vocabulary. An imported model may have more rows than
            the tokenizer has tokens; they decode to "".
        data_identity: what determined its tokens and their order (`PreparedData.identity`); empty
            if imported.
        gzip_bits_per_byte: `gzip -9` on the run's validation bytes; NaN if imported.
        shards: the shard directory on the machine that trained it; the run itself if imported.
        imported: where an imported model came from; empty if trained here.
        origin: the run, step and hash of the parameters that training started from; empty if none.
    """

    directory: Path
    config: Config
    tokenizer: Tokenizer
    vocab_size: int
    data_identity: dict[str, Any]
    gzip_bits_per_byte: float
    shards: Path
    imported: dict[str, Any]
    origin: dict[str, Any] = field(default_factory=dict)

    @property
    def checkpoints(self) -> Checkpoints:
        """The run's checkpoints."""
        return Checkpoints(self.directory / "checkpoints")

    @property
    def trained_length(self) -> int:
        """The longest window, in tokens, that the model was trained on, as far as known."""
        return self.config.model.max_seq_len if self.imported else self.config.data.seq_len

    def model(self, dtype: Any = jnp.float32) -> Transformer:
        """The model, with the attention that decodes and evaluates on any platform."""
        return Transformer(self.config.model, self.vocab_size, dtype)

    def params(
        self, step: str | int | None = None, quantize: Literal["int8"] | None = None
    ) -> tuple[Any, int]:
        """Loads the parameters of a checkpoint to the first local device.

        Adapters are merged into the parameters of the run that they adapt, which must be there.

        Args:
            step: "latest", "best" or a step number; None is the best, or the latest if none was
                evaluated.
            quantize: "int8" quantizes the matrices (`model.quantize`); None keeps fp32.

        Returns:
            The parameters and their step.

        If a training process deletes the checkpoint meanwhile, the newest is resolved again.

        Raises:
            InputError: the checkpoint does not exist, is damaged or cannot be read; or the run that
                it adapts is missing or has changed.
        """
        if self.config.train.lora:
            from sheepop_jax.checkpoint.frozen import merged_params  # lazy: most runs need it not

            params, found = merged_params(self, step)
        else:
            target = jax.eval_shape(lambda: init_params(self.model(), 0))
            params, found = self.load(step, target)
        return quantized(params) if quantize == "int8" else params, found

    def load(self, step: str | int | None, target: Any) -> tuple[Any, int]:
        """Loads what a checkpoint holds of the model to the first local device; see `params`.

        Args:
            step: as in `params`.
            target: abstract parameters, or adapters.
        """
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda leaf: leaf.update(sharding=here), target)

        def load(found: int) -> tuple[Any, int]:
            try:
                return self.checkpoints.restore_params(found, target), found
            except DamagedCheckpoint as damage:
                others = ", ".join(str(s) for s in self.checkpoints.steps() if s != found)
                got = found if step is None else step
                hint = f"one of {others}" if others else "another run (this one has no other)"
                raise InputError("step", got, f"a valid checkpoint ({damage})", hint) from None

        return self.checkpoints.read(step, load)

    def prepared_data(self) -> "PreparedData":
        """Opens the run's shards, or prepares them again from its source.

        Raises:
            InputError: the source is missing, or differs from the training data; or the model was
                imported.
        """
        if self.imported:
            got = f"{self.directory}, an imported model"
            raise InputError("ckpt", got, "a run with validation text", "`data` FILE")
        # Lazy: sampling needs no data, and these imports load every source.
        from sheepop_jax.data.preprocess.prepare import prepare
        from sheepop_jax.data.shards import format_of, open_shards

        hint = "'evaluate --data FILE' on a text file"
        with contextlib.suppress(InputError):
            data = open_shards(self.shards)
            if _text_of(data.identity) == _text_of(self.data_identity):
                return data
        try:
            # A tokenizer that came from another run is not looked for there.
            own = self.tokenizer if self.config.train.init_from else None
            data = prepare(self.config.data, format=format_of(self.data_identity), tokenizer=own)
        except InputError as error:
            raise InputError(
                f"{self.directory}: validation text",
                f"an error ({error})",
                "the run's training data",
                hint,
            ) from None
        if _text_of(data.identity) != _text_of(self.data_identity):
            changed = difference(self.data_identity, data.identity)
            raise InputError(
                f"{self.directory}: data", changed, "the same data as in training", hint
            )
        return data


def open_run(path: str | Path) -> Run:
    """Opens a run directory.

    Raises:
        InputError: `path` is not a run directory.
    """
    directory = Path(path)
    if not (directory / "config.json").is_file():
        beside = directory if directory.is_dir() else directory.parent
        runs = (
            sorted(p.parent.name for p in beside.glob("*/config.json")) if beside.is_dir() else []
        )
        hint = f"one of {', '.join(runs)} in {beside}" if runs else "running train.py first"
        for above in directory.absolute().parents[:2]:  # RUN/checkpoints/STEP
            if (above / "config.json").is_file():
                hint = f"`ckpt` {above} with `step`"
        raise InputError("ckpt", str(path), "a run directory (with config.json)", hint)
    try:
        saved = json.loads((directory / "config.json").read_text())
        config = Config.from_saved(saved)
        imported, vocab_size = dict(saved.get("imported", {})), int(saved["vocab_size"])
        origin = dict(saved.get("init_from", {}))
        if imported:
            identity, gzip_figure, shards = {}, math.nan, directory
        else:
            identity, gzip_figure = dict(saved["data"]), saved["gzip_bits_per_byte"]
            shards = Path(saved["shards"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        got = f"{kind}{error}"
        raise InputError(str(directory / "config.json"), got, "a valid run configuration") from None
    if not (directory / "tokenizer.json").is_file():
        raise InputError(str(directory / "tokenizer.json"), "no file", "the run's tokenizer")
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    more_rows = imported or config.train.init_from  # than tokens
    if tokenizer.vocab_size > vocab_size or (tokenizer.vocab_size < vocab_size and not more_rows):
        got, expected = f"{tokenizer.vocab_size} tokens", f"the run's {vocab_size}"
        raise InputError(str(directory / "tokenizer.json"), got, expected)
    return Run(
        directory, config, tokenizer, vocab_size, identity, gzip_figure, shards, imported, origin
    )


def _text_of(identity: dict[str, Any]) -> dict[str, Any]:
    """A data identity without the fields that affect only the window order."""
    return {name: value for name, value in identity.items() if name != "grain"}


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    return ", ".join(f"{n} {str(old.get(n))[:12]} -> {str(new.get(n))[:12]}" for n in names)
