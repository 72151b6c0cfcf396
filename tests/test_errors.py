"""Every error names its field and shows the value, in one line; and bad input leaves no trace."""

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest

from configs import base
from sheepop_jax.checkpoint.saver import CheckpointSaver
from sheepop_jax.config.schema import Config
from sheepop_jax.errors import InputError, masked
from tests.test_config import flat, with_value
from tests.tiny import SAYS, overrides, tiny

# A bad value of each field, and a part of its rule. Fields whose value needs a file or a device are
# refused for their type here, and for the rest below or where they are used.
FIELDS: list[tuple[str, Any, str]] = [
    ("seed", -1, "2**32"),
    ("seed", 2**32, "2**32"),
    ("model.d_model", 0, "at least 1"),
    ("model.num_layers", 0, "at least 1"),
    ("model.num_layers", 2.0, "type int"),
    ("model.num_layers", True, "type int"),
    ("model.num_heads", 7, "512 (model.d_model)"),
    ("model.num_heads", 0, "at least 1"),
    ("model.num_kv_heads", 3, "8 (model.num_heads)"),
    ("model.d_ff", -2, "at least 1"),
    ("model.max_seq_len", 0, "at least 1"),
    ("model.dropout", 1.0, "[0, 1)"),
    ("model.dropout", math.nan, "[0, 1)"),
    ("model.attention_dropout", -0.1, "[0, 1)"),
    ("model.activation", "gleu", "gelu"),
    ("model.norm", "batchnorm", "layernorm"),
    ("model.feed_forward", "swiglu", "gated"),
    ("model.head_dim", 7, "even head width"),
    ("model.partial_rotary", 0.0, "(0, 1]"),
    ("model.partial_rotary", 0.02, "even number"),
    ("model.rope_scaling", "yarn", "llama3"),
    ("model.rope_scaling_factor", 0.5, "at least 1"),
    ("model.rope_low_freq_factor", 0.0, "positive"),
    ("model.rope_high_freq_factor", 1.0, "more than 1.0"),
    ("model.rope_original_length", 0, "at least 1"),
    ("model.qkv_bias", 1, "type bool"),
    ("model.qk_norm", 1, "type bool"),
    ("model.parallel_residual", 1, "type bool"),
    ("model.sliding_window", -1, "at least 0"),
    ("model.logit_softcap", -1.0, "at least 0"),
    ("model.position", "rop", "rope"),
    ("model.rope_theta", 0.0, "positive"),
    ("model.norm_eps", math.inf, "finite"),
    ("model.use_bias", 1, "type bool"),
    ("model.tie_embeddings", "yes", "type bool"),
    ("model.remat", "some", "none"),
    ("data.source", "web", "auto"),
    ("data.path", 3, "type str"),
    ("data.val_path", "is_val.txt", "data.path"),
    ("data.name", 3, "type str"),
    ("data.subset", 3, "type str"),
    ("data.text_column", 3, "type str"),
    ("data.join_rows", 1, "type bool"),
    ("data.query", 3, "type str"),
    ("data.mixture", 3, "type dict"),
    ("data.format", "dialog", "chat"),
    ("data.broken_rows", "replace", "skip"),
    ("data.chat_template", "alpaca", "chatml"),
    ("data.chat_loss", "user", "assistant"),
    ("data.long_conversations", "split", "truncate"),
    ("data.encoding_errors", "ignore", "strict"),
    ("data.gitignore", "no", "type bool"),
    ("data.max_file_bytes", -1, "at least 0"),
    ("data.max_bytes", -1, "at least 0"),
    ("data.tokenizer", "", "bpe"),
    ("data.vocab_size", 256, "at least 257"),
    ("data.vocab_size", 2**20 + 1, ""),
    ("data.vocab_size", -1, ""),
    ("data.tokenizer_sample_bytes", 0, "at least 1"),
    ("data.seq_len", 513, "512 (model.max_seq_len)"),
    ("data.seq_len", 0, "at least 1"),
    ("data.packing", "one", "stream"),
    ("data.document_mask", 1, "type bool"),
    ("data.val_fraction", 1.0, "(0, 1)"),
    ("data.val_fraction", 0.0, "(0, 1)"),
    ("data.val_split", "head", "auto"),
    ("data.cache_dir", 3, "type str"),
    ("optimizer.name", "sgd", "adamw"),
    ("optimizer.learning_rate", math.nan, "positive"),
    ("optimizer.learning_rate", math.inf, "positive"),
    ("optimizer.learning_rate", 1e300, "float32"),
    ("optimizer.learning_rate", -1.0, "positive"),
    ("optimizer.learning_rate", 0.0, "positive"),
    ("optimizer.b1", 1.0, "[0, 1)"),
    ("optimizer.b2", -0.5, "[0, 1)"),
    ("optimizer.b2", 0.99999999, "float32"),  # it is 1 there
    ("optimizer.eps", 0.0, "positive"),
    ("optimizer.eps", 1e-300, "float32"),
    ("optimizer.weight_decay", -0.1, "at least 0"),
    ("optimizer.weight_decay", math.inf, "at least 0"),
    ("optimizer.weight_decay", math.nan, "at least 0"),
    ("optimizer.warmup_steps", -1, "at least 0"),
    ("optimizer.warmup_steps", 2**31, "2**31"),
    ("optimizer.schedule", "step", "cosine"),
    ("optimizer.final_lr_fraction", 1.5, "[0, 1]"),
    ("optimizer.final_lr_fraction", -0.1, "[0, 1]"),
    ("optimizer.final_lr_fraction", math.nan, "[0, 1]"),
    ("optimizer.max_grad_norm", math.inf, "finite"),
    ("optimizer.max_grad_norm", -0.1, "at least 0"),
    ("optimizer.max_grad_norm", math.nan, "finite"),
    ("optimizer.max_grad_zscore", -1.0, "at least 0"),
    ("train.platform", "gpu", "auto"),
    ("train.num_steps", 0, "train.num_epochs"),
    ("train.batch_size", 0, "at least 1"),
    ("train.grad_accum_steps", 0, "at least 1"),
    ("train.dtype", "float16", "auto"),
    ("train.log_every", 0, "at least 1"),
    ("train.eval_every", -1, "at least 0"),
    ("train.eval_batches", -1, "at least 0"),
    ("train.sample_prompt", 3, "type str"),
    ("train.sample_tokens", -1, "at least 0"),
    ("train.max_skipped_steps", 0, "at least 1"),
    ("train.profile_steps", -1, "at least 0"),
    ("train.trackers", "tensorboard,mlflow", "wandb"),
    ("train.init_from", 3, "type str"),
    ("train.lora_rank", -1, "at least 0"),
    ("train.lora_rank", 8, "train.init_from"),
    ("train.lora_alpha", -1.0, "at least 0"),
    ("train.lora_alpha", 8.0, "train.lora_rank"),
    ("train.lora_dropout", 1.0, "[0, 1)"),
    ("train.lora_dropout", 0.1, "train.lora_rank"),
    ("checkpoint.save_every", -1, "at least 0"),
    ("checkpoint.keep", 0, "at least 1"),
    ("mesh.data", 0, "-1"),
    ("mesh.fsdp", -2, "-1"),
    ("mesh.tensor", -1, "one axis"),
]


