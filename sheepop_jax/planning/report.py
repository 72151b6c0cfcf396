"""Formats a plan as text: memory per device, work per update, and advice."""

import numpy as np

from sheepop_jax.config.schema import Config
from sheepop_jax.formatting import format_bytes, format_count
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.planning.plan import Plan

# The fields of a `MemoryEstimate`, in display order.
PARTS = {
    "parameters": "parameters, fp32",
    "optimizer": "optimizer state, fp32",
    "gradients": "gradients and gathered parameters, fp32",
    "activations": "activations kept for the backward pass",
    "loss": "one chunk of logits, and the loss's gradients",
    "batch": "batch",
}


def describe(plan: Plan, config: Config, model: Transformer, mfu: float) -> str:
    """Formats a plan as a multi-line report.

    Args:
        plan: the plan of the run.
        config: the configuration passed to `make_plan`.
        model: the model passed to `make_plan`.
        mfu: expected model FLOPs utilization, a fraction of the peak FLOP/s.
    """
    memory = plan.memory
    parts = [(text, getattr(memory, name)) for name, text in PARTS.items()]
    rows = [(text, value) for text, value in parts if value]
    lines = [
        f"{plan.counts()} on {plan.on_devices()}",
        f"vocabulary of {model.vocab_size:,}, activations in {np.dtype(model.dtype).name}, "
        f"attention by {model.implementation}, remat {config.model.remat}",
        "",
        "memory per device",
        *(f"  {text:48}{format_bytes(value):>10}" for text, value in rows),
        f"  {'peak':48}{format_bytes(memory.total):>10}{plan.verdict()}",
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
        lines += ["", "changes that lower the memory"]
        for advice in plan.advice:
            fits = "fits" if advice.fits else "does not fit"
            lines.append(f"  {advice.flags}: {format_bytes(advice.total)}, {fits}")
        if not any(advice.fits for advice in plan.advice):
            lines.append(
                "  more devices (mesh.fsdp, mesh.tensor), shorter windows, or a smaller model"
            )
    return "\n".join(lines)


def _time(plan: Plan, mfu: float) -> str:
    seconds = plan.seconds(mfu)
    if seconds is None:
        return "time unknown: no peak FLOP/s known for this device"
    return (
        f"{seconds:.3g} s and {format_count(plan.tokens / seconds)} tokens/s at "
        f"{mfu:.0%} MFU, of {plan.peak_flops:.4g} FLOP/s"
    )
