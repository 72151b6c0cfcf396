"""Writes a run as a GGUF file, which llama.cpp, Ollama and programs based on them load.

The file holds the weights, the tokenizer and the numbers that the architecture needs. Names and
layouts follow from those of Hugging Face (`hub_tensors`), as llama.cpp's own converter does it.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sheepop_jax.checkpoint.run import Run
from sheepop_jax.config.schema import ModelConfig
from sheepop_jax.errors import InputError
from sheepop_jax.files import write_atomic
from sheepop_jax.interop.families import HubModel, for_export
from sheepop_jax.interop.gguf_tokenizer import Vocabulary, gguf_vocabulary
from sheepop_jax.interop.hub_tensors import Tensor, tensors
from sheepop_jax.interop.new_directory import check_new, new_directory
from sheepop_jax.interop.ollama import modelfile, recognized

GGUF_FILE = "model.gguf"
MODELFILE = "Modelfile"
# Our name of a dtype -> the name in GGUF of the type of matrices.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
# llama.cpp's names for the same files (general.file_type).
_FILE_TYPES = {
    "float32": "ALL_F32",
    "float16": "MOSTLY_F16",
    "bfloat16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}
# Name in Hugging Face -> name in llama.cpp, where they differ.
_ARCHITECTURES = {"gpt_neox": "gptneox"}


def import_gguf() -> Any:
    """The package `gguf`, an extra.

    Raises:
        InputError: it is not installed.
    """
    try:
        import gguf
    except ModuleNotFoundError:
        got, hint = "no package gguf", "'pip install gguf xllamacpp'"
        raise InputError("format", got, "the package gguf, which writes GGUF files", hint) from None
    return gguf


def check_gguf(run: Run, out: Path, dtype: str = "float32") -> HubModel:
    """Checks what can be checked without the parameters.

    Args:
        run: the run.
        out: the directory to write.
        dtype: of matrices: a key of `DTYPES`.

    Returns:
        The model in the architecture in which llama.cpp computes it.

    Raises:
        InputError: llama.cpp cannot express the model or its tokenizer (names the field and the
            nearest value that works), `out` exists, an unknown dtype, or the package `gguf` is
            missing, or for a chat model `jinja2`.
    """
    if dtype not in DTYPES:
        raise InputError("dtype", dtype, "one of " + ", ".join(DTYPES) + " for `format=gguf`")
    model = checked_model(run)
    gguf_vocabulary(run.tokenizer, model.vocab_size)
    recognized(run.tokenizer)
    check_new(out, "out")
    import_gguf()
    return model


def export_gguf(run: Run, params: Any, step: int, out: Path, dtype: str = "float32") -> HubModel:
    """Writes `out/model.gguf` and `out/Modelfile`.

    `out` appears by one rename when both are written and synced to disk.

    Args:
        run: the run.
        params: its parameters, a nested dict of fp32 arrays.
        step: the step of the parameters.
        out: a directory that does not exist or is empty.
        dtype: of matrices: float32, float16, bfloat16 or q8_0 (8-bit blocks of 32; a matrix whose
            rows are not multiples of 32 is float16). Vectors and learned positions are float32.

    Returns:
        The model in the architecture of the file.

    Raises:
        InputError: see `check_gguf`; or float16 does not hold a weight. Nothing is written.
        RunFailed: a file cannot be written, as on a full disk. Nothing is left.
    """
    model = check_gguf(run, out, dtype)
    with new_directory(out, "out") as pending:
        context = run.config.model.max_seq_len
        write_atomic(pending / MODELFILE, modelfile(run.tokenizer, GGUF_FILE, context))
        _write(pending / GGUF_FILE, run, params, step, model, dtype)
    return model


def checked_model(run: Run) -> HubModel:
    """The model in the architecture in which llama.cpp computes it.

    Raises:
        InputError: there is none; names the field, and the nearest value that works.
    """
    config = run.config.model
    model = for_export(config, run.model().vocab_size)
    family = model.family

    def require(rule: bool, field: str, expected: str, value: str) -> None:
        if not rule:
            wanted = f"{expected} in GGUF's {family.title}"
            hint = f"training with `model.{field}={value}`"
            raise InputError(f"model.{field}", getattr(config, field), wanted, hint)

    # The code of each of these architectures has one activation, and tanh is its only GELU.
    if config.feed_forward == "mlp":
        exact = config.activation in ("gelu", "gelu_tanh")
        require(exact, "activation", "gelu or gelu_tanh", "gelu")
    require(config.sliding_window == 0, "sliding_window", "0", "0")
    require(config.max_seq_len > 1, "max_seq_len", "at least 2", "2")  # llama.cpp would abort
    if family.name != "llama":  # the others ignore the tensor of the angles' factors
        require(config.rope_scaling != "llama3", "rope_scaling", "none or linear", "linear")
    return model


def _write(path: Path, run: Run, params: Any, step: int, model: HubModel, dtype: str) -> None:
    gguf = import_gguf()
    arch = _ARCHITECTURES.get(model.family.name, model.family.name)
    writer = gguf.GGUFWriter(None, arch)
    writer.add_name(run.directory.resolve().name)
    writer.add_description(f"trained with sheepop_jax, step {step}")
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(gguf, writer, model)
    _add_vocabulary(writer, gguf_vocabulary(run.tokenizer, model.vocab_size))
    types = [(tensor, _type(gguf, tensor, dtype)) for tensor in gguf_tensors(gguf, arch, model)]
    for tensor, kind in types:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        num_bytes = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), num_bytes, kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, kind in types:  # one at a time in memory
            writer.write_tensor_data(_converted(gguf, tensor.name, tensor.pack(params), kind))
    finally:
        writer.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _add_config(gguf: Any, writer: Any, model: HubModel) -> None:
    config = model.config
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_vocab_size(model.vocab_size)
    if config.norm == "rmsnorm":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if config.position == "rope":
        writer.add_rope_dimension_count(config.rotary_width)
        writer.add_rope_freq_base(config.rope_theta)
        if config.rope_scaling == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(config.rope_scaling_factor)
    if model.family.name == "gpt_neox":
        writer.add_parallel_residual(config.parallel_residual)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.pre_tokenizer)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    # Where an id is missing, llama.cpp takes 11, that of its first models.
    begins = vocabulary.bos is not None
    writer.add_bos_token_id(vocabulary.bos if begins else vocabulary.end_of_text)
    writer.add_eos_token_id(vocabulary.end_of_text)
    # llama.cpp also ends a text at the end of a turn and at that of a message (a call of a tool).
    add_ends = (writer.add_eot_token_id, writer.add_eom_token_id)
    for add, index in zip(add_ends, vocabulary.other_ends, strict=False):
        add(index)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(False)


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of the file.

    Attributes:
        name: its name.
        shape: its shape; the last axis is the contiguous one.
        pack: our parameters -> the tensor, fp32.
    """

    name: str
    shape: tuple[int, ...]
    pack: Callable[[Any], np.ndarray]


