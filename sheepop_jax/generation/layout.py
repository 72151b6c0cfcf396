"""Prompts of any length → arrays of few shapes, so that one compile serves many requests.

Alphabet: P prompts, T prompt bucket.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sheepop_jax.generation.requests import SamplingConfig

SMALLEST_BUCKET = 16


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Request:
    """What is asked for, as arrays; none of their values is compiled in.

    Attributes:
        prompts_PT: int32, left-padded.
        start_P: int32, slot of each prompt's first token.
        hash_P: uint32, of each prompt's tokens.
        limit_P: int32, at least 1 and at most N: new tokens allowed.
        seed: uint32 scalar.
        end_of_text: int32 scalar.
        temperature: fp32 scalar; top_k: int32 scalar; top_p: fp32 scalar.
    """

    prompts_PT: Any
    start_P: Any
    hash_P: Any
    limit_P: Any
    seed: Any
    end_of_text: Any
    temperature: Any
    top_k: Any
    top_p: Any


def bucket(length: int, context: int) -> int:
    """The length rounded up to a power of two, the context at most."""
    power = max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())
    return max(length, min(power, context))


def build_request(
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    *,
    context: int,
    sampling: SamplingConfig,
    seed: int,
    end_of_text: int,
) -> Request:
    """Lays out prompts (none empty) as a numpy `Request`, padded to one bucket."""
    slots = bucket(max(map(len, prompts)), context)
    prompts_PT = np.zeros((len(prompts), slots), np.int32)
    for row, ids in zip(prompts_PT, prompts, strict=True):
        row[slots - len(ids) :] = ids
    return Request(
        prompts_PT=prompts_PT,
        start_P=np.array([slots - len(ids) for ids in prompts], np.int32),
        hash_P=np.array([zlib.crc32(np.array(ids, "<u4").tobytes()) for ids in prompts], np.uint32),
        limit_P=np.array(limits, np.int32),
        seed=np.uint32(seed),
        end_of_text=np.int32(end_of_text),
        temperature=np.float32(sampling.fp32_temperature),
        top_k=np.int32(min(sampling.top_k, np.iinfo(np.int32).max)),
        top_p=np.float32(sampling.top_p),
    )
