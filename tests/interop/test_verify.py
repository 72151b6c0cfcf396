"""A verification passes for a right export, and names what is wrong in any other."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from sheepop_jax.checkpoint.run import Run, open_run
from sheepop_jax.interop import transformers_model, verify
from sheepop_jax.interop.families import for_export
from sheepop_jax.interop.hub_config import write_config
from sheepop_jax.interop.hub_tensors import tensors
from sheepop_jax.interop.safetensors_files import WEIGHTS, WeightFiles, write_weights
from sheepop_jax.interop.verification import Row, VerificationReport
from sheepop_jax.interop.verify import verify_hf
from tests.interop.fake import fake_transformers

pytestmark = pytest.mark.usefixtures("fast_compile")


@pytest.fixture(scope="module")
def run(tiny_root) -> Run:
    """The tiny run with biases, and with an epsilon and a base of RoPE that are not defaults."""
    found = open_run(tiny_root / "run")
    model = replace(found.config.model, use_bias=True, norm_eps=1e-2, rope_theta=300.0)
    return replace(found, config=replace(found.config, model=model))


@pytest.fixture(scope="module")
def params(run, random_params):
    """Random parameters, so that each shows in the logits."""
    return random_params(run.model())


def write(run: Run, params, directory: Path, dtype=np.float32) -> Path:
    """Writes an export by the tables that the export uses."""
    hub = for_export(run.config.model, run.model().vocab_size)
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(write_config(hub)))
    write_weights(directory, {t.name: t.pack(params) for t in tensors(hub)}, dtype=dtype)
    (directory / "tokenizer.json").write_text(run.tokenizer.to_json())
    (directory / "tokenizer_config.json").write_text('{"split_special_tokens": true}')
    return directory


@pytest.fixture(scope="module")
def exported(run, params, tmp_path_factory) -> Path:
    return write(run, params, tmp_path_factory.mktemp("exported") / "model")


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """An export to damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def failed(report: VerificationReport) -> dict[str, str]:
    """The rows that failed, with their details."""
    assert report.passed == all(row.passed for row in report.rows)
    return {row.name: row.detail for row in report.rows if not row.passed}


def change_weights(directory: Path, **changes) -> None:
    """Replaces tensors, by the part of their name after the block; None removes one."""
    files = WeightFiles(directory)
    found = {name: files.load(name) for name in files.tensors}
    for key, change in changes.items():
        [name] = [name for name in found if name.endswith(key.replace("__", "."))]
        found[name] = change(found) if callable(change) else change
    (directory / WEIGHTS).unlink()
    write_weights(directory, {name: x for name, x in found.items() if x is not None})


def change_config(directory: Path, **changes) -> None:
    values = json.loads((directory / "config.json").read_text()) | changes
    kept = {key: value for key, value in values.items() if value != "removed"}
    (directory / "config.json").write_text(json.dumps(kept))


ERROR = "float64 reader: max relative logit error"
KL = "float64 reader: mean KL per token (nats)"
GREEDY = "float64 reader: greedy tokens equal"


def test_a_right_export_passes(run, params, exported):
    before = {path: path.read_bytes() for path in exported.iterdir()}
    report = verify_hf(run, params, exported)
    assert report.passed
    rows = {row.name: row for row in report.rows}
    assert list(rows) == ["config.json", "tensors", ERROR, KL, GREEDY, "tokenizer: strings equal"]
    assert rows["tensors"].value == "19 of 19 equal (F32)"
    assert float(rows[ERROR].value) < 5e-6  # seen: 5e-7
    assert float(rows[KL].value) < 1e-10
    assert rows[GREEDY].value == "64 of 64"
    assert rows["tokenizer: strings equal"].value == "1,000 of 1,000"
    assert report.notes[0] == "text: the run's validation text"
    assert {path: path.read_bytes() for path in exported.iterdir()} == before