def check_line(error: InputError) -> None:
    """One line that begins with the field, shows the value and says what is expected."""
    field, got, expected = (
        " ".join(x.split()) for x in (error.field, repr(error.got), error.expected)
    )
    assert expected
    assert str(error).startswith(f"{field}: got {got}; expected {expected}")
    assert str(error).endswith(f"; try {error.hint}" if error.hint else expected)
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(("name", "value", "rule"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_bad_value_of_each_field(name: str, value: object, rule: str) -> None:
    with pytest.raises(InputError) as caught:
        Config.from_dict(with_value(name, value))
    check_line(caught.value)
    assert (caught.value.field, repr(caught.value.got)) == (name, repr(value))
    assert rule in caught.value.expected


def test_every_field_has_a_bad_value() -> None:
    # `num_epochs` is good alone: two of the pair are refused by the name of the other.
    assert {name for name, *_ in FIELDS} == flat(base.get_config()).keys() - {"train.num_epochs"}


@pytest.mark.parametrize("got", [3, math.nan, "a b", "line\nline", "\t", [1, "x"], None, b"\n"])
@pytest.mark.parametrize("hint", ["", "--more=1"])
def test_any_value_is_shown_in_one_line(got: object, hint: str) -> None:
    check_line(InputError("section.field", got, "a rule", hint))
    message = str(InputError("section.field", got, "a rule", hint))
    sent = InputError.from_message(message)  # as another process reports it
    assert (str(sent), sent.field) == (message, "section.field")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:s3cret@h:9/x.csv?a=1", "http://\u2026@h:9/x.csv?a=1"),
        ("got 'postgresql://me:s3/cr3t@h/d'", "got 'postgresql://\u2026@h/d'"),
        ("https://s3cret@host/x", "https://\u2026@host/x"),
        (
            "s3://k:s@b/x,https://h/y?X-Amz-Signature=s&X-Amz-Date=1&sig=t (HTTP 403)",
            "s3://\u2026@b/x,https://h/y?X-Amz-Signature=\u2026&X-Amz-Date=1&sig=\u2026 (HTTP 403)",
        ),
        ("https://h/y?token=s,local.txt", "https://h/y?token=…,local.txt"),
        (
            "https://h/y?subscription-key=s&private_key=s",
            "https://h/y?subscription-key=…&private_key=…",
        ),
        *(
            (text, text)
            for text in (
                "postgresql://me@h:5432/d",
                "https://h/y?author=kafka&tokenizer=gpt2",
                "https://h/" + ";token" * 2000,  # in linear time
                "https://h:8080/a@v1/x.csv?page=2",
                "hf://datasets/a/b@~parquet/x",
                "a:b@c?token=d",  # no URL
                "sqlite:///C:/x@y",
            )
        ),
    ],
)
def test_secrets_in_urls_are_masked(text: str, shown: str) -> None:
    error = InputError("data.path", text, "a rule", f"not {text}")
    assert (masked(text), error.got) == (shown, shown)
    assert str(error) == f"data.path: got {shown!r}; expected a rule; try not {shown}"


