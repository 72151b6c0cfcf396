"""A plan as a person reads it: a table of bytes, the work of an update, and what to change."""

import numpy as np

from sheepop_jax.config.schema import Config
from sheepop_jax.formatting import format_bytes, format_count
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.training.plan import Plan

# The parts of a `MemoryEstimate`, in the order shown.
PARTS = {
    "parameters": "parameters, fp32",
    "optimizer": "optimizer state, fp32",
    "gradients": "gradients, and what fsdp gathers, fp32",
    "activations": "activations kept for the backward pass",
    "loss": "one chunk of logits, and the loss's gradients",
    "batch": "the batch",
}


def describe(plan: Plan, config: Config, model: Transformer, mfu: float) -> str:
    """The whole of it, many lines.

    Args:
        plan: of the run.
        config: its configuration.
        model: what `make_plan` was given.
        mfu: model FLOPs utilization, the share of the peak FLOP/s that is expected.
    """
    memory = plan.memory
    parts = [(text, getattr(memory, name)) for name, text in PARTS.items()]
    rows = [(text, value) for text, value in parts if value]
    lines = [
        f"{format_count(plan.parameters)} parameters on {_devices(plan)}",
        f"vocabulary of {model.vocab_size:,}, activations in {np.dtype(model.dtype).name}, "
        f"attention by {model.implementation}, remat {config.model.remat}",
        "",
        "memory of each device",
        *(f"  {text:48}{format_bytes(value):>10}" for text, value in rows),
        f"  {'most at one time':48}{format_bytes(memory.total):>10}{_verdict(plan)}",
        "",
        "one update",
        f"  {plan.tokens:,} tokens: {config.train.grad_accum_steps} microbatches of "
        f"{config.train.batch_size} windows of {config.data.seq_len}",
        f"  {plan.flops:.3g} FLOPs",
        f"  {_time(plan, mfu)}",
    ]
    for axis, sent in plan.sent.items():
        if sent:
            lines.append(f"  each device sends {format_bytes(sent)} over the mesh's {axis} axis")
    if plan.fits is False:
        lines += ["", "it does not fit; what would change that"]
        for advice in plan.advice:
            fits = "fits" if advice.fits else "does not fit"
            lines.append(f"  {advice.flags}: {format_bytes(advice.total)}, {fits}")
        if not any(advice.fits for advice in plan.advice):
            lines.append(
                "  more devices (mesh.fsdp, mesh.tensor), shorter windows, or a smaller model"
            )
    return "\n".join(lines)


def summary(plan: Plan) -> tuple[str, str]:
    """Two lines for the log at the start of a run."""
    return (
        f"{format_count(plan.parameters)} parameters on {_devices(plan)}; an update is "
        f"{plan.tokens:,} tokens and {plan.flops:.3g} FLOPs",
        f"each device needs {plan.memory}{_verdict(plan)}",
    )


def _devices(plan: Plan) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    return f"{plan.devices} x {plan.device_kind} ({axes})"


def _verdict(plan: Plan) -> str:
    if plan.fits is None:
        return ""
    return f" of {plan.device_memory / 1e9:.0f} GB: {'fits' if plan.fits else 'DOES NOT FIT'}"


def _time(plan: Plan, mfu: float) -> str:
    seconds = plan.seconds(mfu)
    if seconds is None:
        return "time unknown: no peak is known of this device"
    return (
        f"{seconds:.3g} s and {format_count(plan.tokens / seconds)} tokens/s at "
        f"{mfu:.0%} MFU, of {plan.peak_flops:.4g} FLOP/s"
    )
