"""nanoGPT's CPU recipe for Tiny Shakespeare in PyTorch, as a whole process for `time_to_loss.py`.

    python -m benchmarks.lib.nanogpt FILE

4 layers of 128, batches of 12 x 64, 2,000 steps of AdamW (100 warmup steps, cosine decay from 1e-3
to 1e-4, b2 0.99, weight decay 0.1, clipping at 1), no dropout. Prints the validation loss of the
last tenth, in windows of 64.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.lib.peers import adamw, make
from benchmarks.lib.shapes import SHAPES

STEPS, WARMUP, PEAK, FLOOR = 2000, 100, 1e-3, 1e-4


def main() -> None:
    """Trains and prints the validation loss."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    text = parser.parse_args().file.read_text()
    ids = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.from_numpy(np.array([ids[character] for character in text]))
    split = int(len(tokens) * 0.9)
    train, validation = tokens[:split], tokens[split:]
    shape = SHAPES["small"]
    model = make("plain", shape, shape.time)
    optimizer = adamw(model, PEAK, 0.99, 0.1)
    for step in range(STEPS):
        share = (step - WARMUP) / (STEPS - WARMUP)
        cosine = FLOOR + 0.5 * (1 + math.cos(math.pi * share)) * (PEAK - FLOOR)
        rate = PEAK * (step + 1) / (WARMUP + 1) if step < WARMUP else cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - shape.time - 1, (shape.batch,))
        windows = torch.stack([train[s : s + shape.time + 1] for s in starts.tolist()])
        loss(model, windows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    with torch.inference_mode():
        count = (len(validation) - 1) // shape.time
        starts = shape.time * torch.arange(count)
        windows = validation[starts[:, None] + torch.arange(shape.time + 1)]
        total = sum(float(loss(model, part)) * len(part) for part in windows.split(128))
    print(f"{total / count:.4f}")


def loss(model: torch.nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of windows [B, T + 1]."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


if __name__ == "__main__":
    main()
