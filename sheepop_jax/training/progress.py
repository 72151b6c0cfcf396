"""Training progress on stderr: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sheepop_jax.formatting import format_count, format_flops, format_seconds, printable
from sheepop_jax.training.run_log import only_in_file


class Progress:
    """Shows the training steps of one process."""

    def __init__(self, first_step: int, last_step: int, show: bool):
        self._last = last_step
        self._show = show
        self._bar = None
        self._open = contextlib.ExitStack()
        if show and sys.stderr.isatty():
            # Print log lines above the bar.
            self._open.enter_context(logging_redirect_tqdm())
            self._bar = tqdm(initial=first_step, total=last_step, unit="step", dynamic_ncols=True)

    def advance(self) -> None:
        """Counts one step."""
        if self._bar is not None:
            self._bar.update()

    def report(self, step: int, values: dict[str, Any], seconds_left: float) -> None:
        """Prints training metrics."""
        text = (
            f"step {step}/{self._last}  loss {values['loss']:.4f}  "
            f"lr {values['learning_rate']:.2e}  grad {values['grad_norm']:.2f}  "
            f"epoch {values['epoch']:.2f}  {format_count(values['tokens'])} tokens  "
            f"{values['tokens_per_second']:,.0f} tok/s  "
            f"{format_flops(values['flops_per_second'])}"
        )
        if values.get("mfu") is not None:
            text += f" ({values['mfu']:.0%} MFU)"
        self.line(f"{text}  {format_seconds(seconds_left)} left")

    def report_validation(
        self, step: int, figures: dict[str, float], took: float, train_seconds: float
    ) -> None:
        """Prints validation metrics."""
        bits = ""
        if "val_bits_per_byte" in figures:  # not where the tokenizer loses text
            bits = f"bits/byte {figures['val_bits_per_byte']:.4f}  "
        self.line(
            f"step {step}  validation: loss {figures['val_loss']:.4f}  "
            f"perplexity {figures['val_perplexity']:.2f}  "
            f"{bits}accuracy {figures['val_accuracy']:.1%}  "
            f"(took {took:.1f} s; train time {train_seconds:.1f} s)"
        )

    def line(self, text: str) -> None:
        """Prints a line above the bar, stripped of control characters that a model may generate."""
        text = printable(text)
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._show:
            print(text, file=sys.stderr, flush=True)
        if self._show:
            only_in_file.info("%s", text)

    def close(self) -> None:
        """Closes the bar and leaves it on screen."""
        if self._bar is not None:
            self._bar.close()
        self._open.close()
