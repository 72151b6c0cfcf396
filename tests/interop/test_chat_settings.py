"""The chat template and the tokens that end a turn go from model files to a run and back."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import base
from sheepop_jax.checkpoint.run import Run, open_run
from sheepop_jax.config.schema import Config
from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.interop.export_hf import export_hf
from sheepop_jax.interop.hub_tokenizer import read_tokenizer
from sheepop_jax.interop.import_hf import import_hf
from sheepop_jax.interop.verification_text import Texts
from sheepop_jax.interop.verify import _tokenizer_row

pytestmark = pytest.mark.usefixtures("fast_compile")

HERE = Path(__file__).parent
TEMPLATE = json.loads((HERE / "chat_templates.json").read_text(encoding="utf-8"))["templates"][
    "qwen"
]
DEFAULTS = Config.from_dict(base.get_config())
TURN = "<|im_end|>"  # 298 in Qwen's recorded tokenizer, where <|endoftext|> is 296


def hub(tmp_path: Path, case: str, **files: dict[str, Any]) -> Path:
    """A copy of a recorded model, with keys of its JSON files changed."""
    directory = tmp_path / "hub"
    shutil.copytree(HERE / "golden" / case, directory)
    for name, values in files.items():
        path = directory / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8")) | values
        path.write_text(json.dumps(found), encoding="utf-8")
    return directory


def read(directory: Path) -> Tokenizer:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return read_tokenizer(directory, config, config["vocab_size"])


@pytest.mark.parametrize(
    ("config", "generation", "token", "ends"),
    [
        (298, 298, TURN, [296, 298]),  # the model's own
        (296, [298, 296], "<|endoftext|>", [296, 298]),
        ([298, 297], 7, None, [296, 298, 297, 7]),
        (7, [297, 8], TURN, [296, 298, 7, 297, 8]),  # first the tokenizer's eos_token
        (296, 296, {"content": "<|im_start|>"}, [296, 297]),
        (296, 296, "<|not one|>", [296]),
        (None, None, None, [296]),
    ],
)
def test_all_that_ends_a_text_is_read(config, generation, token, ends, tmp_path):
    directory = hub(
        tmp_path,
        "qwen2",
        config={"eos_token_id": config},
        generation_config={"eos_token_id": generation},
        tokenizer_config={"eos_token": token},
    )
    tokenizer = read(directory)
    assert tokenizer.end_ids == tuple(ends) and tokenizer.end_of_text == ends[0]
    assert Tokenizer.from_json(tokenizer.to_json()).end_ids == tuple(ends)


def test_the_first_of_llama_s_list_is_end_of_text(tmp_path):
    """As in Llama 3's chat models: end of text, of a message, of a turn; the tokenizer's: 305."""
    ends = {"eos_token_id": [302, 304, 305]}
    directory = hub(
        tmp_path,
        "llama_rope_llama3",
        config=ends,
        generation_config=ends,
        tokenizer_config={"eos_token": "<|eot_id|>"},
    )
    tokenizer = read(directory)
    assert (tokenizer.end_ids, tokenizer.bos_id) == ((302, 305, 304), 301)


@pytest.mark.parametrize(
    ("value", "file", "expected"),
    [
        ("{{ 1 }}\n", None, "{{ 1 }}\n"),
        ("{{ 1 }}", "{{ 2 }}\n", "{{ 2 }}\n"),
        (None, "{{ 2 }}", "{{ 2 }}"),
        ([{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}], None, "y"),
        ([{"name": "tool", "template": "x"}], None, None),
        (None, None, None),
    ],
)
def test_a_template_is_kept_as_it_is(value, file, expected, tmp_path):
    directory = hub(tmp_path, "qwen2", tokenizer_config={"chat_template": value})
    if file is not None:
        (directory / "chat_template.jinja").write_text(file, encoding="utf-8")
    tokenizer = read(directory)
    assert tokenizer.chat_template == expected
    # The names of a template's variables are those of the model, where there is a template.
    eos = "<|endoftext|>" if expected is None else TURN
    assert tokenizer.special_tokens["eos_token"] == eos
    assert ("pad_token" in tokenizer.special_tokens) == (expected is not None)


def test_a_template_that_is_not_text_is_refused(tmp_path):
    for number, value in enumerate((7, {"default": "x"}, [{"name": "default", "template": 7}])):
        directory = hub(tmp_path / str(number), "qwen2", tokenizer_config={"chat_template": value})
        with pytest.raises(
            InputError, match=r"tokenizer_config\.json: chat_template: got"
        ) as caught:
            read(directory)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Qwen's recorded model as one for conversations, imported."""
    root = tmp_path_factory.mktemp("chat")
    directory = hub(
        root,
        "qwen2",
        generation_config={"eos_token_id": [298, 296, 7]},
        tokenizer_config={"chat_template": TEMPLATE},
    )
    import_hf(directory, root / "run", DEFAULTS, verify=False)
    return open_run(root / "run")


def test_export_and_import_keep_the_settings(chat_run, tmp_path):
    own, out = chat_run.tokenizer, tmp_path / "out"
    assert (own.end_ids, own.chat_template) == ((296, 298, 7), TEMPLATE)
    params, step = chat_run.params()
    export_hf(chat_run, params, step, out)
    written = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in out.glob("*.json")
    }
    assert written["generation_config"]["eos_token_id"] == [296, 298, 7]
    assert written["config"]["eos_token_id"] == 296
    options = written["tokenizer_config"]
    assert options["chat_template"] == TEMPLATE
    assert options["eos_token"] == TURN and options["pad_token"] == "<|endoftext|>"
    # transformers encodes what the template rendered as any text.
    assert options["split_special_tokens"] is False
    assert (
        TEMPLATE not in json.dumps(written["tokenizer"])
        and not written["tokenizer"]["post_processor"]
    )
    import_hf(out, tmp_path / "run", DEFAULTS, verify=False)
    again = open_run(tmp_path / "run").tokenizer
    assert (again.end_ids, again.chat_template) == (own.end_ids, own.chat_template)
    assert again.special_tokens == own.special_tokens
    assert "bos_token" not in own.special_tokens


def test_the_tokenizer_of_a_chat_model_is_verified_without_special_texts(chat_run, tmp_path):
    params, step = chat_run.params()
    export_hf(chat_run, params, step, tmp_path / "out")
    notes: list[str] = []
    ids = np.array(chat_run.tokenizer.encode("the sheep sleeps in a green field"), np.int32)
    row = _tokenizer_row(chat_run, tmp_path / "out", Texts((ids,), 1, ""), notes)
    assert row.passed, row.detail
    assert notes == ["tokenizer: not compared on special tokens, which the written one parses"]


def test_several_ends_without_a_template_are_kept_too(tmp_path):
    """The tokenizer's files stay those of a model that continues text."""
    directory = hub(tmp_path, "qwen2", generation_config={"eos_token_id": [298, 296]})
    import_hf(directory, tmp_path / "run", DEFAULTS, verify=False)
    run = open_run(tmp_path / "run")
    params, step = run.params()
    export_hf(run, params, step, tmp_path / "out")
    options = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert options["split_special_tokens"] is True and "chat_template" not in options
    assert options["eos_token"] == "<|endoftext|>"
    assert read(tmp_path / "out").end_ids == run.tokenizer.end_ids == (296, 298)
