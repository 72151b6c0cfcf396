"""The tokenizers of the golden models, and what transformers makes of some texts with them.

Part of `make_golden.py`; it needs transformers.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
QWEN2_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")

TEXTS = (
    "",
    " ",
    "The sheep sleeps.",
    "  two leading spaces and two trailing  ",
    "a  b   c",
    "line one\nline two\n\n\nline five\n",
    "\r\n\r\n  indented\r\n",
    "\t\ttabs\there",
    "don't, WE'LL, it's o'the",
    "12345 + 2024 = 14369 (the 2024)",
    "\tthe\r\n\t(the)\n",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m",
    "cafe\u0301 \u212bngstro\u0308m",  # decomposed: NFC changes it
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u7f8a",
    "\U0001f411 \U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u00a0no-break\u2003space",
    "\u2581already a \u2581 mark",
    "nul\x00 and \x7f",
    "<s>",
    "one<s> two </s>three",
    "one<|endoftext|> two<|endoftext|>",
    "<|begin_of_text|>user<|eot_id|> <|im_start|>x<|im_end|>",
    "<unk> <0x0A> <|fim|>",
)


def training_text() -> Iterator[str]:
    """Some kilobytes of lines, the same on every machine."""
    rng = random.Random(0)
    words = (
        "the sheep sleeps in a green field while seven shepherds count their lambs and then "
        "don't wait for rain it's late"
    ).split()
    for number in range(120):
        line = " ".join(rng.choices(words, k=9))
        yield f"{line.capitalize()}, {number}.\n\t(the caf\u00e9, 2024)\n"


def byte_level(
    pre_tokenizer: Any, size: int, special: tuple[str, ...], words: tuple[str, ...] = ()
) -> Tokenizer:
    """Byte-level BPE of `size` tokens, then `words`, which no merge makes, and specials."""
    tokenizer = Tokenizer(BPE(ignore_merges=bool(words)))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    parts = json.loads(tokenizer.to_str())
    parts["model"]["vocab"] |= {word: size + i for i, word in enumerate(words)}
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def split_by(pattern: str) -> Any:
    """The pre-tokenizer of Llama 3 and Qwen2."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def sentencepiece() -> Tokenizer:
    """BPE over characters with bytes for the unknown ones, laid out as Llama 2's."""
    trained = Tokenizer(BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    lines = (" ".join(line.split()) for line in training_text())  # only bytes for tabs, line ends
    trained.train_from_iterator(lines, BpeTrainer(vocab_size=80, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    pieces = ["".join(pair) for pair in merges]
    letters = [piece for piece in model["vocab"] if len(piece) == 1]
    control = ["<unk>", "<s>", "</s>"]
    every = [*control, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *letters]
    tokenizer = Tokenizer(
        BPE(
            vocab={piece: index for index, piece in enumerate(every)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in control]
    )
    return tokenizer


def begin_with(token: str, tokenizer: Tokenizer) -> Any:
    """The post-processor that puts a token before each text."""
    return TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, tokenizer.token_to_id(token))],
    )


def tokenizer_of(kind: str) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer and its `tokenizer_config.json`, with the classes that the hub's files name."""
    if kind == "gpt2":
        pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer = byte_level(pre_tokenizer, 292, ("<|endoftext|>",))
        end = "<|endoftext|>"
        return tokenizer, {
            "tokenizer_class": "GPT2Tokenizer",
            "bos_token": end,
            "eos_token": end,
            "unk_token": end,
            "add_prefix_space": False,
        }
    if kind == "qwen2":
        tokenizer = byte_level(split_by(QWEN2_SPLIT), 296, QWEN2_SPECIAL)
        tokenizer.normalizer = normalizers.NFC()
        return tokenizer, {
            "tokenizer_class": "Qwen2Tokenizer",
            "add_bos_token": False,
            "add_prefix_space": False,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
        }
    if kind == "llama3":
        tokenizer = byte_level(split_by(LLAMA3_SPLIT), 300, LLAMA3_SPECIAL, ("\u0120mark",))
        tokenizer.post_processor = begin_with("<|begin_of_text|>", tokenizer)
        return tokenizer, {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "clean_up_tokenization_spaces": False,
        }
    tokenizer = sentencepiece()
    tokenizer.post_processor = begin_with("<s>", tokenizer)
    return tokenizer, {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "legacy": False,
        "clean_up_tokenization_spaces": False,
    }


def tokenizer_cases(folder: Path) -> list[dict[str, Any]]:
    """What transformers makes of each text, one dictionary a text.

    `ids` are the text's, with special tokens found in it; `literal` those where special tokens in
    the text count as text, if they differ. Both follow `tokenizer.json` as it is, without the
    tokens that a model is given first: these are `bos`. `auto` are the ids of `AutoTokenizer` where
    they differ: classes such as LlamaTokenizer rebuild the tokenizer instead of reading it.
    """
    own = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    bos = own.encode("")
    assert auto.encode("") == bos
    found = []
    for text in TEXTS:
        ids = own.encode(text, add_special_tokens=False)
        assert own.encode(text) == [*bos, *ids]
        literal = own.encode(text, add_special_tokens=False, split_special_tokens=True)
        rebuilt = auto.encode(text, add_special_tokens=False)
        case = {"text": text, "bos": bos, "ids": ids, "decoded": own.decode(ids)}
        case |= {"literal": literal} if literal != ids else {}
        case |= {"auto": rebuilt} if rebuilt != ids else {}
        found.append(case)
    return found


def check_that_mistakes_show(tokenizer: Tokenizer) -> None:
    """Raises AssertionError where a tokenizer without one of its parts would do the same."""

    def outcome(parts: dict[str, Any]) -> list[Any]:
        changed = Tokenizer.from_str(json.dumps(parts))
        found = [changed.encode(text).ids for text in TEXTS]
        return [found, [changed.decode(ids) for ids in found]]

    whole = json.loads(tokenizer.to_str())
    wrong = {f"no {name}": whole | {name: None} for name in PARTS if whole[name]}
    if "Split" in str(whole["pre_tokenizer"]):
        gpt2 = json.loads(tokenizer_of("gpt2")[0].to_str())["pre_tokenizer"]
        wrong["GPT-2's pre-tokenizer"] = whole | {"pre_tokenizer": gpt2}
    elif whole["pre_tokenizer"]:
        unsplit = whole["pre_tokenizer"] | {"use_regex": False}
        wrong["no regular expression"] = whole | {"pre_tokenizer": unsplit}
    for field in ("byte_fallback", "ignore_merges"):
        if whole["model"][field]:
            wrong[f"no {field}"] = whole | {"model": whole["model"] | {field: False}}
    for name, parts in wrong.items():
        assert outcome(parts) != outcome(whole), name


def dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")


def write_tokenizer(folder: Path, kind: str) -> None:
    """Puts the tokenizer beside the model, in as few bytes as it takes."""
    tokenizer, config = tokenizer_of(kind)
    folder.mkdir(parents=True, exist_ok=True)
    dump(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    dump(folder / "tokenizer_config.json", config)
    check_that_mistakes_show(tokenizer)
    found = tokenizer_cases(folder)
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in found)
    (folder / "tokenizer_cases.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    differ = sum("auto" in case for case in found)
    print(f"  {tokenizer.get_vocab_size()} tokens; {differ} texts where AutoTokenizer differs")
