"""Verifies an exported Hugging Face directory: files, logits, greedy tokens and tokenizer.

The written files are read back by `HubReference`, which shares no code with the export, and by
transformers where it is installed.

Alphabet: T tokens of a text, V vocabulary.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from sheepop_jax.checkpoint.run import Run
from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import NO_END, generate
from sheepop_jax.generation.requests import GenerationConfig, SamplingConfig
from sheepop_jax.interop.families import HubModel, for_export
from sheepop_jax.interop.hub_config import write_config
from sheepop_jax.interop.hub_tensors import tensors
from sheepop_jax.interop.reference import HubReference
from sheepop_jax.interop.safetensors_files import DTYPES, WeightFiles
from sheepop_jax.interop.transformers_model import (
    Logits,
    NotCompared,
    NotReadable,
    one_line,
    transformers_model,
)
from sheepop_jax.interop.verification import Row, VerificationReport
from sheepop_jax.interop.verification_text import Texts, special_texts, strings_of, texts_of
from sheepop_jax.model.transformer import Transformer, output_embedding, unembed

# Of the largest logit. Both sides have the weights of the file; only ours computes in float32.
LOGIT_LIMIT = 1e-4
KL_LIMIT = 1e-6  # nats per token
# Nats per token that rounding the weights costs, by type of the file.
ROUNDING_LIMITS = {"F16": 1e-4, "BF16": 1e-2}


def verify_hf(run: Run, params: Mapping[str, Any], directory: Path) -> VerificationReport:
    """Compares a written directory with the run that it was exported from. Deletes nothing.

    Logits and greedy tokens are compared with our model after rounding its parameters to the type
    of the file, so that the limits are those of float32 for every type; what rounding costs is a
    row of its own.

    Args:
        run: the run.
        params: the parameters that were exported: a nested dict of fp32 arrays.
        directory: the directory.

    Raises:
        InputError: the run's model has no Hugging Face architecture.
    """
    hub = for_export(run.config.model, run.model().vocab_size)
    # TF32 and bfloat16 multiplication, the defaults of GPUs and TPUs, would hide small errors.
    with jax.default_matmul_precision("highest"):
        return _verify(run, params, Path(directory), hub)


def _verify(
    run: Run, params: Mapping[str, Any], directory: Path, hub: HubModel
) -> VerificationReport:
    try:
        files = WeightFiles(directory)
    except InputError as error:
        return VerificationReport((_failure("weights", error),))
    kind = _kind(files, hub)
    rows = [_config_row(directory, hub), _tensors_row(files, params, hub, kind)]
    model = run.model()
    rounded = jax.tree.map(lambda x: jnp.asarray(_round(np.asarray(x), kind)), params)
    texts = _with_greedy(model, rounded, texts_of(run, params))
    ours = partial(_our_logits, model, rounded)
    notes = [f"text: {texts.source}"]

    try:
        reference = HubReference(directory)
        rows += _compare(
            "float64 reader", ours, lambda ids: next(reference.logits(ids[None])), texts
        )
    except InputError as error:
        rows.append(_failure("float64 reader", error))
    rows += _transformers_rows(directory, ours, texts, notes)
    if kind != "F32":
        exact = partial(_our_logits, model, params)
        rows.append(_rounding_row(kind, exact, ours, texts))
    rows.append(_tokenizer_row(run, directory, texts, notes))
    return VerificationReport(tuple(rows), tuple(notes))


def _failure(name: str, error: Exception) -> Row:
    line = " ".join(str(error).split())
    return Row(name, "not readable", "", False, line[:300])


def _kind(files: WeightFiles, hub: HubModel) -> str:
    """The type of the file's weights: a key of `DTYPES`. Tensors of another differ."""
    first = tensors(hub)[0].name
    kind = files.tensors[first].dtype if first in files.tensors else "F32"
    return kind if kind in DTYPES else "F32"


def _round(x: np.ndarray, kind: str) -> np.ndarray:
    return x.astype(DTYPES[kind]).astype(np.float32)


def _config_row(directory: Path, hub: HubModel) -> Row:
    """Whether config.json has every key that the computation depends on, with its value."""
    expected = write_config(hub)
    try:
        found = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        different = [
            f"{key} is {_shown(found, key)}, not {value!r}"
            for key, value in expected.items()
            if key not in found or found[key] != value
        ]
    except (OSError, ValueError, TypeError) as error:
        return _failure("config.json", error)
    equal = f"{len(expected) - len(different)} of {len(expected)} keys"
    return Row("config.json", equal, "all", not different, "; ".join(different[:3]))


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "missing"


