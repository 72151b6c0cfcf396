"""lm-evaluation-harness through the server against the adapter, which calls the model directly."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.interop.lm_eval import Adapter, harness_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fast_compile")]

ROOT = Path(__file__).resolve().parent.parent.parent
CONTEXT = 32  # of the run
SENT = CONTEXT - 1  # the most tokens that the harness sends: it leaves one for the new token
TASKS = {
    "choices": """\
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
""",
    "written": """\
task: written
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{choices[label]}}}}"
generation_kwargs:
  until: ["\\n"]
  max_gen_toks: 6
  do_sample: true
  temperature: 1.0
metric_list:
  - metric: exact_match
""",
    "whole": """\
task: whole
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{long}}}}"
metric_list:
  - metric: byte_perplexity
""",
}


@pytest.fixture(scope="module")
def url(tiny_root: Path) -> Iterator[str]:
    """The address of a server of the tiny run."""
    for package in ("lm_eval", "tenacity", "aiohttp", "uvicorn"):
        pytest.importorskip(package)
    words = ["serve", "--ckpt", str(tiny_root / "run"), "--port", "0", "--platform", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-m", "sheepop_jax", *words],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serving (http://127\.0\.0\.1:\d+)", line):
                break
        else:
            pytest.fail("the server ended: " + "".join(lines))
        rest = threading.Thread(target=process.stderr.read)  # so that the pipe never fills up
        rest.start()
        try:
            yield found[1]
        finally:
            process.terminate()
            rest.join()
    assert process.returncode == 0


@pytest.fixture(params=[(1, 1), (4, 3)], ids=["one_by_one", "four_batches_of_three_at_once"])
def served(url: str, request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The harness's own client of the server."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    num_concurrent, batch_size = request.param
    model = LocalCompletionsAPI(
        base_url=f"{url}/v1/completions",
        model="run",
        tokenizer_backend="remote",
        max_length=CONTEXT,
        num_concurrent=num_concurrent,
        batch_size=batch_size,
        max_retries=1,
        seed=0,  # as the adapter
    )
    yield model
    model.tokenizer.session.close()


@pytest.fixture(scope="module")
def make_adapter(tiny_root: Path) -> Any:
    """`make_adapter(context)`: the tiny run without a server."""
    run = open_run(tiny_root / "run")
    params, _ = run.params()
    return lambda context: Adapter(run.model(), params, run.tokenizer, context, 4)


def test_tokenizers_agree(served, make_adapter):
    tokenizer = make_adapter(CONTEXT).tokenizer
    assert served.eot_token_id == served.prefix_token_id == tokenizer.end_of_text
    for text in ("line 7 says 49\n", " says", "\u00e9"):
        assert served.tok_encode(text) == tokenizer.encode(text)
        assert served.tokenizer.decode(tokenizer.encode(text)) == text


def test_log_likelihoods_are_those_of_the_adapter(served, make_adapter):
    adapter = make_adapter(CONTEXT)
    tokenizer = adapter.tokenizer
    draw = np.random.default_rng(3)
    texts = [("line 3 says", " 9\n"), ("line", "s"), ("line 7 says 49\nline 8", " says 64\n")]
    pairs = [(tokenizer.encode(before), tokenizer.encode(after)) for before, after in texts]
    for lengths in ((1, 1), (5, 3), (30, 1), (28, 9), (60, 4), (1, 30), (9, 2)):
        pairs.append(tuple(draw.integers(0, tokenizer.vocab_size, n).tolist() for n in lengths))
    # The harness drops the beginning of what is too long.
    kept = [(before[-(SENT - len(after)) :], after) for before, after in pairs]
    for before, _ in kept[:4]:  # continuations that greedy decoding writes
        text = list(before)
        for _ in range(2):
            options = [([*text], [token]) for token in range(tokenizer.vocab_size)]
            found = adapter.log_likelihoods(options)
            text.append(max(range(len(found)), key=lambda i: found[i][0]))
        kept.append((before, text[len(before) :]))
        pairs.append(kept[-1])
    wanted = adapter.log_likelihoods(kept)
    answers = served._loglikelihood_tokens([(None, *pair) for pair in pairs])
    np.testing.assert_allclose([p for p, _ in answers], [p for p, _ in wanted], atol=1e-5)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in wanted]
    assert {greedy for _, greedy in wanted} == {True, False}


def test_tasks_have_the_results_of_the_adapter(served, make_adapter, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    rows = [
        {
            "text": f"line {i} says",
            "choices": [f" {i * i}\n", f" {i + 1}\n", " line says\n"],
            "label": i % 3,
            "long": "".join(f"line {n} says {n * n}\n" for n in range(i, i + 1 + i % 5)),
        }
        for i in range(12)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def samples(model: Any, tasks: list[str]) -> dict[str, list[Any]]:
        """Task → what the model answered for each row, in the order of the rows."""
        found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
        return {
            task: [row["resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]
            for task, rows in found["samples"].items()
        }

    answers = samples(served, list(TASKS))
    # The harness's windows of a whole text are two tokens shorter than `max_length`.
    wanted = samples(harness_model(make_adapter(CONTEXT - 2)), ["whole"])
    wanted |= samples(harness_model(make_adapter(CONTEXT)), ["choices", "written"])
    assert len(set(map(str, wanted["written"]))) > len(rows) / 2
    assert answers["written"] == wanted["written"]
    for task in ("choices", "whole"):
        found = [np.array(row, float) for row in (answers[task], wanted[task])]
        assert found[0].shape == found[1].shape and found[0].shape[0] == len(rows)
        np.testing.assert_allclose(*found, atol=1e-5)