@pytest.mark.parametrize(
    ("dtype", "name"), [(ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float16")]
)
def test_a_rounded_export_is_compared_with_rounded_parameters(run, params, tmp_path, dtype, name):
    report = verify_hf(run, params, write(run, params, tmp_path / "model", dtype))
    rows = {row.name: row for row in report.rows}
    assert float(rows[ERROR].value) < 5e-6
    assert rows[GREEDY].value == "64 of 64"
    rounding = rows[f"rounding to {name}: mean KL per token (nats)"]
    assert float(rounding.value) > 1e-9  # measured, and not between two rounded models
    assert report.passed


def test_rounding_that_costs_too_much_fails(run, params, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "ROUNDING_LIMITS", {"BF16": 1e-9})
    report = verify_hf(run, params, write(run, params, tmp_path / "model", ml_dtypes.bfloat16))
    assert list(failed(report)) == ["rounding to bfloat16: mean KL per token (nats)"]


def test_without_data_the_texts_are_sampled_from_the_model(run, params, exported, tmp_path):
    report = verify_hf(replace(run, shards=tmp_path / "none"), params, exported)
    assert report.passed
    assert report.notes[0] == "text: samples of the model (no validation text was found)"


def interleaved(kernel_OI: np.ndarray) -> np.ndarray:
    """Rows of each head in the order for RoPE on neighbours: 0, C / 2, 1, C / 2 + 1, ..."""
    heads = kernel_OI.reshape(2, 2, 6, -1)  # H = 2, C = 12
    return heads.transpose(0, 2, 1, 3).reshape(kernel_OI.shape)


def named(ending: str):
    """The tensor of that ending, for `change_weights`."""
    return lambda found: next(x for name, x in found.items() if name.endswith(ending))


# Bug: what it does to a right export, and the tensor or key that the verification must name.
BUGS = {
    "interleaved rope": (
        lambda d: change_weights(
            d,
            q_proj__weight=lambda found: interleaved(named("q_proj.weight")(found)),
            k_proj__weight=lambda found: interleaved(named("k_proj.weight")(found)),
        ),
        "layers.0.self_attn.q_proj.weight",
    ),
    "transposed kernel": (
        lambda d: change_weights(
            d, o_proj__weight=lambda found: np.ascontiguousarray(named("o_proj.weight")(found).T)
        ),
        "layers.0.self_attn.o_proj.weight",
    ),
    "noncontiguous array saved": (  # the bytes of [in, out] with the shape [out, in]
        lambda d: change_weights(
            d,
            c_fc__weight=lambda found: np.ascontiguousarray(named("c_fc.weight")(found).T).reshape(
                40, 24
            ),
        ),
        "layers.0.mlp.c_fc.weight",
    ),
    "biases swapped": (
        lambda d: change_weights(
            d, k_proj__bias=named("v_proj.bias"), v_proj__bias=named("k_proj.bias")
        ),
        "layers.0.self_attn.",
    ),
    "eps dropped": (lambda d: change_config(d, norm_epsilon="removed"), "norm_epsilon is missing"),
    "theta default": (
        lambda d: change_config(d, rope_theta="removed", rope_parameters={"rope_type": "default"}),
        "rope_theta is missing, not 300.0",
    ),
    "another activation": (
        lambda d: change_config(d, hidden_act="relu"),
        "hidden_act is 'relu', not 'gelu",
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_fails_and_is_named(run, params, copy, bug):
    damage, name = BUGS[bug]
    damage(copy)
    found = failed(verify_hf(run, params, copy))
    part = "config.json" if "is" in name.split() else "tensors"
    assert name in found[part]
    # The forward pass alone would catch it: the table of the export may have the same mistake.
    assert ERROR in found and KL in found


def keep_padding(directory: Path) -> None:
    change_weights(directory, embed_tokens__weight=lambda found: np.zeros((128, 24), np.float32))
    change_config(directory, vocab_size=128)


UNREADABLE = {
    "wrong tied flag": (
        lambda d: change_config(d, tie_word_embeddings=False),
        {"config.json": "tie_word_embeddings is False", "float64 reader": "no lm_head.weight"},
    ),
    "padded vocabulary kept": (
        keep_padding,
        {"config.json": "vocab_size is 128", "tensors": "embed_tokens.weight is [128, 24], not ["},
    ),
    "one token too many": (
        lambda d: (
            change_weights(d, embed_tokens__weight=lambda _: np.zeros((30, 24), np.float32)),
            change_config(d, vocab_size=30),
        ),
        {"config.json": "vocab_size is 30", "float64 reader: vocabulary": ""},
    ),
    "tensor missing": (
        lambda d: change_weights(d, o_proj__bias=None),
        {"tensors": "o_proj.bias is missing", "float64 reader": "o_proj.bias"},
    ),
    "truncated file": (
        lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes()[:-4]),
        {"weights": "invalid or truncated"},
    ),
    "no configuration": (
        lambda d: (d / "config.json").unlink(),
        {"config.json": "No such file", "float64 reader": "config.json"},
    ),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), {"tokenizer": "No such file"}),
}


@pytest.mark.parametrize("bug", UNREADABLE)
def test_files_that_are_not_of_the_model_fail(run, params, copy, bug):
    damage, expected = UNREADABLE[bug]
    damage(copy)
    found = failed(verify_hf(run, params, copy))
    for row, detail in expected.items():
        assert detail in found[row]
        assert "\n" not in found[row]


def test_a_tensor_more_than_the_model_has_is_named(run, params, copy):
    files = WeightFiles(copy)
    found = {name: files.load(name) for name in files.tensors}
    (copy / WEIGHTS).unlink()
    write_weights(copy, {**found, "extra": np.ones(3, np.float32)})
    assert failed(verify_hf(run, params, copy)) == {"tensors": "extra is not a tensor of the model"}


TOKENIZER_BUGS = {
    "two ids swapped": lambda tokenizer: tokenizer["model"]["vocab"].update(s=1, i=2),
    "begins with a token": lambda tokenizer: tokenizer.update(
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "x", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {"x": {"id": "x", "ids": [0], "tokens": ["x"]}},
        }
    ),
    "white space removed": lambda tokenizer: tokenizer.update(
        normalizer={"type": "Strip", "strip_left": True, "strip_right": True}
    ),
}


