"""The adapter for lm-evaluation-harness against float64 numpy, one token at a time."""

import dataclasses
import json
import sys
import types

import numpy as np
import pytest

from sheepop_jax.checkpoint.run import open_run
from sheepop_jax.data.preprocess.train_tokenizer import train_char
from sheepop_jax.data.tokenizer import ChatSettings, Tokenizer
from sheepop_jax.errors import InputError
from sheepop_jax.generation.engine import generate
from sheepop_jax.interop import lm_eval as harness
from sheepop_jax.model.transformer import Transformer
from sheepop_jax.scoring import continuation_log_likelihoods, rolling_windows
from tests import reference

pytestmark = pytest.mark.usefixtures("fast_compile")

CONTEXT = 13
LETTERS = "abcdefghijklmnopqrstuvwxyz ."


@pytest.fixture(scope="module")
def adapter(make_config, random_params):
    tokenizer = train_char([LETTERS])
    model = Transformer(make_config().model, tokenizer.vocab_size)
    params = random_params(model)
    params = {**params, "embedding": params["embedding"] * 0.3}
    return harness.Adapter(model, params, tokenizer, CONTEXT, batch_size=3)


def log_probabilities(adapter, ids) -> np.ndarray:
    """log p of every token of the vocabulary after each of `ids`, float64 [T, V]."""
    logits = reference.logits(adapter.params, adapter.model.config, np.array([ids]))[0]
    logits = logits[:, : adapter.model.vocab_size]
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def brute_force(adapter, before, after) -> tuple[float, bool]:
    total, greedy, text = 0.0, True, list(before)
    tokens = [*before, *after]
    visible = tokens[-CONTEXT - 1 :]
    first = len(visible) - len(after)
    for at in range(first, len(visible)):
        p_V = log_probabilities(adapter, visible[:at])[-1]
        total += p_V[visible[at]]
        greedy = greedy and bool(p_V.argmax() == visible[at])
    assert text == list(before)
    return total, greedy


def greedy_text(adapter, ids, count) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(int(log_probabilities(adapter, ids)[-1].argmax()))
    return ids


def test_log_likelihoods_are_those_of_numpy(adapter):
    draw = np.random.default_rng(3)
    size = adapter.model.vocab_size
    lengths = [(1, 1), (5, 3), (1, 13), (12, 1), (20, 4), (2, 11), (40, 13), (3, 0)]
    pairs = [tuple(draw.integers(0, size, n).tolist() for n in pair) for pair in lengths]
    written = greedy_text(adapter, pairs[1][0], 4)
    pairs.append((written[:5], written[5:]))  # what greedy decoding writes
    pairs.append((written[:5], [*written[5:-1], (written[-1] + 1) % size]))
    found = adapter.log_likelihoods([(list(a), list(b)) for a, b in pairs])
    wanted = [brute_force(adapter, *pair) for pair in pairs]
    for (sum_found, greedy_found), (sum_wanted, greedy_wanted) in zip(found, wanted, strict=True):
        assert sum_found == pytest.approx(sum_wanted, rel=1e-5, abs=1e-5)
        assert greedy_found == greedy_wanted
    assert [greedy for _, greedy in found[-3:]] == [True, True, False]
    empty = adapter.log_likelihoods([([], pairs[0][1])])
    start = [adapter.tokenizer.end_of_text]
    assert empty[0][0] == pytest.approx(brute_force(adapter, start, pairs[0][1])[0], rel=1e-5)


def test_a_row_does_not_depend_on_its_batch(adapter):
    draw = np.random.default_rng(4)
    pairs = [(draw.integers(0, 20, n).tolist(), [3, 1]) for n in (9, 1, 5, 7)]
    alone = [adapter.log_likelihoods([pair])[0][0] for pair in pairs]
    together = [found for found, _ in adapter.log_likelihoods(pairs)]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


