"""The training pipeline: from a configuration to a trained model."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from sheepop_jax.checkpoint.origin import Origin, open_origin
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.checkpoint.storage import wait_for_all
from sheepop_jax.checkpoint.workdir import WorkdirLock, check_run, create_run
from sheepop_jax.config.schema import Config
from sheepop_jax.data.chat import ChatEncoder
from sheepop_jax.data.compression import GZIP_BYTES, gzip_bits_per_byte
from sheepop_jax.data.loader import PackingConfig, TrainBatches
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.shards import FORMAT, PreparedData, format_of, open_shards
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.evaluation import Evaluator
from sheepop_jax.generation.preview import PROMPT_TOKENS, Preview
from sheepop_jax.model.flash_attention import choose_implementation
from sheepop_jax.model.loss import chunk_elements
from sheepop_jax.model.partitioning import check_mesh, make_mesh, own_rows
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.planning.plan import Plan, make_plan
from sheepop_jax.runtime import distributed
from sheepop_jax.runtime.allocator import tune_allocator
from sheepop_jax.runtime.devices import Runtime
from sheepop_jax.training.loop import Job, fit
from sheepop_jax.training.signals import StopSignal
from sheepop_jax.training.trackers import check_trackers

log = logging.getLogger(__name__)

_LONGEST_PREPARATION = 30 * 86_400  # seconds that processes wait for the token shards
MANY_EPOCHS = 10  # passes over the text that overfit without dropout
LONG_UPDATE_FLOPS = 5e12  # about a minute on two CPU cores


def train(
    config: Config,
    workdir: str | Path,
    machine: Runtime,
    stop: StopSignal | None = None,
    on_run_created: Callable[[Path], object] = lambda directory: None,
) -> dict[str, float]:
    """Trains a model in `workdir`, or resumes the existing run.

    Args:
        config: the full configuration.
        workdir: run directory; created if missing.
        machine: the result of `platform.prepare`.
        stop: checked between steps; None never stops the run.
        on_run_created: called in the main process with the run directory, once all input is valid.

    Returns:
        The validation metrics after the last step: `val_loss`, `val_perplexity`,
        `val_bits_per_byte` (unless the tokenizer loses text), `val_accuracy`. Empty if the run was
        already past its last step and that step was not evaluated.

    Raises:
        InputError: the configuration does not fit the machine, the data or the run in `workdir`.
        OutOfMemory: the device is out of memory.
        RunFailed: a multi-process step failed, or `loop.fit` raised it.
        StopRequested: a signal arrived; finished steps are saved.
    """
    stop = StopSignal() if stop is None else stop
    directory = Path(workdir)
    mesh = make_mesh(config.mesh, jax.devices())
    check_mesh(config, mesh)
    distributed.broadcast_from_main(lambda: check_trackers(config.train.tracker_names))
    with _locked(directory, config):
        origin = None
        if config.train.init_from:
            config, origin = open_origin(config, directory)
        data = _prepare_data(config, directory, stop, origin)
        if distributed.is_main_process():
            on_run_created(directory)
        tokenizer = data.tokenizer
        vocab_size = _vocab_size(origin, tokenizer)
        model = build_model(config, vocab_size, machine)
        packing = PackingConfig.of(config.data, tokenizer.end_of_text, tokenizer.document_bos)
        batches = _training_batches(config, data, packing, mesh)
        num_steps = config.train.num_steps or config.train.num_epochs * batches.steps_per_epoch
        plan = make_plan(config, model, mesh, machine)
        _log_plan(config, model, plan, num_steps, machine)
        _warn_of_many_epochs(config, batches.epochs(num_steps))
        evaluator = Evaluator(
            model,
            data.validation,
            packing,
            config.train.batch_size,
            max_batches=config.train.eval_batches,
            mesh=mesh,
            check=stop.check,
            lossless=data.lossless,
        )
        job = Job(
            config=config,
            directory=directory,
            model=model,
            mesh=mesh,
            batches=batches,
            num_steps=num_steps,
            evaluate=evaluator.validate,
            sample=_preview(config, model, data),
            flops_per_token=plan.flops_per_token,
            peak_flops=machine.peak_flops,
            chunk_elements=chunk_elements(machine.platform),
            load_params=partial(origin.load, num_tokens=tokenizer.vocab_size) if origin else None,
            on_compiled=tune_allocator,
        )
        with _explained(plan):
            metrics = fit(job, stop)
        if "val_bits_per_byte" in metrics and not config.data.is_chat:
            _log_compression(metrics["val_bits_per_byte"], data, evaluator.num_tokens)
        return metrics


@contextlib.contextmanager
def _locked(directory: Path, config: Config) -> Iterator[None]:
    """Locks the run directory and checks that an existing run matches the configuration."""
    with contextlib.ExitStack() as held:
        distributed.broadcast_from_main(lambda: held.enter_context(WorkdirLock(directory)))
        distributed.broadcast_from_main(lambda: check_run(directory, config))
        yield


def _prepare_data(
    config: Config, directory: Path, stop: StopSignal, origin: Origin | None
) -> PreparedData:
    """Prepares the token shards, checks the sample prompt and creates the run directory."""
    data = _shards(config, directory, stop, origin)
    stop.check()
    if config.train.sample_tokens and config.data.is_chat:
        Preview.check_length(config, len(_asked(config, data.tokenizer)))
    elif config.train.sample_tokens:
        Preview.check(config, data.tokenizer)
    if origin and config.train.lora and data.tokenizer.vocab_size > origin.tokenizer.vocab_size:
        added = data.tokenizer.vocab_size - origin.tokenizer.vocab_size
        expected = f"0: the {added} tokens that the chat template adds would never be trained"
        hint = "`data.chat_template` '' for a chat model, or training all parameters first"
        raise InputError("train.lora_rank", config.train.lora_rank, expected, hint)
    vocab_size = _vocab_size(origin, data.tokenizer)
    distributed.broadcast_from_main(lambda: create_run(directory, config, data, vocab_size))
    return data


def _vocab_size(origin: Origin | None, tokenizer: Tokenizer) -> int:
    """The size of the model's vocabulary: that of the other run may be more than the tokens."""
    return max(origin.vocab_size if origin else 0, tokenizer.vocab_size)


