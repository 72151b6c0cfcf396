"""Sends a run's metrics to Weights & Biases, in a process of its own (see `trackers`).

Reads JSON lines from standard input: first the run, then one line for each log line. Its end is the
end of the run. With `--check`, only checks the login. Imports nothing of the project.
"""

import html
import json
import os
import sys

import wandb


def check() -> int:
    """Returns 0 if metrics can be sent, or are kept on disk, and 1 without a login."""
    if wandb.setup().settings.mode in ("offline", "disabled"):  # by environment or settings
        return 0
    try:
        # Standard input is no terminal: without a key this raises instead of asking for one.
        return 0 if wandb.login(verify=False) else 1
    except wandb.Error:
        return 1


def main() -> None:
    """Sends every line of standard input."""
    about = json.loads(sys.stdin.readline())
    settings = wandb.Settings(console="off", silent=True)
    project = os.environ.get("WANDB_PROJECT", "sheepop_jax")
    run = wandb.init(project=project, resume="allow", settings=settings, **about)
    run.define_metric("*", step_metric="step")
    for line in sys.stdin:
        values = json.loads(line)
        if "sample" in values:
            values["sample"] = wandb.Html(f"<pre>{html.escape(values['sample'])}</pre>")
        run.log({key: value for key, value in values.items() if value is not None})
    run.finish()


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit(check())
    main()