@pytest.mark.parametrize("length", [0, 1, 12, 13, 14, 26, 30])
def test_rolling_windows_predict_each_token_once(length):
    text = list(range(100, 100 + length))
    windows = rolling_windows(text, 99, CONTEXT)
    assert [token for _, after in windows for token in after] == text
    whole = [99, *text]
    done = 1
    for before, after in windows:
        # The longest context that leaves one position for each input.
        kept = min(done, CONTEXT + 1 - len(after))
        assert before == whole[done - kept : done]
        done += len(after)
    assert len(windows) == -(-length // CONTEXT)


def test_rolling_log_likelihoods_are_those_of_numpy(adapter):
    texts = ["the cat sat on the mat. a dog ran.", "cat", ""]
    wanted = []
    for text in texts:
        ids = [adapter.tokenizer.end_of_text, *adapter.tokenizer.encode(text)]
        total = 0.0
        for start in range(1, len(ids), CONTEXT):
            stop = min(start + CONTEXT, len(ids))
            window = ids[max(0, stop - 1 - CONTEXT) : stop]
            p_TV = log_probabilities(adapter, window[:-1])
            total += sum(p_TV[i - (stop - len(window)) - 1, ids[i]] for i in range(start, stop))
        wanted.append(total)
    assert adapter.rolling_log_likelihoods(texts) == pytest.approx(wanted, rel=1e-5)


def test_continuations_are_greedy_up_to_a_stop(adapter):
    prompts = ["the cat", "a dog ran in the rain", "ox"]
    size, end = 6, adapter.tokenizer.end_of_text
    wanted = []
    for prompt in prompts:
        ids = adapter.tokenizer.encode(prompt)[-(CONTEXT - size) :]
        new = greedy_text(adapter, ids, size)[len(ids) :]
        new = new[: new.index(end)] if end in new else new
        wanted.append(adapter.tokenizer.decode(new))
    settings = {"max_gen_toks": size, "until": [], "do_sample": False, "temperature": 0.7}
    assert adapter.continuations([(prompt, settings) for prompt in prompts]) == wanted
    longest = max(wanted, key=len)
    stops = [longest[3], longest[1]]
    cut = adapter.continuations([(p, {"max_gen_toks": size, "until": stops}) for p in prompts])
    assert cut == [text.split(stops[0])[0].split(stops[1])[0] for text in wanted]
    one = adapter.continuations([("ox", {"max_gen_toks": size, "until": longest[1]})])
    assert one == [wanted[2].split(longest[1])[0]]


def test_a_continuation_ends_at_any_token_that_ends_a_text(adapter):
    own, size = adapter.tokenizer, 6
    asked = [("the cat", {"max_gen_toks": size, "until": []})]
    [whole] = adapter.continuations(asked)
    last = whole[-1]
    chat = ChatSettings((last,))
    tokenizer = Tokenizer.with_stream_tokens(own.to_json(), None, "<|endoftext|>", chat=chat)
    found = dataclasses.replace(adapter, tokenizer=tokenizer).continuations(asked)
    assert found == [whole.partition(last)[0]] != [whole]


def test_texts_begin_with_the_bos_of_the_tokenizer(adapter, monkeypatch):
    tokenizer = Tokenizer.with_stream_tokens(adapter.tokenizer.to_json(), "z", "<|endoftext|>")
    begun = dataclasses.replace(adapter, tokenizer=tokenizer)
    bos, cat, text = tokenizer.bos_id, tokenizer.encode("cat"), "the cat sat on the mat. a dog ran."
    assert begun.log_likelihoods([(cat, cat)]) == adapter.log_likelihoods([([bos, *cat], cat)])
    for before in ([], [bos]):
        assert begun.log_likelihoods([(before, cat)]) == adapter.log_likelihoods([([bos], cat)])
    windows = rolling_windows(tokenizer.encode(text), bos, CONTEXT)
    expected = sum(value for value, _ in adapter.log_likelihoods(windows))
    assert begun.rolling_log_likelihoods([text]) == pytest.approx([expected], rel=1e-6)
    asked = []

    def record(model, params, prompts, *rest):
        asked.extend(prompts)
        return generate(model, params, prompts, *rest)

    monkeypatch.setattr(harness, "generate", record)
    begun.continuations([(prompt, {"max_gen_toks": 4, "until": []}) for prompt in (text, "cat")])
    assert asked == [[bos, *tokenizer.encode(text)[-(CONTEXT - 4 - 1) :]], [bos, *cat]]


def test_a_task_without_a_limit_leaves_half_the_context_to_the_prompt(adapter, monkeypatch, caplog):
    asked = []

    def record(model, params, prompts, end, config):
        asked.append((prompts, config.max_new_tokens))
        return generate(model, params, prompts, end, config)

    monkeypatch.setattr(harness, "generate", record)
    text = "the cat sat on the mat."
    adapter.continuations([(text, {"until": []}), ("ox", {"until": []})])
    ids = adapter.tokenizer.encode(text)
    assert asked == [([ids[-(CONTEXT - 6) :], adapter.tokenizer.encode("ox")], 6)]
    assert "1 of 2 prompts exceed the context" in caplog.text


def test_sampling_settings_are_passed_on(adapter):
    drawn = adapter.continuations(
        [("ox", {"max_gen_toks": 8, "temperature": 50.0, "top_k": 0, "top_p": 1.0})]
    )
    assert drawn != adapter.continuations([("ox", {"max_gen_toks": 8})])
    with pytest.raises(InputError) as error:
        adapter.continuations([("ox", {"num_beams": 3})])
    assert (error.value.field, error.value.got) == ("generation_kwargs", "num_beams")


def test_what_cannot_be_scored_is_refused(adapter):
    for after, got in (([1] * 14, "14 tokens"), ([99], [1, 99]), ([-1], [-1, 1])):
        with pytest.raises(InputError) as error:
            adapter.log_likelihoods([([1], after)])
        assert (error.value.field, error.value.got) == ("continuation", got)
    with pytest.raises(ValueError, match="empty context"):
        continuation_log_likelihoods(adapter.model, adapter.params, [([], [1])])


def test_the_harness_gets_the_answers_of_the_adapter(adapter, monkeypatch):
    """With a stand-in for the harness's base class, which the development set lacks."""
    module = types.ModuleType("lm_eval.api.model")
    monkeypatch.setattr(module, "TemplateLM", object, raising=False)
    for name in ("lm_eval", "lm_eval.api"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", module)
    model = harness.harness_model(adapter)
    ids = model.tok_encode("a cat", add_special_tokens=False)
    assert ids == adapter.tokenizer.encode("a cat")
    assert model.eot_token_id == adapter.tokenizer.end_of_text
    request = (("a", " cat"), ids[:1], ids[1:])
    answer = adapter.log_likelihoods([(ids[:1], ids[1:])])
    assert model._loglikelihood_tokens([request], disable_tqdm=True) == answer
    text = types.SimpleNamespace(args=("a cat",))
    assert model.loglikelihood_rolling([text]) == adapter.rolling_log_likelihoods(["a cat"])
    asked = types.SimpleNamespace(args=("a cat", {"max_gen_toks": 3, "until": ["."]}))
    assert model.generate_until([asked]) == adapter.continuations([asked.args])


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--lm_eval", "arc_easy"], "lm_eval"),  # the package is missing
        (["--lm_eval", "arc_easy", "--data", "text.txt"], "data"),
        (["--lm_eval", " , "], "lm_eval"),
        (["--lm_eval", "arc_easy", "--overlap", "3"], "overlap"),
        (["--lm_eval", "arc_easy", "--include_path", "nowhere"], "include_path"),
        (["--include_path", "."], "include_path"),
    ],
)
def test_what_is_missing_or_contradictory_is_one_line(
    run_program, tiny_root, monkeypatch, words, field
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run = ["evaluate", "--ckpt", str(tiny_root / "run")]
    code, out, err, error = run_program("tools", [*run, *words])
    assert code == 2 and not out
    assert error.field == field and f"error: --{field}: got" in err.splitlines()[-1]
    if field == "lm_eval" and "arc_easy" in words:
        assert "pip install lm-eval" in err


TASK = """\
task: lines
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
"""


@pytest.mark.slow
def test_a_multiple_choice_task_through_the_harness(run_program, tiny_root, tmp_path):
    pytest.importorskip("lm_eval")
    run = open_run(tiny_root / "run")
    params, _ = run.params()
    tiny = harness.Adapter(run.model(), params, run.tokenizer, 32, 4)
    rows = []
    for i in range(12):
        before, choices = f"line {i} says", [f" {i * i}", f" {i + 1}", " line says"]
        scores = []
        for choice in choices:
            tokens = run.tokenizer.encode(before + choice)
            p_TV = log_probabilities(tiny, tokens[:-1])
            scores.append(sum(p_TV[t - 1, tokens[t]] for t in range(len(before), len(tokens))))
        # 9 of 12 labels are the model's own choice.
        label = (int(np.argmax(scores)) + (i % 4 == 0)) % 3
        rows.append({"text": before, "choices": choices, "label": label})
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "lines.yaml").write_text(TASK.format(data=data))
    words = ["evaluate", "--ckpt", str(tiny_root / "run"), "--lm_eval", "lines"]
    words += ["--include_path", str(tmp_path), "--platform", "cpu"]
    code, out, err, _ = run_program("tools", words)
    assert code == 0, err
    assert out.startswith("step 4 of") and "|lines|" in out and "|0.75|" in out.replace(" ", "")
    code, out, err, _ = run_program("tools", [*words, "--json"])
    assert json.loads(out)["lines"]["acc,none"] == 0.75
    code, out, err, error = run_program("tools", [*words[:4], "no_such_task", *words[5:]])
    assert (code, error.field, error.got) == (2, "lm_eval", "no_such_task")


@pytest.mark.slow
def test_rolling_windows_are_those_of_the_harness():
    utils = pytest.importorskip("lm_eval.utils")
    for length in range(1, 60):
        text = list(range(length))
        windows = utils.get_rolling_token_windows(text, 99, max_seq_len=CONTEXT, context_len=1)
        wanted = [tuple(map(list, utils.make_disjoint_window(window))) for window in windows]
        assert rolling_windows(text, 99, CONTEXT) == wanted