@pytest.mark.parametrize("bug", TOKENIZER_BUGS)
def test_a_tokenizer_that_differs_is_shown_with_a_string(run, params, copy, bug):
    content = json.loads((copy / "tokenizer.json").read_text())
    TOKENIZER_BUGS[bug](content)
    (copy / "tokenizer.json").write_text(json.dumps(content))
    [(name, detail)] = failed(verify_hf(run, params, copy)).items()
    assert name == "tokenizer: strings equal"
    assert "not [" in detail and "\n" not in detail


def test_the_text_of_a_special_token_is_compared_as_the_file_encodes_it(run, params, copy):
    (copy / "tokenizer_config.json").write_text("{}")
    report = verify_hf(run, params, copy)
    assert report.passed
    assert "not compared on special tokens" in report.notes[-1]


def test_transformers_is_asked_where_it_is_installed(run, params, exported, monkeypatch):
    fake_transformers(monkeypatch, exported, {"missing_keys": []})
    report = verify_hf(run, params, exported)
    rows = {row.name: row for row in report.rows}
    assert report.passed
    assert rows["transformers 5.0: greedy tokens equal"].value == "64 of 64"
    assert len(report.notes) == 1


def test_transformers_that_differs_fails(run, params, exported, monkeypatch):
    fake_transformers(monkeypatch, exported, {"missing_keys": ["a.bias"]}, scale=1.001)
    found = failed(verify_hf(run, params, exported))
    assert found["transformers 5.0: tensors"] == "missing_keys: a.bias"
    assert "transformers 5.0: max relative logit error" in found


def test_what_transformers_raises_is_one_line(run, params, exported, monkeypatch):
    fake_transformers(monkeypatch, exported, {})

    def load(path, **options):
        raise RuntimeError("two\nlines")

    sys.modules["transformers"].AutoModelForCausalLM.from_pretrained = load
    assert failed(verify_hf(run, params, exported)) == {"transformers 5.0": "two lines"}


def test_without_transformers_the_report_says_so(run, params, exported, monkeypatch):
    monkeypatch.setattr(transformers_model.importlib.util, "find_spec", lambda name: None)
    notes = verify_hf(run, params, exported).notes
    assert notes[-1] == "transformers: not compared (torch and transformers not installed)"


def test_only_near_ties_may_be_chosen_otherwise():
    logits_NV = np.array([[4.0, 4.0 - 1e-5, 0], [4.0, 3.0, 0], [1.0, 2.0, 0]])
    sums = verify._Sums(largest=4.0)
    sums.add_greedy(np.array([1, 1, 1]), logits_NV)
    assert (sums.greedy, sums.equal) == (3, 1)
    np.testing.assert_allclose(sums.gaps, [1e-5, 1.0])
    texts = verify.Texts((np.array([0, 1, 1]),), 2, "")

    def rows(second):
        logits_TV = np.array([[4.0, 4.0 - 1e-5, 0], [second, 3.0, 0], [0, 0, 0]])
        return list(verify._compare("x", lambda ids: logits_TV, lambda ids: logits_TV, texts))[-1]

    assert rows(2.0) == Row(
        "x: greedy tokens equal", "1 of 2, 1 near ties", "all but near ties", True
    )
    assert rows(4.0) == Row(
        "x: greedy tokens equal", "0 of 2, 1 near ties", "all but near ties", False
    )


def test_kl_is_that_of_the_definition():
    sums = verify._Sums()
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.25, 0.5]])
    sums.add(np.log(p) + 7, np.log(q) - 2)
    assert sums.kl == pytest.approx(0.25 * np.log(2))
    sums.add(np.full((2, 3), np.nan), np.ones((2, 3)))
    assert sums.difference == np.inf and not sums.kl <= verify.KL_LIMIT


REPORT = VerificationReport(
    (Row("tensors", "2 of 3", "all", False, "a|b is missing"), Row("x", "1e-7", "1e-4", True)),
    ("text: samples",),
)


def test_table_for_the_terminal():
    assert REPORT.table().splitlines() == [
        "verification  result  limit",
        "tensors       2 of 3  all    FAILED",
        "x             1e-7    1e-4   ok",
        "tensors: a|b is missing",
        "text: samples",
    ]
    assert not REPORT.passed


def test_table_for_the_model_card():
    assert REPORT.markdown().splitlines() == [
        "| verification | result | limit |  |",
        "| --- | --- | --- | --- |",
        "| tensors | 2 of 3 | all | **failed** |",
        "| x | 1e-7 | 1e-4 | ok |",
        "",
        "- tensors: a\\|b is missing",
        "- text: samples",
    ]
