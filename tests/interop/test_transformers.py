"""What the other tests have recorded, once more with transformers itself; `make soak` runs it.

It needs torch and transformers, which `requirements/bench.txt` has.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import base
from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.config.schema import Config
from sheepop_jax.data.chat_template import render_chat
from sheepop_jax.data.tokenizer import ChatSettings, Tokenizer
from sheepop_jax.interop.export_hf import export_hf
from sheepop_jax.interop.import_hf import import_hf, logits_of
from sheepop_jax.interop.transformers_model import transformers_model
from sheepop_jax.interop.verify import verify_hf

pytestmark = [
    pytest.mark.slow,
    # Of torch and transformers themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
pytest.importorskip("torch", reason="needs torch and transformers")
pytest.importorskip("transformers", reason="needs torch and transformers")

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"


def test_the_recorded_models_are_what_transformers_computes():
    words = [sys.executable, str(HERE / "make_golden.py"), "--check"]
    shown = subprocess.run(words, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    cases = [path.name for path in GOLDEN.iterdir() if path.is_dir()]
    for case in cases:
        assert f"{case}: sdpa float32 is within" in shown.stdout


def test_transformers_computes_an_exported_run(tiny_root, tmp_path, fast_compile_once):
    run = open_run(tiny_root / "run")
    params, step = run.params()
    export_hf(run, params, step, tmp_path / "out")
    report = verify_hf(run, params, tmp_path / "out")
    assert report.passed, report.table()
    rows = [row.name for row in report.rows if row.name.startswith("transformers ")]
    assert len(rows) == 3, report.notes
    _, logits, unused = transformers_model(tmp_path / "out")
    ids_BT = np.random.default_rng(0).integers(0, run.vocab_size, (2, 9), np.int32)
    expected_BTV = np.stack([logits(ids_T) for ids_T in ids_BT])
    error = np.abs(logits_of(run, ids_BT) - expected_BTV).max()
    assert error < 1e-5 * np.abs(expected_BTV).max() and not unused


@pytest.mark.parametrize("case", ["gpt2", "llama_rope_linear", "llama_rope_llama3", "qwen2"])
def test_an_import_is_verified_by_transformers(case, tmp_path, fast_compile_once):
    defaults = Config.from_dict(base.get_config())
    _, verified = import_hf(GOLDEN / case, tmp_path / "run", defaults)
    assert not verified.notes
    ours, theirs = verified.results
    assert theirs.reference.startswith("transformers ") and theirs.positions == ours.positions
    assert theirs.max_error < 1e-5 and theirs.same_token == theirs.positions


def test_an_exported_chat_model_is_one_in_transformers(tiny_root, tmp_path, fast_compile_once):
    """It renders, encodes and ends a conversation as we do."""
    import torch
    import transformers

    recorded: dict[str, Any] = json.loads((HERE / "chat_templates.json").read_text("utf-8"))
    directory, out = tmp_path / "run", tmp_path / "out"
    import_hf(GOLDEN / "qwen2", directory, Config.from_dict(base.get_config()), verify=False)
    plain = open_run(directory).tokenizer
    chat = ChatSettings(("<|im_end|>",), recorded["templates"]["qwen"], {"eos_token": "<|im_end|>"})
    own = Tokenizer.with_stream_tokens(plain.to_json(), None, "<|endoftext|>", chat=chat)
    (directory / "tokenizer.json").write_text(own.to_json(), encoding="utf-8")
    run = open_run(directory)
    params, step = run.params()
    export_hf(run, params, step, out)
    report = verify_hf(run, params, out)
    assert report.passed, report.table()
    # AutoTokenizer would build Qwen2's own (docs/interop.md).
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    for messages in recorded["conversations"]:
        text = render_chat(own.chat_template or "", messages, True, own.special_tokens)
        found = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert found == text
    [ids] = theirs.apply_chat_template(
        [recorded["conversations"][0]], add_generation_prompt=True, return_dict=False
    )
    turn = [own.encode("user\nHello"), own.encode("\n"), own.encode("assistant\n")]
    begin, end = own._inner.token_to_id("<|im_start|>"), own.end_ids[1]
    assert ids[-len(turn[0]) - len(turn[1]) - len(turn[2]) - 3 :] == [
        begin, *turn[0], end, *turn[1], begin, *turn[2],
    ]  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.generation_config.eos_token_id == list(own.end_ids)
    for last in own.end_ids:
        biased = model.generate(
            torch.tensor([ids]), max_new_tokens=4, do_sample=False, sequence_bias={(last,): 1e6}
        )
        assert biased[0].tolist() == [*ids, last]