BASE = "from configs import base\ndef get_config():\n    c = base.get_config()\n"
CONFIGS = {
    "empty.py": "",
    "number.py": "def get_config(): return 3",
    "none.py": "def get_config(): return None",
    "dict.py": "def get_config(): return {}",
    "asks.py": "def get_config(which): return which",
    "exits.py": "import sys; sys.exit(3)",
    "fails.py": "def get_config(): raise ValueError('one line\\nand another')",
    "broken.py": "def get_config(:",
    "prose.txt": "This is no program.",
    "missing.py": f"{BASE}    del c.model.d_model\n    return c",
    "extra.py": f"{BASE}    c.model.d_modle = 3\n    return c",
    "huge.py": f"{BASE}    with c.ignore_type(): c.optimizer.eps = 10**400\n    return c",
    "unset.py": f"{BASE}    with c.ignore_type(): c.optimizer.eps = None\n    return c",
}


class Row(NamedTuple):
    """A bad command, and the parts of its error.

    `got` is compared whole unless it is a string, of which `error.got` holds more. A row without a
    field is refused by argparse: its message holds `got`.
    """

    program: str
    words: str | list[str]
    field: str
    got: Any = ""
    expected: str = ""
    hint: str = ""
    damage: Callable[[Path], object] | None = None  # done to a copy of the run, which is then {run}


def with_config(**fields: Any) -> Callable[[Path], object]:
    """The config.json of another model."""

    def damage(run: Path) -> None:
        saved = json.loads((run / "config.json").read_text())
        saved["config"]["model"] |= fields
        (run / "config.json").write_text(json.dumps(saved))

    return damage


def written(name: str, content: str) -> Callable[[Path], object]:
    return lambda run: (run / name).write_text(content)


def instead(name: str, target: str = "") -> Callable[[Path], object]:
    """A link to a target in place of what is in a run; without one, a file."""

    def damage(run: Path) -> None:
        path = run / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target) if target else path.write_text("in the way")

    return damage


