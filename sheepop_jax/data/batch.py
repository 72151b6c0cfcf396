"""What a batch is; all that the model's side needs to know of the data."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """What one update ([A, B, T]) or one evaluation step ([B, T]) sees.

    Attributes:
        inputs: token ids, int32.
        targets: the token that follows each input, int32.
        weights: 1 where the target counts, 0 where it is padding or overlap, float32.
        segments: which document of its window each input belongs to, counted from 0, int32;
            attention and positions then stop at documents' borders. None: they do not.
    """

    inputs: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray | None = None
