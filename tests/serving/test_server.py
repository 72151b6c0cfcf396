"""A server process with a real model: the openai client, lm-eval's calls, and sample.py's texts."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from configs import base
from sheepop_jax.checkpoint.run import Run, open_run
from sheepop_jax.config.schema import Config
from sheepop_jax.generation.engine import generate
from sheepop_jax.generation.requests import GenerationConfig, SamplingConfig
from sheepop_jax.interop.import_hf import import_hf
from sheepop_jax.interop.lm_eval import Adapter
from sheepop_jax.scoring import score
from tests.serving.conftest import start_browser
from tests.serving.load import Known, Load, bear
from tests.serving.processes import ROOT, Served, serving

pytestmark = pytest.mark.usefixtures("fast_compile")

CONTEXT = 64
GOLDEN = ROOT / "tests/interop/golden/llama_rope_linear"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small random Llama, imported: its texts begin with BOS, some of its tokens are bytes."""
    directory = tmp_path_factory.mktemp("served") / "chatty"
    defaults = Config.from_dict(base.get_config())
    import_hf(GOLDEN, directory, defaults, verify=False)
    return open_run(directory)


@pytest.fixture(scope="module")
def params(run) -> Any:
    return run.params()[0]


def command(run: Run, *words: str) -> list[str]:
    flags = ["--ckpt", str(run.directory), "--port", "0", "--platform", "cpu", *words]
    return [sys.executable, "-m", "sheepop_jax", "serve", *flags]


@pytest.fixture(scope="module")
def served(run, process_env_of_module) -> Iterator[Served]:
    env = process_env_of_module | {"SHEEPOP_JAX_API_KEY": "secret"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # as `fast_compile`
    with serving(command(run, "--slots", "4"), env) as served:
        yield served


@pytest.fixture(scope="module")
def client(served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="secret", max_retries=0) as client:
        yield client


# All sampled texts share these, so that the test compiles one program for them, and a greedy one.
SAMPLING = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.001,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
}
OTHERS = ("top_k", "min_p", "repetition_penalty")  # not of the OpenAI API
ASKED: dict[str, Any] = {name: value for name, value in SAMPLING.items() if name not in OTHERS}
ASKED |= {"model": "chatty", "extra_body": {name: SAMPLING[name] for name in OTHERS}}
LIMIT = 80  # beyond the context: the window slides


PROMPT = "User: is 7 odd?\nAssistant:"


@pytest.fixture(scope="module")
def written(run, params) -> list[str]:
    """Two texts of sample.py after `PROMPT`."""
    ids = run.tokenizer.encode_prompt(PROMPT)
    settings = GenerationConfig(SamplingConfig(**SAMPLING), LIMIT, 2, seed=7, slide=True)
    found = generate(run.model(), params, [ids], run.tokenizer.end_of_text, settings)
    return [run.tokenizer.decode_after(ids, one.tokens) for one in found]


def test_models(client):
    [model] = client.models.list().data
    assert (model.id, model.object) == ("chatty", "model")
    assert client.models.retrieve("chatty").id == "chatty"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt")
    assert caught.value.code == "model_not_found"


def test_completions_are_the_texts_of_sample_py(run, written, client):
    wanted = written
    asked = {**ASKED, "prompt": PROMPT, "max_tokens": LIMIT, "n": 2, "seed": 7}
    answer = client.completions.create(**asked)
    assert [choice.text for choice in answer.choices] == wanted
    assert wanted[0] != wanted[1] and len(wanted[0]) > 60
    assert answer.usage.prompt_tokens == len(run.tokenizer.encode_prompt(PROMPT))
    texts = ["", ""]
    for piece in client.completions.create(**asked, stream=True):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == wanted
    half = wanted[1].index(stop := wanted[1][50:53])
    answer = client.completions.create(**asked, stop=["absent", stop])
    assert answer.choices[1].text == wanted[1][:half]
    assert answer.choices[1].finish_reason == "stop"


