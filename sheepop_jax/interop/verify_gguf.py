"""Measures whether llama.cpp computes, from a written GGUF file, what a run's model computes."""

import dataclasses
import functools
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sheepop_jax.checkpoint.run import Run
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.interop.export_gguf import checked_model, gguf_tensors, import_gguf
from sheepop_jax.interop.gguf_tokenizer import normalizes
from sheepop_jax.interop.llama_cpp import LlamaCpp
from sheepop_jax.interop.verification import Row, VerificationReport
from sheepop_jax.interop.verification_text import strings_of, texts_of
from sheepop_jax.model.transformer import Transformer, logits

# Largest difference of a log-probability, by dtype of the file: a few times what trained models
# show (docs/interop.md), and far below the effect of a wrong layout, which is above 1.
LIMITS = {"float32": 1e-2, "float16": 3e-2, "bfloat16": 0.2, "q8_0": 0.5}
# Largest rounding error of a tensor, by the type in the file, relative to its largest value.
_ROUNDING = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.6 / 127}
NEW_TOKENS = 64
_NAME = "llama.cpp"
_TOP = 64  # tokens compared at each position


def verify_gguf(
    run: Run,
    params: Any,
    path: Path,
    dtype: str = "float32",
    prompts: Sequence[Sequence[int]] | None = None,
    strings: Sequence[str] | None = None,
) -> VerificationReport:
    """Compares llama.cpp with the model of a run.

    llama.cpp continues each prompt with its most probable tokens; the model is given the same
    tokens, so that one different token does not hide what follows.

    Args:
        run: the run.
        params: the parameters that were exported, fp32.
        path: the GGUF file.
        dtype: that of the export.
        prompts: token ids, shorter than the context; None takes the run's validation text.
        strings: texts for the tokenizer; None makes 1,000.

    Raises:
        InputError: xllamacpp is missing, or llama.cpp does not load the file.
    """
    context = run.config.model.max_seq_len
    notes = []
    if prompts is None or strings is None:
        texts = texts_of(run, params)
        notes.append(f"text: {texts.source}")
        if prompts is None:
            kept = [max(len(ids_T) - NEW_TOKENS, (len(ids_T) + 1) // 2) for ids_T in texts.ids]
            prompts = [ids_T[:n].tolist() for ids_T, n in zip(texts.ids, kept, strict=True)]
        if strings is None:
            strings = strings_of(run.tokenizer, texts.ids)
    if normalizes(run.tokenizer):
        notes.append("tokenizer: compared on composed characters (NFC); llama.cpp composes none")
        strings = [unicodedata.normalize("NFC", text) for text in strings]
    whole = _whole_token(run.tokenizer)
    # llama.cpp allocates keys and values for the whole context that it is given.
    context = min(context, max(map(len, prompts)) + NEW_TOKENS)
    with LlamaCpp(path, context) as llama:
        written = [_continued(llama, prompt, context, whole) for prompt in prompts]
        tokenizer = _compare_tokenizers(run.tokenizer, llama, strings)
    ours = _logprobs(run.model(), params, prompts, written)
    logprobs, greedy = _compare_logprobs(ours, written, LIMITS[dtype])
    if not logprobs.passed:
        differs = differing_tensor(run, params, path) or "none"
        detail = f"{logprobs.detail}; tensors that differ from the run's: {differs}"
        logprobs = dataclasses.replace(logprobs, detail=detail)
    return VerificationReport((logprobs, greedy, tokenizer), tuple(notes))


def differing_tensor(run: Run, params: Any, path: Path) -> str:
    """The first tensor of a GGUF file that is not the run's; "" if there is none.

    Args:
        run: the run.
        params: its parameters, fp32.
        path: the file.
    """
    gguf = import_gguf()
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    found = {tensor.name: tensor for tensor in reader.tensors}
    for tensor in gguf_tensors(gguf, arch, checked_model(run)):
        if tensor.name not in found:
            return f"{tensor.name} (missing)"
        stored = found.pop(tensor.name)
        expected = tensor.pack(params).reshape(-1)
        got = gguf.quants.dequantize(stored.data, stored.tensor_type).reshape(-1)
        close = _ROUNDING[stored.tensor_type.name] * np.max(np.abs(expected), initial=0)
        if got.shape != expected.shape or not np.all(np.abs(got - expected) <= close):
            return tensor.name
    return ", ".join(found)


@dataclass(frozen=True)
class _Step:
    """One token that llama.cpp adds to a text: the first of `logprobs`, which are by token id."""

    logprobs: dict[int, float]

    @property
    def token(self) -> int:
        return next(iter(self.logprobs))


def _continued(
    llama: LlamaCpp, prompt: Sequence[int], context: int, whole_token: int
) -> list[_Step]:
    """Continues a prompt by the most probable tokens, within the context."""
    text, steps = list(prompt), list[_Step]()
    while len(steps) < NEW_TOKENS and len(text) < context:
        steps.append(_Step(llama.next_token(text, _TOP, whole_token)))
        text.append(steps[-1].token)
    return steps


def _whole_token(tokenizer: Tokenizer) -> int:
    """A token that is one or more whole characters."""
    for index in range(tokenizer.vocab_size):
        if tokenizer.decode([index]).isascii() and tokenizer.decode([index]):
            return index
    raise ValueError("no token is whole characters")


def _logprobs(
    model: Transformer,
    params: Any,
    prompts: Sequence[Sequence[int]],
    written: Sequence[Sequence[_Step]],
) -> list[np.ndarray]:
    """The model's log-probabilities [new tokens, V] of each text, of the token at each place."""
    found = []
    for prompt, steps in zip(prompts, written, strict=True):
        text = np.array([*prompt, *(step.token for step in steps)], np.int32)
        logits_TV = np.asarray(_logits(model, params, text[None])[0], np.float64)
        wide_TV = logits_TV[len(prompt) - 1 : -1, : model.vocab_size]
        wide_TV = wide_TV - wide_TV.max(-1, keepdims=True)
        found.append(wide_TV - np.log(np.exp(wide_TV).sum(-1, keepdims=True)))
    return found


@functools.partial(jax.jit, static_argnums=0)
def _logits(model: Transformer, params: Any, tokens_BT: jax.Array) -> jax.Array:
    with jax.default_matmul_precision("highest"):  # on GPUs and TPUs, others are less precise
        hidden_BTD, _ = model.apply({"params": params}, tokens_BT)
        return logits(model, params, hidden_BTD)


def _compare_logprobs(
    ours: Sequence[np.ndarray], written: Sequence[Sequence[_Step]], limit: float
) -> tuple[Row, Row]:
    error, equal, gap = 0.0, 0, 0.0
    where, different = "", ""
    pairs = [
        (number, place, logprobs_V, step)
        for number, (logprobs_TV, steps) in enumerate(zip(ours, written, strict=True))
        for place, (logprobs_V, step) in enumerate(zip(logprobs_TV, steps, strict=True))
    ]
    for number, place, logprobs_V, step in pairs:
        place_name = f"prompt {number}, new token {place}"
        for token, logprob in step.logprobs.items():
            off = math.inf  # a row of padding, or NaN
            if token < len(logprobs_V) and math.isfinite(logprobs_V[token] - logprob):
                off = abs(float(logprobs_V[token] - logprob))
            if off > error:
                error, where = off, f"{place_name}: token {token}"
        best = int(logprobs_V.argmax())
        if best == step.token:
            equal += 1
            continue
        off = float(logprobs_V[best] - logprobs_V[min(step.token, len(logprobs_V) - 1)])
        if off >= gap:
            gap, different = off, f"{place_name}: {step.token}, not {best}"
    passed = error <= limit and len(pairs) > 0
    where = "" if passed else where
    # Two tokens this close may change places within the limit of the error.
    near = gap <= 2 * limit
    value = f"{equal:,} of {len(pairs):,}"
    if different and near:
        value, different = f"{value}, others tied within {gap:.1g}", ""
    return (
        Row(f"{_NAME}: max log-probability error", f"{error:.1e}", f"{limit:.0e}", passed, where),
        Row(f"{_NAME}: greedy tokens equal", value, "all but near ties", near, different),
    )


def _compare_tokenizers(tokenizer: Tokenizer, llama: LlamaCpp, strings: Sequence[str]) -> Row:
    expected = [[*tokenizer.prompt_start, *ids] for ids in tokenizer.encode_batch(list(strings))]
    found = [llama.encode(text) for text in strings]
    wrong = [index for index, ids in enumerate(expected) if found[index] != ids]
    detail = ""
    if wrong:
        first = wrong[0]
        detail = f"{strings[first]!a}: {found[first]}, not {expected[first]}"
    value = f"{len(strings) - len(wrong):,} of {len(strings):,}"
    return Row(f"{_NAME}: strings encoded equally", value, "all", not wrong, detail)