def only_a_damaged_one(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/00000002")
    shutil.rmtree(run / "checkpoints/00000004/params")


def never_evaluated(run: Path) -> None:
    for step in (2, 4):
        CheckpointSaver(run / "checkpoints").record(step, {"val_loss": None})


def half_written(run: Path) -> None:
    """As a kill in the first save leaves it."""
    shutil.rmtree(run / "checkpoints/00000002")
    (run / "checkpoints/00000004").rename(run / "checkpoints/.pending-00000004")


def without_vocab_size(run: Path) -> None:
    saved = json.loads((run / "config.json").read_text())
    del saved["vocab_size"]
    (run / "config.json").write_text(json.dumps(saved))


def set_(override: str, field: str, got: Any, expected: str = "", hint: str = "") -> Row:
    return Row("train", [f"--config.{override}"], field, got, expected, hint)


def unknown(name: str, hint: str) -> Row:
    return set_(f"{name}=3", f"--config.{name}", "3", hint=hint)


DIGITS, WHOLE = "9" * 5000, "integer"
CONFIGURATION = [
    # An unknown key, once in each section; the nearest that is known.
    unknown("sed", "--config.seed"),
    unknown("model.d_modle", "--config.model.d_model"),
    unknown("data.pth", "--config.data.path"),
    unknown("optimizer.learning_rat", "--config.optimizer.learning_rate"),
    unknown("train.num_step", "--config.train.num_steps"),
    unknown("checkpoint.save_evry", "--config.checkpoint.save_every"),
    unknown("mesh.dta", "--config.mesh.data"),
    unknown("modle.d_model", "--config.model.d_model"),
    unknown("train.lr", "--config.optimizer.learning_rate"),
    unknown("out_dir", "--workdir"),
    unknown("zzzzzz", "configs/base.py"),
    unknown("model", "--config.model."),
    set_("model.a\nb=3", "--config.model.a\nb", "3"),
    # Each wrong type.
    set_("model.d_model=wide", "model.d_model", "wide", WHOLE),
    set_("model.d_model=1.5", "model.d_model", "1.5", WHOLE),
    set_("model.d_model=", "model.d_model", "", WHOLE),
    set_("seed=1e3", "seed", "1e3", WHOLE),
    set_(f"seed={DIGITS}", "seed", DIGITS, WHOLE),
    set_("model.dropout=lots", "model.dropout", "lots", "number"),
    set_("model.use_bias=maybe", "model.use_bias", "maybe", "True or False"),
    set_("train.batch_size=a\nb", "train.batch_size", "a\nb", WHOLE),
    set_("train.sample_tokens", "", "--config.train.sample_tokens"),
    # What Config refuses, by the name of the field.
    set_("optimizer.learning_rate=1e400", "optimizer.learning_rate", math.inf, "finite"),
    set_("seed=-1", "seed", -1),
    set_("model.num_heads=5", "model.num_heads", 5, "24 (model.d_model)"),
    set_("model.num_heads=8", "model.num_heads", 8, "even head width"),
    set_("train.num_steps=0", "train.num_steps", 0, "exactly one"),
    set_("train.num_epochs=2", "train.num_steps", 4, "exactly one"),
    set_("data.join_rows=True", "data.join_rows", True, "no effect on data.source=files"),
    set_("data.text_column=body", "data.text_column", "body", "no effect on data.source=files"),
    set_("data.seq_len=64", "data.seq_len", 64, "32 (", "--config.model.max_seq_len=64"),
    # What the devices, of which there are 8, rule out.
    set_("train.batch_size=3", "train.batch_size", 3, "8 (", "--config.train.batch_size=8"),
    set_("mesh.tensor=8", "model.num_heads", 2, "8 (mesh size tensor)"),
    set_("mesh.data=16", "mesh", "data 16 x fsdp 1 x tensor 1", "8", "--config.mesh.data"),
    set_("mesh.data=3", "mesh", "data 3 x fsdp 1 x tensor 1", "8"),
    set_("mesh.fsdp=16", "mesh", "data -1 x fsdp 16 x tensor 1", "8"),
    set_("mesh.fsdp=-1", "mesh.fsdp", -1, "one axis"),
    # The file and the flags.
    Row("train", ["--config", "configs/bse.py"], "--config", "configs/bse.py", "", "base, "),
    Row("train", ["--config", "configs"], "--config", "configs", "config file"),
    Row("train", ["--config", ""], "--config", "", "config file"),
    Row("train", ["--config", "x" * 5000], "--config", "x" * 5000, "config file"),
    *(
        Row("train", ["--config", f"{{root}}/{name}"], field, got, expected, hint)
        for name, field, got, expected, hint in [
            ("empty.py", "--config", "empty.py", "AttributeError", ""),
            ("number.py", "--config", "number.py", "get_config", ""),
            ("none.py", "--config", "none.py", "get_config", ""),
            ("dict.py", "--config", "dict.py", "get_config", ""),
            ("asks.py", "--config", "asks.py", "TypeError", ""),
            ("exits.py", "--config", "exits.py", "SystemExit: 3", ""),
            ("fails.py", "--config", "fails.py", "ValueError: one line\nand another", ""),
            ("broken.py", "--config", "broken.py", "SyntaxError", ""),
            ("prose.txt", "--config", "prose.txt", "SyntaxError", ""),
            ("huge.py", "--config", "huge.py", "int too large", ""),
            ("missing.py", "model.d_model", "nothing", "", "configs/base.py"),
            ("extra.py", "model.d_modle", "unknown", "", "model.d_model"),
            ("unset.py", "optimizer.eps", None, "type float", ""),
        ]
    ),
    Row("train", "--config", "", "--config"),
    Row("train", "--wokdir=x", "", "--wokdir=x"),
    Row("train", "stray", "", "stray"),
    Row("train", ["--foo\nbar"], "", "--foo bar"),
    Row("train", "--workdir {root}/text.txt", "--workdir", "text.txt"),
    Row("train", "--workdir {root}/text.txt/x", "--workdir", "text.txt/x"),
    Row("train", ["--workdir", "{root}/w\udce9"], "--workdir", r"\udce9", "UTF-8"),
    Row("train", ["--workdir", ""], "", "--workdir: got ''"),
    # A workdir that holds another run.
    Row(
        "train",
        "--workdir {run} --config.model.d_ff=48",
        "{run}",
        "model.d_ff 40 -> 48",
        hint="--workdir",
    ),
    *(
        Row("train", f"--workdir {{run}} --config.{name}={new}", "{run}", got, hint="--workdir")
        for name, new, got in [
            ("data.path", "", "text.txt -> unset"),  # the standard library
            ("data.val_fraction", "0.2", "data.val_fraction 0.1 -> 0.2"),
            ("data.tokenizer", "bpe", "data.tokenizer char -> bpe"),
        ]
    ),
    Row("train", "--workdir {run} --config.seed=1", "{run}", "seed 42 -> 1", hint="--workdir"),
    # What would be found at the first save.
    *(
        Row("train", "--workdir {run}", f"{{run}}/{name}", got, expected, damage=damage)
        for name, got, expected, damage in [
            ("checkpoints", "a broken link", "directory", instead("checkpoints", "nowhere")),
            ("checkpoints", "a file", "directory", instead("checkpoints")),
            ("checkpoints", "", "writable directory", instead("checkpoints", "/proc")),
            ("metrics.jsonl", "not a regular file", "a file", instead("metrics.jsonl", "/proc")),
            ("train.log", "not a regular file", "a file", instead("train.log", "/dev/null")),
        ]
    ),
    # What only the tokenizer can tell: the prompt of the samples in the log.
    *(
        Row(
            "train",
            ["--config.train.sample_tokens=3", f"--config.train.sample_prompt={prompt}"],
            "train.sample_prompt",
            got,
            expected,
        )
        for prompt, got, expected in [(SAYS, "40 tokens", "32 tokens ("), ("\u2603", "U+2603", "")]
    ),
]


def asked(words: str | list[str], field: str, got: Any, expected: str = "", hint: str = "") -> Row:
    listed = words.split() if isinstance(words, str) else words
    return Row("sample", ["--ckpt", "{run}", *listed], field, got, expected, hint)


def opened(damage: Callable[[Path], object], *parts: Any) -> Row:
    return Row("sample", "--ckpt {run}", *parts, damage=damage)


CHECKPOINTS, CONFIG = "{run}/checkpoints", "{run}/config.json"
SAMPLING = [
    # Which run.
    Row("sample", ["--ckpt", ""], "", "--ckpt: got ''"),
    asked(["--prompt_file", ""], "", "--prompt_file: got ''"),
    Row("tools", ["checkpoints", "--ckpt", ""], "", "--ckpt: got ''"),
    Row("tools", ["evaluate", "--ckpt", "{run}", "--data", ""], "", "--data: got ''"),
    Row("tools", ["bench", "--ckpt", "{run}", "--out", ""], "", "--out: got ''"),
    Row("sample", "", "", "--ckpt"),
    Row("sample", "--chkpt x", "", "--ckpt"),
    Row("sample", "--ckpt {root}/rnu", "--ckpt", "rnu", "run directory", "run"),
    Row("sample", "--ckpt {root}", "--ckpt", "{root}", "run directory", "run"),
    Row("sample", "--ckpt {root}/nothing", "--ckpt", "nothing", "", "train.py"),
    Row("sample", "--ckpt {root}/text.txt", "--ckpt", "text.txt", "", "run"),
    Row("sample", "--ckpt {run}/checkpoints/00000004", "--ckpt", "00000004", "", "--step"),
    Row("sample", "--ckpt {run}/config.json", "--ckpt", "config.json", "", "--step"),
    opened(lambda run: shutil.rmtree(run / "checkpoints"), CHECKPOINTS, "no checkpoint"),
    opened(half_written, CHECKPOINTS, "no checkpoint"),
    Row("sample", "--ckpt {run} --step latest", "--step", "latest", "manifest", "2",
        damage=lambda run: (run / "checkpoints/00000004/manifest.json").unlink()),
    opened(lambda run: shutil.rmtree(run / "checkpoints/00000004/params"),
           "--step", 4, "params", "2"),
    opened(only_a_damaged_one, "--step", 4, "missing", "another run"),
    *(Row(program, f"{words} --step best", "--step", "best", "latest or one of 2, 4 (none",
          damage=never_evaluated)
      for program, words in (("sample", "--ckpt {run}"), ("tools", "evaluate --ckpt {run}"))),
    opened(written("config.json", '{"config": '), CONFIG, "", "configuration"),
    opened(written("config.json", "[]"), CONFIG, "", "configuration"),
    opened(with_config(d_modle=3), CONFIG, "model.d_modle", "configuration"),
    opened(without_vocab_size, CONFIG, "vocab_size", "configuration"),
    opened(lambda run: (run / "tokenizer.json").unlink(), "{run}/tokenizer.json", "no file"),
    opened(written("tokenizer.json", "x"), "data.tokenizer {run}/tokenizer.json", "not a token"),
    *(
        opened(with_config(**{name: value}), "{run}/checkpoints/00000004/params", got)
        for name, value, got in [
            ("d_model", 48, "float32[24, 24], not float32[48, 48]"),
            ("num_layers", 2, "missing block_1."),
            ("use_bias", True, "missing block_0.attention.key.bias"),
            ("d_ff", 48, "float32[40, 24], not float32[48, 24]"),
        ]
    ),
    asked("--step 999", "--step", 999, "2, 4"),
    asked("--step newest", "--step", "newest", "latest, best"),
    asked("--step=-3", "--step", "-3", "latest, best"),
    asked(["--step", DIGITS], "--step", DIGITS, "latest, best"),
    # Which prompt.
    asked(["--prompt", SAYS], "--prompt", "40 tokens", "32", "--truncate left"),
    asked(["--prompt", "ab\udc80"], "--prompt", "ab\udc80", "UTF-8"),
    asked("--prompt - --prompt -", "--prompt", "-", "once", "--prompt_file FILE"),
    asked("--prompt - --prompt_file -", "--prompt_file", "-", "once", "--prompt_file FILE"),
    asked("--prompt line\u2603", "--prompt", "U+2603) at position 4"),
    asked("--prompt line\0", "--prompt", "U+0000) at position 4"),
    asked("--prompt_file {root}/no.txt", "--prompt_file", "no.txt"),
    asked("--prompt_file {root}", "--prompt_file", "Is a directory"),
    asked("--prompt_file {root}/latin1.txt", "--prompt_file", "latin1.txt, invalid at byte 1"),
    asked("--prompt_file {root}/snow.txt", "--prompt_file", "U+2603) at position 5"),
    # How much, and how.
    *(
        Row("sample", ["--ckpt", "{run}", *words.split()], "--max_new_tokens", got, expected,
            damage=with_config(position="learned"))
        for words, got, expected in [
            ("--prompt line --max_new_tokens 29", 29, "at most 28 (context 32 minus 4 prompt tok"),
            ("--prompt line --max_new_tokens 29", 29, "learned positions end at the context"),
            (f"--max_new_tokens {10**30}", 10**30, "at most 31"),
            ("--max_new_tokens 32 --truncate left --prompt line", 32, "31"),
            # Text that reads like a special token is text: 13 characters, 13 tokens.
            ("--prompt <|endoftext|> --max_new_tokens 20", 20, "at most 19"),
        ]
    ),
    asked(f"--max_new_tokens {10**30}", "--max_new_tokens", 10**30, f"at most {2**30 - 2}"),
    asked("--max_new_tokens -1", "--max_new_tokens", -1, "at least 0"),
    asked("--temperature nan", "--temperature", math.nan, "", "0"),
    asked("--temperature inf", "--temperature", math.inf, "", "0"),
    asked("--temperature -0.5", "--temperature", -0.5, "", "0"),
    asked("--temperature hot", "", "--temperature"),
    asked("--top_k -1", "--top_k", -1, "at least 0", "0"),
    asked("--top_k 1.5", "", "--top_k"),
    asked("--top_p 0", "--top_p", 0.0, "(0, 1]"),
    asked("--top_p 1.01", "--top_p", 1.01, "(0, 1]"),
    asked("--top_p nan", "--top_p", math.nan, "(0, 1]"),
    asked("--min_p 1.01", "--min_p", 1.01, "0 to 1", "0"),
    asked("--repetition_penalty 0", "--repetition_penalty", 0.0, "0.001 to 1000", "1"),
    asked("--presence_penalty nan", "--presence_penalty", math.nan, "-100 to 100", "0"),
    asked("--frequency_penalty 101", "--frequency_penalty", 101.0, "-100 to 100", "0"),
    asked(["--stop", ""], "--stop", "", "nonempty"),
    asked("--logprobs 21 --json", "--logprobs", 21, "0 to 20"),
    asked("--logprobs 3", "--logprobs", 3, "json"),
    asked("--stream --json --prompt x", "--stream", True, "without `json`"),
    asked("--stream --prompt x --prompt y", "--stream", True, "one sample of one prompt"),
    asked("--stream --prompt x --num_samples 2", "--stream", True, "one sample of one prompt"),
    asked("-i", "--interactive", "standard input", "terminal", "--prompt -"),
    *(
        asked(f"-i {words}", f"--{name}", got, "interactive")
        for name, words, got in [
            ("prompt", "--prompt x", ["x"]),
            ("prompt_file", "--prompt_file x", "x"),
            ("keep_newline", "--keep_newline", True),
            ("json", "--json", True),
            ("num_samples", "--num_samples 2", 2),
            ("stream", "--no-stream", False),
        ]
    ),
    asked("--num_samples 0", "--num_samples", 0, "at least 1"),
    asked("--seed -1", "--seed", -1, "2**32"),
    asked(f"--seed {2**32}", "--seed", 2**32, "2**32"),
    asked("--context 1", "--context", 1, "at least 2"),
    asked(f"--context {10**12}", "--context", 10**12, "1073741823"),
    asked("--truncate right", "", "--truncate"),
    asked("--platform gpu", "", "--platform"),
    asked("--dtype float16", "", "--dtype"),
    asked("--quantize int4", "", "--quantize"),
    asked("--temp 1", "", "--temp 1"),  # no abbreviations
    asked(["--a\nb"], "", "--a b"),
]  # fmt: skip  # a case a row


def tool(words: str, field: str, got: Any, expected: str = "", hint: str = "") -> Row:
    return Row("tools", words, field, got, expected, hint)


COMMANDS = ("data", "plan", "evaluate", "bench", "checkpoints", "export")
EXPORT = "export --ckpt {run} --format hf --out {root}/new"
EVALUATE, BENCH = "evaluate --ckpt {run}", "bench --ckpt {run} --prompt_lengths 4 --new_tokens 2"
DATA, PLAN = "data --config configs/base.py", "plan --config configs/base.py"
TOOLS = [
    tool("", "", "data, plan, checkpoints"),
    tool("serv", "", "'serv'"),
    tool("evaluate", "", "--ckpt"),
    tool(f"{EVALUATE} --overlap 16", "--overlap", 16, "16"),
    tool(f"{EVALUATE} --overlap -1", "--overlap", -1, "at least 0"),
    tool(f"{EVALUATE} --batch_size 0", "--batch_size", 0, "at least 1"),
    tool(f"{EVALUATE} --data {{root}}/no.txt", "--data", "no.txt"),
    tool(f"{EVALUATE} --data {{root}}/blank.txt", "--data", "blank.txt"),
    tool(f"{EVALUATE} --data {{root}}/latin1.txt", "--data", "latin1.txt (byte 0xe9 at offset 1"),
    tool(f"{EVALUATE} --data {{root}}/snow.txt", "snow.txt", "U+2603) at position 5"),
    tool(f"{EVALUATE} --data {{root}}/rows.jsonl", "data.text_column", "text", "body"),
    tool(f"{EVALUATE} --context 1", "--context", 1, "at least 2"),
    tool(f"{EVALUATE} --context {10**13}", "--context", 10**13, "1073741823"),
    tool(f"{EVALUATE} --step newest", "--step", "newest", "latest, best"),
    tool(f"{EVALUATE} --step 999", "--step", 999, "2, 4"),
    tool(f"{EVALUATE} --quantize int4", "", "int4"),
    tool(f"{EVALUATE} --json stray", "", "stray"),
    tool(f"{EVALUATE} --config.seed=3", "", "--config.seed=3"),
    tool("evaluate --ckpt {root}/nothing", "--ckpt", "nothing", "", "train.py"),
    tool("bench --ckpt {run} --prompt_lengths 40", "--prompt_lengths", "41 tokens", "32"),
    tool("bench --ckpt {run} --new_tokens 32", "--prompt_lengths", "33 tokens", "32"),
    tool("bench --ckpt {run} --prompt_lengths", "", "--prompt_lengths"),
    tool(f"{BENCH} --prompt_lengths 0", "--prompt_lengths", [0], "at least 1"),
    tool(f"{BENCH} --new_tokens -3", "--new_tokens", [-3], "at least 1"),
    tool(f"{BENCH} --batch_sizes 0", "--batch_sizes", [0], "at least 1"),
    tool(f"{BENCH} --repeats 0", "--repeats", [0], "at least 1"),
    tool(f"{BENCH} --out {{root}}/text.txt", "--out", "text.txt"),
    tool(f"{BENCH} --out {{root}}/text.txt/x", "--out", "text.txt/x"),
    tool(f"{BENCH} --out /proc/bench", "--out", "/proc/bench (No such file"),
    tool(f"{BENCH} --step newest", "--step", "newest", "latest, best"),
    tool("checkpoints", "", "--ckpt"),
    tool("checkpoints --ckpt {root}/nothing", "--ckpt", "nothing", "", "train.py"),
    tool("checkpoints --ckpt {run} --delete 999", "--delete", "999", "2, 4"),
    tool("checkpoints --ckpt {run} --delete 2 4", "--delete", "2, 4"),
    tool("checkpoints --ckpt {run} --delete 4", "--delete", "4", "the best", "--force"),
    tool("checkpoints --ckpt {run} --keep 2", "--keep", "2", "the best", "--force"),
    tool("checkpoints --ckpt {run} --keep 999", "--keep", "999", "2, 4"),
    tool("checkpoints --ckpt {run} --keep 2 --delete 4", "", "--delete"),
    tool("checkpoints --ckpt {run} --delete x", "", "'x'"),
    tool("export --ckpt {run} --format hf", "", "--out"),
    tool("export --ckpt {run} --out {root}/new", "", "--format"),
    tool(f"{EXPORT} --format onnx", "", "'onnx'"),
    tool(f"{EXPORT} --dtype int4", "", "'int4'"),
    tool(f"{EXPORT} --dtype q8_0", "--dtype", "q8_0", "float32, bfloat16, float16"),
    tool(f"{EXPORT} --step newest", "--step", "newest", "latest, best"),
    tool(f"{EXPORT} --step 999", "--step", 999, "2, 4"),
    tool(f"{EXPORT} --out {{run}}", "--out", "run (a directory with files)", "empty"),
    tool(f"{EXPORT} --out {{root}}/text.txt", "--out", "text.txt (a file)", "empty"),
    tool(f"{EXPORT} --ckpt {{root}}/nothing", "--ckpt", "nothing", "", "train.py"),
    tool("data", "", "--config"),
    tool(f"{DATA} --process_index 1", "--process_index", 1, "(`process_count`)"),
    tool(f"{DATA} --process_index -1", "--process_index", -1, "(`process_count`)"),
    tool(f"{DATA} --process_count 0", "--process_index", 0, "(`process_count`)"),
    tool(f"{DATA} --windows -1", "--windows", -1, "at least 0"),
    tool(f"{DATA} --windos 3", "", "--windos"),
    tool(f"{DATA} --config.seed", "", "--config.seed"),
    tool(f"{DATA} --config.data.pth=x", "--config.data.pth", "x", "", "--config.data.path"),
    tool(f"{DATA} --config.data.seq_len=0", "data.seq_len", 0, "at least 1"),
    tool(f"{DATA} --config.data.path=no.txt", "data.path", "no.txt"),
    tool("plan", "", "--config"),
    tool(f"{PLAN} --devices 0", "--devices", 0, "at least 1"),
    tool(f"{PLAN} --vocab_size 0", "--vocab_size", 0, "at least 1"),
    tool(f"{PLAN} --mfu 1.5", "--mfu", 1.5, "(0, 1]"),
    tool(f"{PLAN} --device H1000", "--device", "H1000", "H100"),
    tool(f"{PLAN} --config.mesh.fsdp=7", "mesh", "fsdp 7", "8"),
]
ROWS = CONFIGURATION + SAMPLING + TOOLS


@pytest.fixture(scope="module")
def root(tiny_root: Path) -> Path:
    """The tiny run, beside files that are of no use."""
    (tiny_root / "nothing").mkdir()
    (tiny_root / "blank.txt").write_text(" \n\t\n")
    (tiny_root / "latin1.txt").write_bytes("déjà".encode("latin-1"))
    (tiny_root / "snow.txt").write_text("line \u2603")
    (tiny_root / "rows.jsonl").write_text('{"body": "line"}')
    for name, content in CONFIGS.items():
        (tiny_root / name).write_text(content)
    return tiny_root


def tree(*roots: Path) -> dict[Path, tuple[int, int] | None]:
    """Names, sizes and times. The lock's content is its owner's; a directory's time is not news."""
    return {
        path: (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for root in roots
        for path in sorted(root.rglob("*"))
        if path.name != "lock"
    }


@contextlib.contextmanager
def no_compile() -> Iterator[None]:
    """Bad input is found before anything is compiled."""
    compiled: list[str] = []

    def listen(event: str, seconds: float, **about: Any) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


def cases() -> list[Any]:
    def name(row: Row) -> str:
        words = row.words if isinstance(row.words, str) else " ".join(row.words)
        return f"{row.program} {words}"[:50].encode("ascii", "replace").decode()

    return [pytest.param(row, id=f"{number}-{name(row)}") for number, row in enumerate(ROWS)]


@pytest.mark.parametrize("row", cases())
def test_bad_input_is_one_line_and_leaves_no_trace(
    row: Row, root: Path, tmp_path: Path, run_program: Any
) -> None:
    run = root / "run"
    if row.damage:
        run = shutil.copytree(root / "run", tmp_path / "run")
        row.damage(run)

    def filled(text: str) -> str:
        return text.replace("{root}", str(root)).replace("{run}", str(run))

    words = [filled(w) for w in (row.words.split() if isinstance(row.words, str) else row.words)]
    if row.program == "train":  # of a flag given twice the last counts
        fields = [] if "--config" in words else overrides(tiny(root))
        words = ["--config", "configs/base.py", "--workdir", str(tmp_path / "new"), *fields, *words]
    before = tree(root, tmp_path)
    with no_compile():
        code, out, err, error = run_program(row.program, words)
    assert (code, out) == (2, ""), err
    *above, last = err.splitlines()
    assert not any(line.startswith("error: ") or "Traceback" in line for line in above), err
    if row.field:
        assert isinstance(error, InputError), err
        check_line(error)
        shown = filled(row.field).removeprefix("--config.")  # a flag, where it is one
        line = " ".join(shown.split()).encode(errors="backslashreplace").decode()
        assert last.startswith(f"error: {line}: got ")
        assert error.field == shown.removeprefix("--")
        if isinstance(row.got, str):
            assert filled(row.got) in str(error.got)
        else:
            assert repr(row.got) == repr(error.got)
        assert row.expected in error.expected
        assert row.hint in last and "`" not in last
    else:
        assert re.match("error: .*; try --help$", last), last
        assert row.got in last
    assert tree(root, tmp_path) == before


def test_the_table_is_whole() -> None:
    """Every section of the configuration, and every command."""
    typed = {word.split(".")[1] for row in CONFIGURATION for word in row.words if "." in word}
    assert set(base.get_config()) - {"seed"} <= typed
    assert {str(row.words).split(" ")[0] for row in TOOLS} >= set(COMMANDS)


def test_no_compile_sees_a_compile() -> None:
    with pytest.raises(AssertionError), no_compile():
        jax.jit(lambda x: x * 3 + 17)(1.0)