def test_chat_continues_the_transcript(written, client):
    messages = [{"role": "user", "content": "is 7 odd?"}]
    wanted = [text.partition("\nUser:")[0] for text in written]
    asked = {**ASKED, "messages": messages, "max_completion_tokens": LIMIT, "n": 2, "seed": 7}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert [choice.message.content for choice in answer.choices] == wanted
    assert answer.choices[0].message.role == "assistant"
    for entry in answer.choices[0].logprobs.content:
        best = entry.top_logprobs
        assert len(best) == 3 and best[0].logprob >= entry.logprob
    usage = {"include_usage": True}
    *pieces, last = client.chat.completions.create(**asked, stream=True, stream_options=usage)
    assert pieces[0].choices[0].delta.role == "assistant"
    own = [piece.choices[0] for piece in pieces if piece.choices[0].index == 1]
    assert "".join(piece.delta.content or "" for piece in own) == wanted[1]
    assert last.choices == [] and last.usage.total_tokens == answer.usage.total_tokens


@pytest.fixture
def browser() -> Iterator[Any]:
    """One for a single test: others of this module run event loops."""
    with start_browser() as browser:
        yield browser


def test_the_page_asks_for_the_key_and_streams(served, client, opened, expect):
    """In a browser, against this server: its texts, and their probabilities."""
    page = opened(served.url)
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_role("heading", name="chatty")).to_be_visible()
    for label, value in {"Prompt": PROMPT, "Max tokens": "40", "Seed": "7"}.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("The limit of tokens was reached.")
    asked = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0.8, "top_p": 0.95, "seed": 7}
    text = client.completions.create(model="chatty", **asked).choices[0].text
    assert page.locator("#output .turn").last.text_content() == PROMPT + text
    page.locator(".token").first.hover()
    expect(page.locator("caption")).to_contain_text("has probability")
    assert page.locator("#alternatives tr").count() >= 6  # five tokens, and all others


def test_a_bias_and_errors(run, client):
    [*_, mark] = run.tokenizer.encode("?")
    asked = {"model": "chatty", "prompt": "no", "max_tokens": 5, "logit_bias": {str(mark): 100}}
    assert client.completions.create(**asked).choices[0].text == "?????"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**asked, "prompt": [10_000]})
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**asked, "prompt": [5] * CONTEXT})
    assert caught.value.code == "context_length_exceeded"
    with openai.OpenAI(base_url=client.base_url, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()


def test_the_calls_of_lm_eval_equal_the_adapter(run, params, client, served):
    """Bodies and parsing as in lm-eval 0.4.13's local-completions."""
    encode, begin = run.tokenizer.encode, run.tokenizer.encode_prompt
    adapter = Adapter(run.model(), params, run.tokenizer, CONTEXT, batch_size=4)
    [scores] = score(run.model(), params, [begin("User: is 4?")], top=1)
    most_probable = scores.top[-1][0][0]  # after all but the last token
    pairs = [
        (begin("User: is 4"), encode(" odd?")),
        (begin("User: is 4?")[:-1], [most_probable]),
        (begin(""), encode("User")),
        (begin("Assistant: no, 5\nUser: is 4"), encode("tant: yes")),
        (begin("n"), encode("o")),
    ]
    body = dict(model="chatty", temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    found = []
    for start in range(0, len(pairs), 2):
        group = pairs[start : start + 2]
        prompts = [before + after for before, after in group]
        answer = client.completions.create(**body, prompt=prompts).model_dump()
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        for choice, (before, _) in zip(choices, group, strict=True):
            shown = slice(len(before), -1)
            logprobs = choice["logprobs"]["token_logprobs"][shown]
            tops = choice["logprobs"]["top_logprobs"][shown]
            best = [max(top.values()) for top in tops]
            found.append((sum(logprobs), logprobs == best))
    wanted = adapter.log_likelihoods(pairs)
    for (ours, ours_greedy), (theirs, theirs_greedy) in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5) and ours_greedy == theirs_greedy
    assert [is_greedy for _, is_greedy in found].count(True) >= 1


def test_the_remote_tokenizer_of_lm_eval(run, served):
    with httpx2.Client(base_url=served.url, headers={"Authorization": "Bearer secret"}) as client:
        info = client.get("/tokenizer_info").json()
        for text, ids in (
            ("User: is", run.tokenizer.encode("User: is")),
            (info["eos_token"], [run.tokenizer.end_of_text]),
            (info["bos_token"], [run.tokenizer.bos_id]),
        ):
            body = {"prompt": text, "add_special_tokens": False}
            assert client.post("/tokenize", json=body).json()["tokens"] == ids
            assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text}


