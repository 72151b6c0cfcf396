"""Training a run from a configuration: the rooms wired together, in the order data passes them."""

import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from sheepop_jax.checkpoint.run import WorkdirLock, check_run, create_run
from sheepop_jax.config.schema import Config
from sheepop_jax.data.loader import PackingConfig, TrainBatches
from sheepop_jax.data.preprocess.prepare import prepare
from sheepop_jax.data.shards import PreparedData, open_shards
from sheepop_jax.data.stream import TokenStream
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.evaluation import evaluate_stream
from sheepop_jax.generation.engine import generate
from sheepop_jax.generation.requests import SamplingConfig
from sheepop_jax.model.attention import choose_implementation
from sheepop_jax.model.loss import chunk_elements
from sheepop_jax.model.partitioning import check_mesh, global_batch, make_mesh, own_rows
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.runtime import distributed
from sheepop_jax.runtime.allocator import tune_allocator
from sheepop_jax.runtime.platform import Runtime
from sheepop_jax.training.loop import Job, fit
from sheepop_jax.training.memory import explain
from sheepop_jax.training.plan import Plan, make_plan
from sheepop_jax.training.plan_report import summary
from sheepop_jax.training.signals import StopSignal

log = logging.getLogger(__name__)

LONG_UPDATE_FLOPS = 5e12  # about a minute at what two CPU cores do


def train(
    config: Config, workdir: str | Path, machine: Runtime, stop: StopSignal | None = None
) -> dict[str, float]:
    """Trains a run in `workdir`, or goes on with the one that is there.

    Args:
        config: all of it.
        workdir: created if missing.
        machine: from `runtime.prepare`.
        stop: looked at between steps; without one nothing stops the run.

    Returns:
        The held-out figures after the last step: `val_loss`, `val_perplexity`,
        `val_bits_per_byte`, `val_accuracy`. Empty for a run that was already beyond its last step,
        if that step was not evaluated.

    Raises:
        InputError: the configuration does not fit the machine, the data or the run in `workdir`.
        OutOfMemory: the device has not enough.
        RunFailed: a step failed that several processes made together; and as `trainer.fit`.
        StopRequested: a signal came, and what was done is saved.
    """
    stop = StopSignal() if stop is None else stop
    directory = Path(workdir)
    mesh = make_mesh(config.mesh, jax.devices())
    check_mesh(config, mesh)
    with contextlib.ExitStack() as held:
        distributed.broadcast_from_main(lambda: held.enter_context(WorkdirLock(directory)))
        distributed.broadcast_from_main(lambda: check_run(directory, config))
        data = _prepared(config, stop)
        stop.check()
        if config.train.sample_tokens:
            _check_prompt(config, data.tokenizer)
        distributed.broadcast_from_main(lambda: create_run(directory, config, data))
        model = build_model(config, data.tokenizer.vocab_size, machine)
        layout = PackingConfig.of(config.data, data.tokenizer.end_of_text)
        batches = TrainBatches(
            data.train,
            layout,
            seed=config.seed,
            accum=config.train.grad_accum_steps,
            batch_size=config.train.batch_size,
            weights=data.weights,
            rows=own_rows(mesh, config.train.batch_size),
        )
        num_steps = config.train.num_steps or config.train.num_epochs * batches.steps_per_epoch
        log.info("activations in %s, attention by %s", model.dtype.name, model.implementation)
        plan = plan_run(config, model, mesh, machine)
        for line in summary(plan):
            log.info("%s", line)
        _warn_of_what_is_ahead(config, num_steps, plan, machine)

        job = Job(
            config=config,
            directory=directory,
            model=model,
            mesh=mesh,
            batches=batches,
            num_steps=num_steps,
            evaluate=_evaluator(config, data.validation, model, layout, mesh, stop),
            sample=_sampler(config, data.tokenizer, model) if config.train.sample_tokens else None,
            peak_flops=machine.peak_flops,
            chunk_elements=chunk_elements(machine.platform),
            on_compiled=tune_allocator,
        )
        try:
            result = fit(job, stop)
        except jax.errors.JaxRuntimeError as error:
            if explained := explain(error, plan.memory) or distributed.explain(error):
                raise explained from error
            raise
        if result and data.lossless:
            log.info(
                "held-out text: %.3f bits per byte; gzip -9 needs %.3f on the same bytes",
                result["val_bits_per_byte"],
                data.gzip_bits_per_byte,
            )
        return result


