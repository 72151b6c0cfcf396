"""The configuration schema: frozen dataclasses that validate every field.

All defaults are in `configs/base.py`. `Config.from_dict` is the only reader of a `ConfigDict` and
returns a complete, valid configuration.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeVar, cast, get_origin, get_type_hints

from sheepop_jax.config.data import DataConfig
from sheepop_jax.config.validation import Section
from sheepop_jax.errors import InputError, masked

_T = TypeVar("_T")

NORMS = ("layernorm", "rmsnorm")
FEED_FORWARDS = ("mlp", "gated")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "silu")
POSITIONS = ("rope", "sinusoidal", "learned")
ROPE_SCALINGS = ("none", "linear", "llama3")
PLATFORMS = ("auto", "cpu", "cuda", "tpu")
DTYPES = ("auto", "float32", "bfloat16")
TRACKERS = ("tensorboard", "wandb")
# The version of `config.json`: 2 since the model options of `ADDED`; 1 had no version.
SCHEMA = 2
# Fields that runs of an older version lack, with the values that they were trained with.
ADDED: dict[str, dict[str, Any]] = {
    "model": {
        "head_dim": 0,
        "partial_rotary": 1.0,
        "rope_scaling": "none",
        "rope_scaling_factor": 8.0,
        "rope_low_freq_factor": 1.0,
        "rope_high_freq_factor": 4.0,
        "rope_original_length": 8192,
        "norm": "layernorm",
        "feed_forward": "mlp",
        "qkv_bias": False,
        "qk_norm": False,
        "parallel_residual": False,
        "sliding_window": 0,
        "logit_softcap": 0.0,
    },
    "data": {
        "format": "text",
        "broken_rows": "error",
        "chat_template": "sheepop",
        "chat_loss": "assistant",
        "long_conversations": "drop",
    },
    "train": {
        "trackers": "tensorboard",
        "init_from": "",
        "lora_rank": 0,
        "lora_alpha": 0.0,
        "lora_dropout": 0.0,
    },
}
HUGE_INT = 10**300  # beyond the range of every float field


@dataclass(frozen=True)
class ModelConfig(Section):
    """The architecture. The vocabulary size comes from the tokenizer, so it is not a field."""

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    max_seq_len: int
    dropout: float
    attention_dropout: float
    norm: str
    norm_eps: float
    feed_forward: str
    activation: str
    position: str
    rope_theta: float
    partial_rotary: float
    rope_scaling: str
    rope_scaling_factor: float
    rope_low_freq_factor: float
    rope_high_freq_factor: float
    rope_original_length: int
    use_bias: bool
    qkv_bias: bool
    qk_norm: bool
    parallel_residual: bool
    sliding_window: int
    logit_softcap: float
    tie_embeddings: bool
    remat: str

    prefix = "model."

    def __post_init__(self) -> None:
        self.count(1, "d_model", "num_layers", "num_heads", "d_ff", "max_seq_len")
        self.count(0, "num_kv_heads", "head_dim", "sliding_window")
        self.count(1, "rope_original_length")
        self.fraction("dropout", "attention_dropout")
        self.one_of("norm", *NORMS)
        self.one_of("feed_forward", *FEED_FORWARDS)
        self.one_of("activation", *ACTIVATIONS)
        self.one_of("position", *POSITIONS)
        self.one_of("rope_scaling", *ROPE_SCALINGS)
        self.one_of("remat", "none", "dots", "full")
        self.positive("rope_theta", "norm_eps", "rope_low_freq_factor")
        self.not_negative("logit_softcap")
        self.require(
            self.head_dim > 0 or self.d_model % self.num_heads == 0,
            "num_heads",
            f"a divisor of {self.d_model} (model.d_model), or model.head_dim above 0",
        )
        self.require(
            self.num_heads % self.kv_heads == 0,
            "num_kv_heads",
            f"0 or a divisor of {self.num_heads} (model.num_heads)",
        )
        self.require(0 < self.partial_rotary <= 1, "partial_rotary", "a number in (0, 1]")
        self.require(self.rope_scaling_factor >= 1, "rope_scaling_factor", "at least 1")
        self.require(
            self.rope_high_freq_factor > self.rope_low_freq_factor,
            "rope_high_freq_factor",
            f"more than {self.rope_low_freq_factor} (model.rope_low_freq_factor)",
        )
        if self.position == "rope":
            self._check_rope()
        else:
            rope = "model.position=rope (the only one that rotates)"
            self.require(self.partial_rotary == 1, "partial_rotary", f"1, or {rope}")
            self.require(self.rope_scaling == "none", "rope_scaling", f"none, or {rope}")
        if self.position == "sinusoidal":
            self.require(self.d_model % 2 == 0, "d_model", "an even width for sinusoidal positions")
        self.require(
            not (self.use_bias and self.qkv_bias), "qkv_bias", "False where model.use_bias is True"
        )

    def _check_rope(self) -> None:
        if self.head_dim or self.partial_rotary == 1:
            field = "head_dim" if self.head_dim else "num_heads"
            named = "model.head_dim" if self.head_dim else "model.d_model / model.num_heads"
            self.require(
                self.head_width % 2 == 0,
                field,
                f"an even head width for rope ({named} = {self.head_width})",
            )
        self.require(
            self.rotary_width > 0 and self.rotary_width % 2 == 0,
            "partial_rotary",
            f"a fraction of the head width, {self.head_width}, that gives an even number above 0 "
            f"(not {self.rotary_width})",
        )

    @property
    def head_width(self) -> int:
        """C, the width of one head: `head_dim`, or D / H if that is 0."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def rotary_width(self) -> int:
        """R, how many of a head's C components RoPE rotates: the first ones."""
        return int(self.head_width * self.partial_rotary)

    @property
    def kv_heads(self) -> int:
        """K, the number of key/value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def smallest_side(self) -> int:
        """The smallest number of inputs or outputs of a linear layer: the largest useful rank."""
        widths = self.num_heads * self.head_width, self.kv_heads * self.head_width
        return min(self.d_model, self.d_ff, *widths)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of the linear layers (Hu et al. 2021, "LoRA"): W + alpha / rank · A B.

    Attributes:
        rank: r, the columns of A and rows of B.
        alpha: the strength.
        dropout: probability of dropping an input of A, in [0, 1).
    """

    rank: int
    alpha: float
    dropout: float

    @property
    def scale(self) -> float:
        """The factor of A B."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """The optimizer and its learning rate schedule, in units of optimizer updates."""

    name: str
    learning_rate: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    warmup_steps: int
    schedule: str
    final_lr_fraction: float
    max_grad_norm: float
    max_grad_zscore: float

    prefix = "optimizer."

    def __post_init__(self) -> None:
        self.one_of("name", "adamw", "muon")
        self.one_of("schedule", "cosine", "linear", "constant")
        self.positive("learning_rate", "eps")
        self.fraction("b1", "b2")
        self.count(0, "warmup_steps")
        # 0 disables either of the last two.
        self.not_negative("weight_decay", "max_grad_norm", "max_grad_zscore")
        self.require(0 <= self.final_lr_fraction <= 1, "final_lr_fraction", "a number in [0, 1]")


@dataclass(frozen=True)
class TrainConfig(Section):
    """Training length, batch size, platform, logging and evaluation."""

    platform: str
    num_steps: int
    num_epochs: int
    batch_size: int
    grad_accum_steps: int
    dtype: str
    log_every: int
    eval_every: int
    eval_batches: int
    sample_prompt: str
    sample_tokens: int
    max_skipped_steps: int
    profile_steps: int
    trackers: str
    init_from: str
    lora_rank: int
    lora_alpha: float
    lora_dropout: float

    prefix = "train."

    def __post_init__(self) -> None:
        self.require(self.platform != "gpu", "platform", "one of " + ", ".join(PLATFORMS), "cuda")
        self.one_of("platform", *PLATFORMS)
        self.one_of("dtype", *DTYPES)
        self.count(1, "batch_size", "grad_accum_steps", "log_every", "max_skipped_steps")
        self.count(0, "num_steps", "num_epochs", "eval_every", "eval_batches", "sample_tokens")
        self.count(0, "profile_steps", "lora_rank")
        self.not_negative("lora_alpha")
        self.fraction("lora_dropout")
        self.require(
            self.lora_rank == 0 or self.init_from != "",
            "lora_rank",
            "0, or train.init_from with the run whose layers it adapts",
        )
        for field in ("lora_alpha", "lora_dropout"):
            unused = self.lora_rank == 0 and getattr(self, field) > 0
            self.require(not unused, field, "0, or train.lora_rank above 0")
        self.require(
            set(self.tracker_names) <= set(TRACKERS),
            "trackers",
            f"{' or '.join(TRACKERS)}, both separated by a comma, or nothing",
        )
        self.require(
            (self.num_steps > 0) != (self.num_epochs > 0),
            "num_steps",
            f"exactly one of train.num_steps and train.num_epochs (= {self.num_epochs}) above 0",
            "`train.num_steps=0`" if self.num_epochs else "`train.num_epochs=1`",
        )

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """The names in `trackers`."""
        return tuple(self.trackers.replace(" ", "").split(",")) if self.trackers else ()

    @property
    def lora(self) -> LoraConfig | None:
        """The adapters that are trained; None trains all parameters."""
        if self.lora_rank == 0:
            return None
        return LoraConfig(self.lora_rank, self.lora_alpha or self.lora_rank, self.lora_dropout)

    @property
    def sequences_per_update(self) -> int:
        """Sequences per optimizer update, over all devices."""
        return self.batch_size * self.grad_accum_steps


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Checkpoint interval and number of latest checkpoints; the best is always kept."""

    save_every: int
    keep: int

    prefix = "checkpoint."

    def __post_init__(self) -> None:
        self.count(0, "save_every")
        self.count(1, "keep")


