"""Suggestions for unknown fields: names used by other libraries, then the nearest field."""

import difflib
from collections.abc import Collection

SIMILAR = 0.8  # difflib ratio: a typo of one letter in a name of four, but not another word

# The last part of a name in nanoGPT, nanochat, Hugging Face's configurations and `Trainer`, or
# common usage, and the field for it. A value with a space is advice instead of a name.
ALIASES = {
    # architecture
    "n_layer": "model.num_layers",
    "n_layers": "model.num_layers",
    "num_hidden_layers": "model.num_layers",
    "layers": "model.num_layers",
    "depth": "model.num_layers",
    "n_head": "model.num_heads",
    "n_heads": "model.num_heads",
    "num_attention_heads": "model.num_heads",
    "heads": "model.num_heads",
    "n_kv_head": "model.num_kv_heads",
    "n_kv_heads": "model.num_kv_heads",
    "num_key_value_heads": "model.num_kv_heads",
    "n_embd": "model.d_model",
    "n_embed": "model.d_model",
    "hidden_size": "model.d_model",
    "hidden_dim": "model.d_model",
    "embed_dim": "model.d_model",
    "emb_dim": "model.d_model",
    "dim": "model.d_model",
    "width": "model.d_model",
    "intermediate_size": "model.d_ff",
    "n_inner": "model.d_ff",
    "ffn_dim": "model.d_ff",
    "mlp_dim": "model.d_ff",
    "block_size": "`data.seq_len` and `model.max_seq_len`",
    "sequence_len": "`data.seq_len` and `model.max_seq_len`",
    "sequence_length": "`data.seq_len` and `model.max_seq_len`",
    "context_length": "`data.seq_len` and `model.max_seq_len`",
    "n_ctx": "model.max_seq_len",
    "n_positions": "model.max_seq_len",
    "max_position_embeddings": "model.max_seq_len",
    "hidden_act": "model.activation",
    "activation_function": "model.activation",
    "resid_pdrop": "model.dropout",
    "embd_pdrop": "model.dropout",
    "hidden_dropout": "model.dropout",
    "residual_dropout": "model.dropout",
    "attn_pdrop": "model.attention_dropout",
    "attn_dropout": "model.attention_dropout",
    "layer_norm_eps": "model.norm_eps",
    "layer_norm_epsilon": "model.norm_eps",
    "norm_epsilon": "model.norm_eps",
    "rms_norm_eps": "model.norm_eps",
    "bias": "model.use_bias",
    "tie_word_embeddings": "model.tie_embeddings",
    "weight_tying": "model.tie_embeddings",
    "rope_base": "model.rope_theta",
    "gradient_checkpointing": "model.remat",
    "activation_checkpointing": "model.remat",
    # optimizer
    "lr": "optimizer.learning_rate",
    "max_lr": "optimizer.learning_rate",
    "matrix_lr": "optimizer.learning_rate",
    "embedding_lr": "optimizer.learning_rate",
    "unembedding_lr": "optimizer.learning_rate",
    "beta1": "optimizer.b1",
    "adam_beta1": "optimizer.b1",
    "beta2": "optimizer.b2",
    "adam_beta2": "optimizer.b2",
    "adam_epsilon": "optimizer.eps",
    "wd": "optimizer.weight_decay",
    "warmup": "optimizer.warmup_steps",
    "warmup_iters": "optimizer.warmup_steps",
    "warmup_ratio": "optimizer.warmup_steps",
    "decay_lr": "optimizer.schedule",
    "lr_schedule": "optimizer.schedule",
    "lr_scheduler": "optimizer.schedule",
    "lr_scheduler_type": "optimizer.schedule",
    "min_lr": "`optimizer.final_lr_fraction`, a fraction of `optimizer.learning_rate`",
    "final_lr_frac": "optimizer.final_lr_fraction",
    "grad_clip": "optimizer.max_grad_norm",
    "clip_grad_norm": "optimizer.max_grad_norm",
    "optim": "optimizer.name",
    # training
    "max_iters": "train.num_steps",
    "max_steps": "train.num_steps",
    "lr_decay_iters": "train.num_steps",
    "num_iterations": "train.num_steps",
    "n_steps": "train.num_steps",
    "steps": "train.num_steps",
    "iterations": "train.num_steps",
    "epochs": "train.num_epochs",
    "num_train_epochs": "train.num_epochs",
    "device_batch_size": "`train.batch_size`, over all devices",
    "micro_batch_size": "`train.batch_size`, over all devices",
    "per_device_train_batch_size": "`train.batch_size`, over all devices",
    "total_batch_size": "`train.batch_size` and `train.grad_accum_steps`, in sequences",
    "gradient_accumulation_steps": "train.grad_accum_steps",
    "accumulate_grad_batches": "train.grad_accum_steps",
    "eval_interval": "train.eval_every",
    "eval_steps": "train.eval_every",
    "eval_iters": "train.eval_batches",
    "sample_every": "train.eval_every",
    "log_interval": "train.log_every",
    "logging_steps": "train.log_every",
    "device": "train.platform",
    "device_type": "train.platform",
    "accelerator": "train.platform",
    "precision": "train.dtype",
    "torch_dtype": "train.dtype",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "compile": "leaving it out: every step is compiled",
    "torch_compile": "leaving it out: every step is compiled",
    # the rest
    "save_interval": "checkpoint.save_every",
    "save_steps": "checkpoint.save_every",
    "checkpoint_every": "checkpoint.save_every",
    "save_total_limit": "checkpoint.keep",
    "dataset": "`data.path`, or `data.name` for a dataset on the hub",
    "dataset_name": "data.name",
    "dataset_config_name": "data.subset",
    "train_file": "data.path",
    "validation_file": "data.val_path",
    "random_seed": "seed",
    "out_dir": "`workdir`",
    "output_dir": "`workdir`",
    "run_name": "`workdir`",
    "model_tag": "`workdir`",
    "resume_from_checkpoint": "`workdir` of the run to resume",
}


def suggest(field: str, known: Collection[str]) -> str:
    """Suggests a replacement for an unknown field; "" if none is likely.

    Args:
        field: the unknown dotted name.
        known: the dotted names of all fields, and of sections.

    Returns:
        Advice for the hint of an error; names are in backticks.
    """
    section, _, last = field.rpartition(".")
    inside = [name for name in known if name.startswith(f"{field}.")]
    if inside:
        return f"one of its fields, such as `{inside[0]}`"
    named: dict[str, list[str]] = {}
    for name in known:
        named.setdefault(name.rpartition(".")[2], []).append(name)
    if last not in named:
        alias = ALIASES.get(last.lower().replace("-", "_"), "")
        if alias in known:
            return f"`{alias}`"
        if " " in alias or alias.startswith("`"):
            return alias
    sections = {name.rpartition(".")[0] for name in known}
    near_sections = difflib.get_close_matches(section, sections, n=1, cutoff=SIMILAR)
    for near in difflib.get_close_matches(last, named, n=3, cutoff=SIMILAR):
        here = [name for name in named[near] if name.rpartition(".")[0] in near_sections]
        if len(found := here or named[near]) == 1:
            return f"`{found[0]}`"
    return ""