def _prepared(config: Config, stop: StopSignal) -> PreparedData:
    """The token shards: the first process prepares them, the others wait and open them."""
    made: list[PreparedData] = []

    def directory() -> str:
        made.append(prepare(config.data, stop.check))
        return str(made[0].directory)

    shards = Path(distributed.broadcast_from_main(directory))
    if made:
        return made[0]
    if not shards.is_dir():
        got = f"{shards}, which process {distributed.index()} does not find"
        raise InputError("data.cache_dir", got, "a directory that all processes share")
    return open_shards(shards)


def build_model(config: Config, vocab_size: int, machine: Runtime) -> Transformer:
    """The model to train, with the dtype and the attention for the machine."""
    dtype = machine.compute_dtype(config.train.dtype)
    choose = partial(
        choose_implementation,
        machine.platform,
        dtype,
        config.model.head_dim,
        config.model.attention_dropout,
        flash_attention=machine.ampere,
    )
    implementation = choose(document_mask=config.data.document_mask)
    if implementation != choose():
        log.info(
            "data.document_mask: attention by XLA rather than cuDNN, which has no segment "
            "argument: slower, and memory grows with the square of the window"
        )
    return Transformer(config.model, vocab_size, dtype, implementation)


def plan_run(
    config: Config, model: Transformer, mesh: Mesh | AbstractMesh, machine: Runtime
) -> Plan:
    """What the run will need on a machine, which need not be this one."""
    return make_plan(
        config,
        model,
        mesh,
        platform=machine.platform,
        device_kind=machine.device_kind,
        device_memory=machine.device_memory,
        peak_flops=machine.peak_flops,
    )


def _warn_of_what_is_ahead(config: Config, num_steps: int, plan: Plan, machine: Runtime) -> None:
    if config.optimizer.warmup_steps >= num_steps:
        log.warning(
            "optimizer.warmup_steps = %d: the warmup is longer than the run of %d updates",
            config.optimizer.warmup_steps,
            num_steps,
        )
    if machine.platform == "cpu" and plan.flops > LONG_UPDATE_FLOPS:
        log.warning(
            "one update of %d tokens is %.1f TFLOP: a minute or more on a CPU. Lower "
            "train.grad_accum_steps, or begin with configs/quickstart.py",
            plan.tokens,
            plan.flops / 1e12,
        )


def _check_prompt(config: Config, tokenizer: Tokenizer) -> None:
    """Refuses a `train.sample_prompt` that cannot be encoded or fills the context."""
    prompt = config.train.sample_prompt
    tokenizer.check(prompt, "train.sample_prompt")
    # An empty one begins at end-of-text.
    tokens, most = max(len(tokenizer.encode(prompt)), 1), config.model.max_seq_len
    if tokens >= most:
        expected = f"fewer than model.max_seq_len = {most}"
        hint = "--config.train.sample_tokens=0"
        raise InputError("train.sample_prompt", f"{tokens} tokens", expected, hint)


def _evaluator(
    config: Config,
    held_out: TokenStream,
    model: Transformer,
    layout: PackingConfig,
    mesh: Mesh,
    stop: StopSignal,
) -> Callable[[Any], dict[str, float]]:
    """Parameters → the figures of the held-out text that a run keeps."""
    batch_size = config.train.batch_size

    def evaluate(params: Any) -> dict[str, float]:
        found = evaluate_stream(
            model,
            params,
            held_out,
            layout,
            batch_size=batch_size,
            max_batches=config.train.eval_batches,
            rows=own_rows(mesh, batch_size),
            show=distributed.is_main_process(),
            put=partial(global_batch, mesh, batch_size, 0),
            check=stop.check,
        ).to_dict()
        names = ("loss", "perplexity", "bits_per_byte", "accuracy")
        return {f"val_{name}": found[name] for name in names}

    return evaluate


def _sampler(config: Config, tokenizer: Tokenizer, model: Transformer) -> Callable[[Any], str]:
    """Parameters → a text that goes on from `train.sample_prompt`, which fits."""
    train = config.train
    prompt = tokenizer.encode(train.sample_prompt)
    room = config.model.max_seq_len - max(len(prompt), 1)

    def sample(params: Any) -> str:
        try:
            [completion] = generate(
                model,
                params,
                [prompt],
                sampling=SamplingConfig(temperature=0.8, top_k=50),
                end_of_text=tokenizer.end_of_text,
                max_new_tokens=min(train.sample_tokens, room),
                seed=config.seed,
            )
        except InputError as error:  # logits that are not finite: no reason to end the training
            return f"none ({error})"
        return train.sample_prompt + tokenizer.decode_after(prompt, completion.tokens)

    return sample