def _shards(
    config: Config, directory: Path, stop: StopSignal, origin: Origin | None
) -> PreparedData:
    """Prepares the shards in process 0; the other processes wait, and open them.

    They wait at a barrier, since a collective operation would time out after half an hour.
    """
    format = FORMAT
    if (directory / "config.json").exists():
        format = format_of(open_run(directory).data_identity)

    def prepared() -> PreparedData:
        if origin is None:
            return prepare(config.data, stop.check, format)
        try:
            return prepare(config.data, stop.check, format, origin.tokenizer)
        except InputError as error:
            # The tokenizer is fixed: do not suggest another.
            hint = "" if "data.tokenizer" in error.hint else error.hint
            raise InputError(error.field, error.got, error.expected, hint) from error

    if distributed.count() == 1:
        return prepared()
    data: PreparedData | None = None
    failure: InputError | None = None
    if distributed.is_main_process():
        try:
            data = prepared()
        except InputError as error:
            failure = error
    try:
        wait_for_all("token shards", timeout_seconds=_LONGEST_PREPARATION)
    except (RuntimeError, ValueError) as error:
        raise distributed.explain(error) or error from error

    def outcome() -> str:
        if failure:
            raise failure
        return str(data.directory) if data else ""

    shards = Path(distributed.broadcast_from_main(outcome))
    if data is not None:
        return data
    if not shards.is_dir():
        got = f"{shards}, missing for process {distributed.index()}"
        raise InputError("data.cache_dir", got, "a directory that all processes share")
    return open_shards(shards)


def _training_batches(
    config: Config, data: PreparedData, packing: PackingConfig, mesh: Mesh
) -> TrainBatches:
    """Training batches, restricted to the rows that this process holds."""
    return TrainBatches(
        data.train,
        packing,
        seed=config.seed,
        accum=config.train.grad_accum_steps,
        batch_size=config.train.batch_size,
        weights=data.weights,
        rows=own_rows(mesh, config.train.batch_size),
    )


def _preview(config: Config, model: Transformer, data: PreparedData) -> Preview | None:
    if not config.train.sample_tokens:
        return None
    if config.data.is_chat:
        ids = _asked(config, data.tokenizer) or _first_question(data, config.model.max_seq_len)
        shown = data.tokenizer.decode(ids, skip_special=False)
        return Preview.continuing(config, model, data.tokenizer, ids, shown)
    beginning = data.validation.read(1, min(1 + PROMPT_TOKENS, len(data.validation)))
    return Preview.of(config, model, data.tokenizer, beginning.tolist())


