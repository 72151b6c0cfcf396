"""The batch: the interface between the data pipeline and the model."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """The input of one update ([A, B, T]) or one evaluation step ([B, T]).

    Attributes:
        inputs: token ids, int32.
        targets: the token that follows each input, int32.
        weights: 1 for counted targets, 0 for padding and overlap, float32.
        segments: index of each input's document within its window, from 0, int32; attention and
            positions then stop at document boundaries. None disables document masking.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray | None = None