@dataclass(frozen=True)
class MeshConfig(Section):
    """Sizes of the device mesh axes; one may be -1 for the remaining devices."""

    data: int
    fsdp: int
    tensor: int

    prefix = "mesh."

    def __post_init__(self) -> None:
        for field in ("data", "fsdp", "tensor"):
            value = getattr(self, field)
            self.require(
                value == -1 or value >= 1, field, "at least 1, or -1 for the remaining devices"
            )
        rest = [name for name in ("data", "fsdp", "tensor") if getattr(self, name) == -1]
        if len(rest) > 1:
            self.require(False, rest[1], "at most one axis with -1")


@dataclass(frozen=True)
class Config(Section):
    """The full configuration of a run; validated on construction."""

    seed: int
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    mesh: MeshConfig

    def __post_init__(self) -> None:
        self.require(0 <= self.seed < 2**32, "seed", "an integer in [0, 2**32)")
        self.data.require(
            self.data.seq_len <= self.model.max_seq_len,
            "seq_len",
            f"at most {self.model.max_seq_len} (model.max_seq_len)",
            f"`model.max_seq_len={self.data.seq_len}`",
        )
        self.train.require(
            self.train.lora_rank <= self.model.smallest_side,
            "lora_rank",
            f"at most {self.model.smallest_side}, the smallest side of a linear layer",
        )
        self.optimizer.require(
            self.train.lora_rank == 0 or self.optimizer.name == "adamw",
            "name",
            "adamw where train.lora_rank is above 0",
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Builds and validates a configuration from a `ConfigDict` or parsed JSON.

        Raises:
            InputError: a field is unknown, missing, of the wrong type or invalid.
        """
        return _build(cls, values, "")

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Self:
        """The configuration of a run, from its parsed `config.json`.

        Raises:
            InputError: see `from_dict` and `saved_fields`.
        """
        return cls.from_dict(saved_fields(saved))

    def to_dict(self) -> dict[str, Any]:
        """Returns nested plain values, as saved in `config.json`: secrets in URLs are masked."""
        values = dataclasses.asdict(self)
        return {**values, "data": _masked(values["data"])}


def saved_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a run's parsed `config.json`, with those added since.

    Raises:
        InputError: a newer version wrote it.
        TypeError, KeyError: it is not what `create_run` writes.
    """
    fields, version = saved["config"], saved.get("schema", 1)
    if version > SCHEMA:
        expected = f"at most {SCHEMA}, the version that this program reads"
        raise InputError("schema", version, expected, "a newer sheepop_jax")
    return {**fields, **{name: {**ADDED[name], **fields[name]} for name in ADDED}}


def _build(cls: type[_T], values: Mapping[str, Any], prefix: str) -> _T:
    hints = get_type_hints(cls)
    # `_T` is always a dataclass, which a TypeVar cannot express: hence the ignore.
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            from sheepop_jax.config.suggestions import suggest  # lazy: only for errors

            near = suggest(f"{prefix}{key}", _names(Config, "")).replace("`", "")  # not a flag
            hint = near or "one of " + ", ".join(names)
            raise InputError(f"{prefix}{key}", "an unknown field", "a known field", hint)
    built: dict[str, Any] = {}
    for name in names:
        kind, path = hints[name], f"{prefix}{name}"
        if name not in values:
            raise InputError(path, "nothing", f"a {kind.__name__}", "starting from configs/base.py")
        value = values[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping) and not hasattr(value, "items"):
                raise InputError(path, value, "a section with fields")
            built[name] = _build(cast(type, kind), value, f"{path}.")
            continue
        if kind is float and type(value) is int:
            value = float(max(-HUGE_INT, min(value, HUGE_INT)))  # float() raises beyond 2**1024
        if get_origin(kind) is dict and hasattr(value, "items"):
            kind, value = dict, _plain(value)
        if type(value) is not kind:
            raise InputError(path, value, f"a value of type {kind.__name__}")
        built[name] = value
    return cls(**built)


def _masked(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _masked(inner) for name, inner in value.items()}
    return masked(value) if isinstance(value, str) else value


def _names(cls: type, prefix: str) -> list[str]:
    """The dotted names of all fields and sections."""
    found = []
    for field in dataclasses.fields(cls):
        found.append(f"{prefix}{field.name}")
        if dataclasses.is_dataclass(kind := get_type_hints(cls)[field.name]):
            found += _names(cast(type, kind), f"{prefix}{field.name}.")
    return found


def _plain(value: Any) -> Any:
    """Converts nested ConfigDicts to dicts."""
    return {k: _plain(v) for k, v in value.items()} if hasattr(value, "items") else value
