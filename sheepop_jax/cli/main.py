"""Dispatches commands by name; each module is imported only when its command runs."""

import argparse
import sys

from sheepop_jax.cli.common import EXIT_BAD_INPUT, command, execute, leave_on_interrupt

USAGE = """\
usage: sheepop-jax COMMAND [flags]   (or python -m sheepop_jax COMMAND)

Train decoder-only language models from raw text and generate text.

commands:
  train        train a model or resume a run (same as train.py)
  sample       generate text with a trained model (same as sample.py)
  evaluate     loss, perplexity, bits per byte and accuracy on validation text
  bench        decoding speed with and without the key/value cache
  data         preprocess a corpus and print statistics and samples
  plan         estimate memory, FLOPs and time of a run
  checkpoints  list, verify and delete the checkpoints of a run
  export       write a run for transformers, vLLM, llama.cpp or Ollama
  import       make a run from a Hugging Face model directory
  serve        answer HTTP requests with a run (OpenAI-compatible)
  doctor       report versions, devices and performance problems

examples:
  sheepop-jax train --config quickstart
  sheepop-jax train --workdir runs/quickstart --config.train.num_steps=3000
  sheepop-jax sample --ckpt runs/quickstart --prompt "def main"
  sheepop-jax plan --config gpt2_124m --devices 8 --device H100

Run sheepop-jax COMMAND --help for the flags of a command.
exit codes: 0 done, 1 failed, 2 bad input, 75 stopped by a signal after saving, 130 Ctrl-C"""

COMMANDS = (
    "train",
    "sample",
    "evaluate",
    "bench",
    "data",
    "plan",
    "checkpoints",
    "export",
    "import",
    "serve",
    "doctor",
)
# Commands that save or clean up on an interrupt; the others stop immediately.
_HANDLE_INTERRUPTS = ("train", "data", "evaluate", "export", "import", "serve")


def main(argv: list[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
        argv: the command and its flags. None uses `sys.argv` and makes Ctrl-C immediately stop the
            commands with nothing to save.
    """
    if argv is None:
        argv = sys.argv[1:]
        if argv[:1] and argv[0] not in _HANDLE_INTERRUPTS:
            leave_on_interrupt()
    name, flags = (argv[0], argv[1:]) if argv else ("", [])
    match name:
        case "train":
            from sheepop_jax.cli import train

            return train.main(flags)
        case "sample":
            from sheepop_jax.cli import sample

            return sample.main(flags)
        case "evaluate":
            from sheepop_jax.cli import evaluate

            return execute(evaluate.run, evaluate.parse(flags))
        case "bench":
            from sheepop_jax.cli import bench

            return execute(bench.run, bench.parse(flags))
        case "data":
            from sheepop_jax.cli import data

            return execute(data.run, *data.parse(flags))
        case "plan":
            from sheepop_jax.cli import plan

            return execute(plan.run, *plan.parse(flags))
        case "checkpoints":
            from sheepop_jax.cli import checkpoints

            return execute(checkpoints.run, checkpoints.parse(flags))
        case "export":
            from sheepop_jax.cli import export

            return execute(export.run, export.parse(flags))
        case "import":
            from sheepop_jax.cli import import_

            return execute(import_.run, import_.parse(flags))
        case "serve":
            from sheepop_jax.cli import serve

            return execute(serve.run, serve.parse(flags))
        case "doctor":
            from sheepop_jax.cli import doctor

            return execute(doctor.run, doctor.parse(flags))
        case "-h" | "--help" | "help":
            with command(argparse.Namespace(debug=False)):
                print(USAGE)
            return 0
    names = ", ".join(COMMANDS)
    print(f"error: command: got {name!r}; expected one of {names}; try --help", file=sys.stderr)
    return EXIT_BAD_INPUT