def _tensors_row(files: WeightFiles, params: Mapping[str, Any], hub: HubModel, kind: str) -> Row:
    """Whether every tensor holds its parameters, bit for bit after rounding."""
    expected = tensors(hub)
    different: list[str] = []
    for tensor in expected:
        info = files.tensors.get(tensor.name)
        if info is None:
            different.append(f"{tensor.name} is missing")
        elif info.dtype != kind:
            different.append(f"{tensor.name} is {info.dtype}, not {kind}")
        elif info.shape != tensor.shape:
            different.append(f"{tensor.name} is {list(info.shape)}, not {list(tensor.shape)}")
        else:
            wanted = tensor.pack(params).astype(DTYPES[kind])
            stored = files.load(tensor.name)
            bits = f"u{wanted.itemsize}"
            wrong = int(np.sum(stored.view(bits) != wanted.view(bits)))
            if wrong:
                different.append(f"{tensor.name}: {wrong} of {wanted.size} values differ")
    extra = sorted(files.tensors.keys() - {tensor.name for tensor in expected})
    equal = f"{len(expected) - len(different)} of {len(expected)} equal ({kind})"
    different += [f"{name} is not a tensor of the model" for name in extra]
    more = f" (and {len(different) - 3} more)" if len(different) > 3 else ""
    detail = "; ".join(different[:3]) + more
    return Row("tensors", equal, "all", not different, detail)


@partial(jax.jit, static_argnums=0)
def _forward(model: Transformer, params: Any, ids_BT: jax.Array) -> jax.Array:
    hidden_BTD, _ = model.apply({"params": params}, ids_BT)
    logits_BTV = unembed(
        hidden_BTD, output_embedding(params), model.vocab_size, model.config.logit_softcap
    )
    return logits_BTV[..., : model.vocab_size]


def _our_logits(model: Transformer, params: Any, ids_T: np.ndarray) -> np.ndarray:
    [logits_TV] = np.asarray(_forward(model, params, jnp.asarray(ids_T[None])), np.float64)
    return np.asarray(logits_TV)


def _with_greedy(model: Transformer, params: Any, texts: Texts) -> Texts:
    """Replaces the last tokens of each text by those that our engine writes, greedily."""
    greedy = GenerationConfig(SamplingConfig(temperature=0), max_new_tokens=texts.new_tokens)
    prompts = [ids_T[: len(ids_T) - texts.new_tokens].tolist() for ids_T in texts.ids]
    # The long text in a batch of its own: a batch is padded to its longest prompt.
    written = [
        completion
        for _, group in groupby(prompts, len)
        for completion in generate(model, params, list(group), NO_END, greedy)
    ]
    whole = [p + completion.tokens for p, completion in zip(prompts, written, strict=True)]
    return replace(texts, ids=tuple(np.array(ids, np.int32) for ids in whole))


@dataclass
class _Sums:
    """Differences of the logits over all texts."""

    largest: float = 0.0
    difference: float = 0.0
    kl: float = 0.0
    tokens: int = 0
    greedy: int = 0
    equal: int = 0
    gaps: list[float] = field(default_factory=list)

    def add(self, ours_TV: np.ndarray, theirs_TV: np.ndarray) -> None:
        """Adds one text; KL(ours || theirs)."""
        difference = float(np.max(np.abs(ours_TV - theirs_TV)))
        self.difference = max(self.difference, difference if np.isfinite(difference) else np.inf)
        self.largest = max(self.largest, float(np.max(np.abs(theirs_TV))))
        p_TV, q_TV = _log_softmax(ours_TV), _log_softmax(theirs_TV)
        self.kl += float(np.sum(np.exp(p_TV) * (p_TV - q_TV)))
        self.tokens += len(ours_TV)

    def add_greedy(self, ids_N: np.ndarray, theirs_NV: np.ndarray) -> None:
        """Adds our greedy tokens and the logits from which they would choose each."""
        chosen_N = theirs_NV.argmax(-1)
        best_N = np.take_along_axis(theirs_NV, chosen_N[:, None], -1)[:, 0]
        ours_N = np.take_along_axis(theirs_NV, ids_N[:, None], -1)[:, 0]
        self.greedy += len(ids_N)
        self.equal += int(np.sum(chosen_N == ids_N))
        self.gaps += (best_N - ours_N)[chosen_N != ids_N].tolist()


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted_TV = logits_TV - logits_TV.max(-1, keepdims=True)
    return np.asarray(shifted_TV - np.log(np.exp(shifted_TV).sum(-1, keepdims=True)))