def gguf_tensors(gguf: Any, arch: str, model: HubModel) -> Iterator[GGUFTensor]:
    """The tensors of a model, from those of its Hugging Face file."""
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, model.config.num_layers)
    for tensor in tensors(model):
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(f"{arch} has no place for {tensor.name}")
        yield _gguf_tensor(name, model, tensor)
    if model.config.rope_scaling == "llama3":
        factors = rope_factors(model.config)
        yield GGUFTensor("rope_freqs.weight", factors.shape, lambda params: factors)
    if model.family.name == "gpt_neox" and model.config.tie_embeddings:  # it has no tied models
        embedding = next(t for t in tensors(model) if t.paths == (("embedding",),))
        yield GGUFTensor("output.weight", embedding.shape, embedding.pack)


def _gguf_tensor(name: str, model: HubModel, tensor: Tensor) -> GGUFTensor:
    config, family, shape = model.config, model.family.name, tensor.shape
    is_kernel = all(path[-1] == "kernel" for path in tensor.paths)
    if family == "gpt2" and is_kernel and len(shape) == 2:  # Hugging Face has [in, out]
        return GGUFTensor(name, shape[::-1], lambda params: tensor.pack(params).T)
    if tensor.layout == "per_head":
        # [H, 3, C, …]: llama.cpp has the queries of all heads first.
        split = (config.num_heads, 3, config.head_width, *shape[1:])
        return GGUFTensor(
            name, shape, lambda params: tensor.pack(params).reshape(split).swapaxes(0, 1)
        )
    if family == "llama" and (".attn_q." in name or ".attn_k." in name):
        # llama.cpp rotates neighbors in Llama's heads, [C/2, 2]; we rotate halves, [2, C/2].
        half = config.head_width // 2
        return GGUFTensor(
            name,
            shape,
            lambda params: tensor.pack(params).reshape(-1, 2, half, *shape[1:]).swapaxes(1, 2),
        )
    return GGUFTensor(name, shape, tensor.pack)


def rope_factors(config: ModelConfig) -> np.ndarray:
    """What llama.cpp divides RoPE's angles by, fp32 [R/2]: Llama 3's scaling (`rope_tables`)."""
    exponents = np.arange(0, config.rotary_width, 2) / config.rotary_width
    turns = config.rope_original_length / (2 * math.pi * config.rope_theta**exponents)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / config.rope_scaling_factor)).astype(np.float32)


def _type(gguf: Any, tensor: GGUFTensor, dtype: str) -> Any:
    """The type of a tensor in the file."""
    kinds = gguf.GGMLQuantizationType
    if len(tensor.shape) == 1 or tensor.name == "position_embd.weight":
        return kinds.F32
    kind = kinds[DTYPES[dtype]]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[-1] % block == 0 else kinds.F16


def _converted(gguf: Any, name: str, array: np.ndarray, kind: Any) -> np.ndarray:
    """The bytes of a tensor.

    Raises:
        InputError: a weight is beyond the range of float16.
    """
    array = np.ascontiguousarray(array, np.float32)
    if kind == gguf.GGMLQuantizationType.F16:
        with np.errstate(over="ignore"):
            narrow = array.astype(np.float16)
        if np.isinf(narrow).any() and np.isfinite(array).all():
            got = f"float16 ({name} has a weight of {np.abs(array).max():.3g})"
            raise InputError("dtype", got, "weights up to 65504", "`dtype=bfloat16`")
        return narrow
    return gguf.quants.quantize(array, kind)