def _asked(config: Config, tokenizer: Tokenizer) -> list[int]:
    """The ids of `train.sample_prompt` as a message by the user; none without one."""
    if not config.train.sample_prompt:
        return []
    messages = [{"role": "user", "content": config.train.sample_prompt}]
    return ChatEncoder(tokenizer).prompt(messages)


def _first_question(data: PreparedData, context: int) -> list[int]:
    """The beginning of the first validation conversation, up to what the loss counts."""
    most = min(context, len(data.validation)) // 2
    counted = np.flatnonzero(data.validation.weights(0, most))
    length = int(counted[0]) if len(counted) else most
    return [int(index) for index in data.validation.read(0, length)]


def _log_compression(bits_per_byte: float, data: PreparedData, num_tokens: int) -> None:
    """Logs the model's bits per byte beside those of gzip, for the tokens that were evaluated."""
    part, same, gzip_figure = "", "the same bytes", data.gzip_bits_per_byte
    if num_tokens < len(data.validation):
        part = f", first {num_tokens / len(data.validation):.1%}"
        tokens = data.validation.read(0, num_tokens)
        text = data.tokenizer.decode(tokens).encode()
        gzip_figure = gzip_bits_per_byte([text])
        # Metrics take the bytes per token of all validation text; here, those of this part.
        mean = data.validation.num_bytes / data.validation.num_targets
        num_targets = np.count_nonzero(tokens[1:] != data.tokenizer.document_bos)
        bits_per_byte *= num_targets * mean / len(text)
    elif data.validation.num_bytes > GZIP_BYTES:
        same = f"the first {GZIP_BYTES / 1e6:.0f} MB"
    line = "validation text%s: %.3f bits per byte; gzip -9 needs %.3f on %s"
    log.info(line, part, bits_per_byte, gzip_figure, same)


@contextlib.contextmanager
def _explained(plan: Plan) -> Iterator[None]:
    """Replaces known failures of a step with an error that suggests a remedy."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if explained := plan.explain(error) or distributed.explain(error):
            raise explained from error
        raise


def build_model(config: Config, vocab_size: int, machine: Runtime) -> Transformer:
    """Builds the model with the dtype and attention implementation for the machine."""
    dtype = machine.compute_dtype(config.train.dtype)
    choose = partial(
        choose_implementation,
        machine.platform,
        dtype,
        config.model.head_width,
        config.model.attention_dropout,
        flash_attention=machine.ampere,
    )
    implementation = choose(document_mask=config.data.document_mask)
    if implementation != choose():
        log.info(
            "data.document_mask: using XLA attention instead of cuDNN, which has no document "
            "mask; it is slower and its memory grows with the square of data.seq_len"
        )
    return Transformer(config.model, vocab_size, dtype, implementation, config.train.lora)


def _warn_of_many_epochs(config: Config, epochs: float) -> None:
    """Warns about a run that repeats its text often, without dropout."""
    if epochs > MANY_EPOCHS and not config.model.dropout and not config.model.attention_dropout:
        log.warning(
            "the run passes over its text %.1f times without dropout and is likely to overfit: use "
            "more text, fewer updates (train.num_steps), or a new run with model.dropout=0.1",
            epochs,
        )


def _log_plan(
    config: Config, model: Transformer, plan: Plan, num_steps: int, machine: Runtime
) -> None:
    """Logs the plan of the run; warns about slow or ineffective settings."""
    log.info("activations in %s, attention by %s", model.dtype.name, model.implementation)
    for line in plan.summary():
        log.info("%s", line)
    if config.optimizer.warmup_steps >= num_steps:
        log.warning(
            "optimizer.warmup_steps = %d: the warmup is longer than the run of %d updates",
            config.optimizer.warmup_steps,
            num_steps,
        )
    if machine.platform == "cpu" and plan.flops > LONG_UPDATE_FLOPS:
        log.warning(
            "one update of %d tokens needs %.1f TFLOP: a minute or more on a CPU. Lower "
            "train.grad_accum_steps or start with configs/quickstart.py",
            plan.tokens,
            plan.flops / 1e12,
        )