def _compare(name: str, ours: Logits, theirs: Logits, texts: Texts) -> Iterator[Row]:
    """Compares two models on all texts; both see our greedy tokens."""
    sums = _Sums()
    for ids_T in texts.ids:
        ours_TV, theirs_TV = ours(ids_T), theirs(ids_T)
        if theirs_TV.shape != ours_TV.shape:
            tokens, wanted = theirs_TV.shape[-1], ours_TV.shape[-1]
            yield Row(f"{name}: vocabulary", f"{tokens} tokens", f"{wanted} tokens", False)
            return
        sums.add(ours_TV, theirs_TV)
        start = len(ids_T) - texts.new_tokens
        sums.add_greedy(ids_T[start:], theirs_TV[start - 1 : -1])
    error = sums.difference / max(sums.largest, 1e-30)
    yield _number(f"{name}: max relative logit error", error, LOGIT_LIMIT)
    yield _number(f"{name}: mean KL per token (nats)", sums.kl / sums.tokens, KL_LIMIT)
    # Two logits this close may change places within the limit of the logits' error.
    near = sum(gap <= 2 * LOGIT_LIMIT * sums.largest for gap in sums.gaps)
    value = f"{sums.equal} of {sums.greedy}"
    value += f", {near} near ties" if near else ""
    passed = sums.equal + near == sums.greedy
    yield Row(f"{name}: greedy tokens equal", value, "all but near ties", passed)


def _number(name: str, value: float, limit: float) -> Row:
    shown = 0.0 if abs(value) < 1e-15 else value  # KL of equal distributions rounds to either sign
    return Row(name, f"{shown:.1e}", f"{limit:.0e}", bool(value <= limit))


def _rounding_row(kind: str, exact: Logits, rounded: Logits, texts: Texts) -> Row:
    sums = _Sums()
    for ids_T in texts.ids:
        sums.add(exact(ids_T), rounded(ids_T))
    name = f"rounding to {DTYPES[kind]}: mean KL per token (nats)"
    return _number(name, sums.kl / sums.tokens, ROUNDING_LIMITS[kind])


def _transformers_rows(
    directory: Path, ours: Logits, texts: Texts, notes: list[str]
) -> Iterator[Row]:
    try:
        name, theirs, unused = transformers_model(directory)
    except NotCompared as error:
        notes.append(str(error))
        return
    except NotReadable as error:
        yield _failure(error.name, error)
        return
    if unused:
        yield Row(f"{name}: tensors", "differ", "all used", False, unused[:300])
    try:
        yield from _compare(name, ours, theirs, texts)
    except MemoryError as error:
        notes.append(f"{name}: not compared ({one_line(error)})")
    except Exception as error:  # whatever transformers raises is the result of this check
        yield _failure(name, error)


def _tokenizer_row(run: Run, directory: Path, texts: Texts, notes: list[str]) -> Row:
    """Whether the written tokenizer encodes 1,000 strings as the run's does."""
    strings = strings_of(run.tokenizer, texts.ids)
    try:
        written = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        # As transformers does: it is not stored in tokenizer.json.
        written.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    except Exception as error:  # the library raises plain Exception
        return _failure("tokenizer", error)
    if not written.encode_special_tokens:
        specials = special_texts(run.tokenizer)
        strings = [text for text in strings if not any(special in text for special in specials)]
        notes.append("tokenizer: not compared on special tokens, which the written one parses")
    first = ""
    equal = 0
    for text in strings:
        wanted, found = run.tokenizer.encode_prompt(text), written.encode(text).ids
        equal += wanted == found
        if wanted != found and not first:
            first = f"{text[:60]!r} is {_ids(found)}, not {_ids(wanted)}"
    passed = equal == len(strings) and equal > 0
    return Row("tokenizer: strings equal", f"{equal:,} of {len(strings):,}", "all", passed, first)


def _ids(ids: list[int]) -> str:
    return str(ids) if len(ids) <= 12 else f"{str(ids[:12])[:-1]}, ...]"