def test_a_client_that_leaves_frees_its_row(run, client, served):
    """Twice as many endless streams as there are slots, all left; then a request is answered."""
    never_ends = {str(run.tokenizer.end_of_text): -100}
    for _ in range(8):
        stream = client.completions.create(
            model="chatty", prompt="U", max_tokens=4096, stream=True, logit_bias=never_ends
        )
        next(iter(stream))
        stream.close()
    answer = client.completions.create(model="chatty", prompt="U", max_tokens=3, seed=1)
    assert answer.usage.completion_tokens == 3
    metrics = httpx2.get(served.url + "/metrics", headers={"Authorization": "Bearer secret"}).text
    assert "sheepop_jax_disconnects_total 8\n" in metrics


@pytest.fixture(scope="module")
def known(run, params) -> list[Known]:
    """What `generate` writes for each prompt alone."""
    found = []
    for prompt, seed in ((PROMPT, 7), (PROMPT, 8), ("", 9)):
        ids = run.tokenizer.encode_prompt(prompt)
        for sampling in ({"temperature": 0.0}, SAMPLING):
            chosen = SamplingConfig(**sampling)
            settings = GenerationConfig(chosen, LIMIT, 2, seed=seed, slide=True)
            texts = generate(run.model(), params, [ids], run.tokenizer.end_ids, settings)
            found.append(Known({"prompt": prompt, "seed": seed, **sampling}, ids, texts))
    return found


def load(run: Run, served: Served, known: list[Known], longest: int) -> Load:
    headers = {"Authorization": "Bearer secret"}
    return Load(served.url, headers, run.tokenizer, known, longest)


LINUX = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")


@LINUX
def test_64_clients(run, served, known):
    bear(served, load(run, served, known, longest=20), 100, requests=200)


@LINUX
@pytest.mark.slow
def test_64_clients_for_a_minute(run, served, known):
    seconds = float(os.environ.get("SHEEPOP_JAX_LOAD_SECONDS", "60"))
    bear(served, load(run, served, known, LIMIT), 1000, seconds=seconds)


def test_bad_flags_are_one_line(run, tmp_path: Path, run_program, monkeypatch):
    monkeypatch.delenv("SHEEPOP_JAX_API_KEY", raising=False)
    ckpt = ["serve", "--ckpt", str(run.directory)]
    rows = [
        (["--host", "0.0.0.0"], "--host: got '0.0.0.0'", "--api_key KEY, or --insecure"),
        (["--host", ""], "--host: got ''", "127.0.0.1"),
        (["--port", "70000"], "--port: got 70000", "65535"),
        (["--api_key", ""], "--api_key: got ''", "not empty"),
        (["--api_key", "a b"], "--api_key: got '…'", "ASCII"),
        (["--allow_origin", "example.org"], "--allow_origin: got 'example.org'", "https://"),
        (["--allow_host", "a:80"], "--allow_host: got 'a:80'", "without port"),
        (["--slots", "0"], "--slots: got 0", "at least 1"),
        (["--max_queue", "-1"], "--max_queue: got -1", "at least 0"),
        (["--request_seconds", "nan"], "--request_seconds: got nan", "positive"),
        (["--step", "99"], "--step: got '99'", "one of"),
        (["--host", "192.0.2.1", "--insecure"], "--port: got '192.0.2.1:8000'", "free"),
        (["--host", "no host", "--insecure"], "--host: got 'no host'", "address"),
    ]
    for words, field, part in rows:
        code, out, err, _ = run_program("tools", [*ckpt, *words])
        *_, line = err.splitlines()
        assert (code, out) == (2, "") and line.startswith("error: "), (words, err)
        assert field in line and part in line, (words, line)
    code, _, err, _ = run_program("tools", ["serve", "--ckpt", str(tmp_path)])
    assert code == 2 and err.startswith("error: --ckpt: got ")


def test_a_missing_extra_names_the_command(run, run_program, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("sheepop_jax.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    code, _, err, _ = run_program("tools", ["serve", "--ckpt", str(run.directory)])
    assert code == 2 and err.count("\n") == 1
    assert "uvicorn" in err and 'try pip install "sheepop_jax[serve]"' in err
