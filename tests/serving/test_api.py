"""The API without a socket and without a model: shapes, errors, limits, and who may ask."""

import base64
import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from sheepop_jax.generation.requests import Request
from sheepop_jax.serving.api_error import ApiError
from sheepop_jax.serving.app import dumped
from sheepop_jax.serving.chat import PlainChat
from sheepop_jax.serving.page import make_page
from sheepop_jax.serving.protocol import parse_json
from sheepop_jax.serving.settings import Access, Limits
from tests.serving.fakes import CONTEXT, Fake, logprob_of, make_fake, text_of

LIMITS = Limits(max_body_bytes=60_000, max_texts=20, max_new_tokens=600, max_queue=20)


@pytest.fixture(scope="module")
def fake(tokenizer) -> Iterator[Fake]:
    made = make_fake(tokenizer, limits=LIMITS)
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(fake) -> Iterator[TestClient]:
    with TestClient(fake.app, base_url="http://127.0.0.1:8000") as client:
        yield client


def expected(fake: Fake, prompt: list[int], limit: int, seed: int, sample: int = 0) -> Any:
    request = Request(tuple(prompt), max_new_tokens=limit, seed=seed, sample=sample)
    tokens, finish = text_of(request, fake.tokenizer.end_of_text)
    return tokens, fake.tokenizer.decode_after(prompt, tokens), finish


def events(text: str) -> list[dict[str, Any]]:
    """The objects of a stream, which ends with [DONE]."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


PROMPT = "the cat"
BODY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "seed": 5}


@pytest.mark.parametrize("seed", [5, 6, 9])
def test_a_completion_is_the_engines_text(fake, client, seed):
    ids = fake.tokenizer.encode(PROMPT)
    answer = client.post("/v1/completions", json={**BODY, "seed": seed})
    assert answer.status_code == 200
    tokens, text, finish = expected(fake, ids, 20, seed)
    body = answer.json()
    assert body["id"].startswith("cmpl-")
    assert (body["object"], body["model"]) == ("text_completion", "tiny")
    [choice] = body["choices"]
    assert choice == {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens)}
    assert body["usage"] == {**usage, "total_tokens": len(ids) + len(tokens)}


def test_prompts_and_n_are_numbered_prompt_by_prompt(fake, client):
    ids = [fake.tokenizer.encode(text) for text in (PROMPT, "mat")]
    for prompts in ([PROMPT, "mat"], ids):
        body = {**BODY, "prompt": prompts, "n": 3}
        choices = client.post("/v1/completions", json=body).json()["choices"]
        found = [(choice["index"], choice["text"]) for choice in choices]
        wanted = [expected(fake, ids[i // 3], 20, 5, i % 3)[1] for i in range(6)]
        assert found == list(enumerate(wanted))


@pytest.mark.parametrize("prompt", ["", [], [[]]], ids=str)
def test_an_empty_prompt_starts_a_document(fake, client, prompt):
    answer = client.post("/v1/completions", json={**BODY, "prompt": prompt, "echo": True})
    assert answer.json()["choices"][0]["text"] == expected(fake, [], 20, 5)[1]


def test_texts_without_a_seed_differ(client):
    body = {**BODY, "seed": None}
    texts = {client.post("/v1/completions", json=body).json()["choices"][0]["text"] for _ in "ab"}
    assert len(texts) == 2


def test_null_and_unknown_fields_are_the_defaults(fake, client):
    names = "max_tokens n stop logprobs echo stream temperature top_p best_of suffix logit_bias"
    body = dict.fromkeys([*names.split(), "stream_options", "seed", "model"], None)
    body |= {"prompt": PROMPT, "user": "me", "what": {"ever": [1]}, "seed": 5}
    choices = client.post("/v1/completions", json=body).json()["choices"]
    assert choices[0]["text"] == expected(fake, fake.tokenizer.encode(PROMPT), 16, 5)[1]


def test_a_stream_is_the_whole_in_pieces(fake, client):
    body = {**BODY, "n": 3, "logprobs": 2, "echo": True, "max_tokens": 50}
    whole = client.post("/v1/completions", json=body).json()
    streamed = client.post("/v1/completions", json={**body, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    pieces = events(streamed.text)
    assert len(pieces) > 12 and all("usage" not in piece for piece in pieces)
    for choice in whole["choices"]:
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        assert [piece["finish_reason"] for piece in own[:-1]] == [None] * (len(own) - 1)
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            assert [value for piece in own for value in piece["logprobs"][name]] == values
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = events(client.post("/v1/completions", json=body).text)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(piece["usage"] is None for piece in pieces)


def test_echo_and_logprobs_are_what_lm_eval_reads(fake, client):
    """The prompt's tokens, null first, then the new one, even if that is end-of-text."""
    tokenizer = fake.tokenizer
    ids = tokenizer.encode("the cat sat €")
    end = tokenizer.end_of_text
    seed = next(s for s in range(500) if expected(fake, ids, 1, s)[0] == [])
    body = {"prompt": [ids], "max_tokens": 1, "logprobs": 1, "echo": True, "seed": seed}
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "the cat sat €" and choice["finish_reason"] == "stop"
    assert found["token_logprobs"] == [None, *map(logprob_of, [*ids[1:], end])]
    assert found["top_logprobs"][0] is None
    best = logprob_of(0)
    for token, shown in zip([*ids[1:], end], found["top_logprobs"][1:], strict=True):
        assert max(shown.values()) == best
        assert logprob_of(token) in shown.values() and len(shown) <= 2
    assert found["tokens"][-1] == "<|endoftext|>"
    offsets = found["text_offset"]
    assert offsets[0] == 0 and offsets[-1] == len(choice["text"]) and offsets == sorted(offsets)
    whole = tokenizer.decode(ids[:3])
    assert offsets[3] == len(whole)


def test_echo_without_new_tokens_scores_only(fake, client):
    ids = fake.tokenizer.encode(PROMPT)
    steps = fake.engine.steps
    body = {"prompt": [PROMPT, ""], "max_tokens": 0, "logprobs": 0, "echo": True, "n": 2}
    answer = client.post("/v1/completions", json=body).json()
    assert [choice["text"] for choice in answer["choices"]] == [PROMPT, PROMPT, "", ""]
    first = answer["choices"][1]["logprobs"]
    assert first["token_logprobs"] == [None, *map(logprob_of, ids[1:])]
    assert [list(top.values()) for top in first["top_logprobs"][1:]] == [
        [logprob_of(id)] for id in ids[1:]
    ]
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    assert answer["usage"]["completion_tokens"] == 0 and fake.engine.steps == steps
    answer = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 0}).json()
    assert answer["choices"][0]["text"] == ""


@pytest.mark.parametrize("start", [18, 20, 22, 24])
def test_a_stop_string_ends_the_text_and_is_not_shown(fake, client, start):
    ids = fake.tokenizer.encode(PROMPT)
    tokens, text, _ = expected(fake, ids, 60, 3)
    stop = text[start : start + 4]
    wanted = text[: text.index(stop)]
    body = {**BODY, "seed": 3, "max_tokens": 60, "stop": ["", "☃", stop], "logprobs": 0}
    [choice] = client.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (wanted, "stop")
    kept = len(choice["logprobs"]["tokens"])
    assert stop in fake.tokenizer.decode_after(ids, tokens[:kept])
    assert stop not in fake.tokenizer.decode_after(ids, tokens[: kept - 1])
    streamed = client.post("/v1/completions", json={**body, "stream": True, "stop": stop}).text
    assert "".join(p["choices"][0]["text"] for p in events(streamed)) == wanted
    assert fake.engine.num_active == 0


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "JAX?"}],
    },
]
TRANSCRIPT = "Be brief.\n\nUser: What is JAX?\nAssistant:"


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_a_chat_continues_the_transcript(fake, client, name):
    ids = fake.tokenizer.encode(TRANSCRIPT)
    body = {"messages": MESSAGES, "seed": 8, name: 12, "logprobs": True, "top_logprobs": 2}
    answer = client.post("/v1/chat/completions", json=body).json()
    tokens, text, finish = expected(fake, ids, 12, 8)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == finish
    content = choice["logprobs"]["content"]
    assert [entry["logprob"] for entry in content[: len(tokens)]] == list(map(logprob_of, tokens))
    assert bytes(sum((entry["bytes"] for entry in content), [])).decode(errors="replace") == text
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert answer["usage"]["prompt_tokens"] == len(ids)


def test_a_chat_stream_begins_with_the_role(fake, client):
    body = {"messages": MESSAGES, "seed": 8, "max_tokens": 12, "stream": True, "n": 2}
    pieces = events(client.post("/v1/chat/completions", json=body).text)
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    deltas = [piece["choices"][0] for piece in pieces]
    assert [d["delta"].get("role") for d in deltas] == ["assistant"] * 2 + [None] * (
        len(deltas) - 2
    )
    for sample in range(2):
        own = [delta for delta in deltas if delta["index"] == sample]
        ids = fake.tokenizer.encode(TRANSCRIPT)
        _, text, finish = expected(fake, ids, 12, 8, sample)
        assert "".join(delta["delta"].get("content", "") for delta in own) == text
        assert own[-1]["finish_reason"] == finish


def test_a_chat_may_fill_the_context_and_continue_an_answer(fake, client):
    messages = [*MESSAGES, {"role": "assistant", "content": "A library"}]
    ids = fake.tokenizer.encode(TRANSCRIPT + " A library")
    seed = next(s for s in range(500, 900) if len(expected(fake, ids, 60, s)[0]) == 60)
    body = {"messages": messages, "seed": seed}
    [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
    text = expected(fake, ids, CONTEXT - len(ids), seed)[1].partition("\nUser:")[0]
    assert choice["message"]["content"] == text


def test_a_chat_ends_where_its_format_says(fake, client, monkeypatch):
    ids = fake.tokenizer.encode(TRANSCRIPT)
    seed = next(seed for seed in range(99) if len(expected(fake, ids, 60, seed)[0]) == 60)
    text = expected(fake, ids, 60, seed)[1]
    model = dataclasses.replace(fake.service.model, chat=PlainChat(stop=(text[12:15],)))
    monkeypatch.setattr(fake.service, "model", model)
    for more in ({}, {"stop": ["absent"]}):
        body = {"messages": MESSAGES, "seed": seed, "max_tokens": 60, **more}
        [choice] = client.post("/v1/chat/completions", json=body).json()["choices"]
        assert choice["message"]["content"] == text.partition(text[12:15])[0]
        assert choice["finish_reason"] == "stop"


def test_tokens_and_text_are_those_of_the_tokenizer(fake, client):
    tokenizer = fake.tokenizer
    text = "the cat € <|endoftext|>"
    found = client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()
    assert found == {
        "tokens": tokenizer.encode(text),
        "count": len(found["tokens"]),
        "max_model_len": CONTEXT,
    }
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    info = client.get("/tokenizer_info").json()
    assert (info["eos_token"], info["bos_token"], info["pad_token"]) == (
        "<|endoftext|>",
        None,
        None,
    )
    alone = client.post("/tokenize", json={"prompt": info["eos_token"]}).json()
    assert alone["tokens"] == [tokenizer.end_of_text]
    found = client.post("/tokenize", json={"messages": MESSAGES}).json()
    assert found["tokens"] == tokenizer.encode(TRANSCRIPT)


def test_models_and_health(client):
    [model] = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", CONTEXT)
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/health").json() == {"status": "ok"}


def test_metrics_are_prometheus_text(fake, client):
    def read() -> dict[str, float]:
        page = client.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
        rows = [line for line in page.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (row.rsplit(" ", 1) for row in rows)}

    before = read()
    answer = client.post("/v1/completions", json={**BODY, "n": 2}).json()["usage"]
    client.post("/v1/completions?secret=1", json={**BODY, "n": 0})
    after = read()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["sheepop_jax_prompt_tokens_total"] == answer["prompt_tokens"]
    assert grown["sheepop_jax_generation_tokens_total"] == answer["completion_tokens"]
    assert grown['sheepop_jax_requests_total{route="/v1/completions",status="200"}'] == 1
    assert grown['sheepop_jax_requests_total{route="/v1/completions",status="400"}'] == 1
    assert grown["sheepop_jax_request_seconds_count"] == 1
    assert grown['sheepop_jax_request_seconds_bucket{le="+Inf"}'] == 1
    assert grown["sheepop_jax_time_to_first_token_seconds_count"] == 1
    assert after["sheepop_jax_texts_pending"] == after["sheepop_jax_texts_active"] == 0
    assert after["sheepop_jax_slots"] == fake.engine.slots


def test_the_page_lets_nothing_else_in(client):
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"


def test_the_policy_has_the_hashes_of_the_page():
    made = make_page('<style>a</style><script type="module">\n"é"</script>')
    digest = base64.b64encode(hashlib.sha256('\n"é"'.encode()).digest()).decode()
    policy = made.headers["Content-Security-Policy"].split("; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert made.content.decode().startswith("<style>a")
    bare = make_page("<p>").headers["Content-Security-Policy"]
    assert "script-src 'none'; style-src 'none'" in bare


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (COMPLETIONS, {}, "prompt"),
    (COMPLETIONS, {"prompt": 3}, "prompt"),
    (COMPLETIONS, {"prompt": ["a", 1]}, "prompt"),
    (COMPLETIONS, {"prompt": [1, True]}, "prompt"),
    (COMPLETIONS, {"prompt": [1.0]}, "prompt"),
    (COMPLETIONS, {"prompt": [-1]}, "prompt"),
    (COMPLETIONS, {"prompt": [10**30]}, "prompt"),
    (COMPLETIONS, {"prompt": [[1], [10**9]]}, "prompt"),
    (COMPLETIONS, {"prompt": "\ud800"}, "prompt"),
    (COMPLETIONS, {"prompt": [1] * 400}, "prompt"),
    (COMPLETIONS, {"prompt": [1] * 401, "max_tokens": 0}, "prompt"),
    (COMPLETIONS, {"prompt": ["a"] * 21}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 21}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": 0}, "n"),
    (COMPLETIONS, {"prompt": "a", "n": True}, "n"),
    (COMPLETIONS, {"prompt": "a", "best_of": 2}, "best_of"),
    (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": -1}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 601}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 2.5}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 10**100}, "max_tokens"),
    (COMPLETIONS, {"prompt": "a", "logprobs": 21}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "logprobs": True}, "logprobs"),
    (COMPLETIONS, {"prompt": "a", "temperature": -1}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": "hot"}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "temperature": 10**400}, "temperature"),
    (COMPLETIONS, {"prompt": "a", "top_p": 0}, "top_p"),
    (COMPLETIONS, {"prompt": "a", "top_k": -2}, "top_k"),
    (COMPLETIONS, {"prompt": "a", "min_p": 2}, "min_p"),
    (COMPLETIONS, {"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
    (COMPLETIONS, {"prompt": "a", "presence_penalty": "1"}, "presence_penalty"),
    (COMPLETIONS, {"prompt": "a", "seed": -1}, "seed"),
    (COMPLETIONS, {"prompt": "a", "seed": 2**32}, "seed"),
    (COMPLETIONS, {"prompt": "a", "stop": 5}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x"] * 17}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stop": ["x" * 1001]}, "stop"),
    (COMPLETIONS, {"prompt": "a", "stream": "yes"}, "stream"),
    (COMPLETIONS, {"prompt": "a", "stream_options": 1}, "stream_options"),
    (COMPLETIONS, {"prompt": "a", "stream_options": {"include_usage": 1}}, "include_usage"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": [1]}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"٣": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"1": 101}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "logit_bias": {"300": 1}}, "logit_bias"),
    (COMPLETIONS, {"prompt": "a", "model": 5}, "model"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": ["hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": ["user"], "content": "a"}]}, "messages[0].role"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0]"),
    (CHAT, {"messages": [{"role": "user", "content": "\udfff"}]}, "messages"),
    (CHAT, {"messages": [{"role": "user", "content": "a " * 900}]}, "prompt"),
    (CHAT, {"messages": USER, "max_tokens": 0}, "max_tokens"),
    (CHAT, {"messages": USER, "max_completion_tokens": "9"}, "max_completion_tokens"),
    (CHAT, {"messages": USER, "logprobs": 1}, "logprobs"),
    (CHAT, {"messages": USER, "top_logprobs": 1}, "top_logprobs"),
    (CHAT, {"messages": USER, "response_format": {"type": "json_object"}}, "response_format"),
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "a", "add_special_tokens": 3}, "add_special_tokens"),
    ("/detokenize", {"tokens": ["a"]}, "tokens"),
    ("/detokenize", {"tokens": [300]}, "tokens"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "param"), REFUSED, ids=[f"{i}-{row[2]}" for i, row in enumerate(REFUSED)]
)
def test_a_bad_value_is_a_400_that_names_it(client, path, body, param):
    answer = client.post(path, content=json.dumps(body))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error" and "code" in error
    assert len(error["message"]) < 400 and "\n" not in error["message"]


BODIES: list[bytes] = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe{}",
    b'\xef\xbb\xbf{"prompt": "a"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": -Infinity}',
    b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}",
    b'{"prompt": ' + b"[" * 50_000 + b"]" * 5_000 + b"}",
    b'{"x": ' + b'{"x": ' * 8_000 + b"1" + b"}" * 8_001,
    b'{"prompt": "' + b'\\"' * 20_000,
    b'{"prompt": "' + b"\\" * 40_001,
    b"'" * 1000,
]


@pytest.mark.parametrize("body", BODIES, ids=range(len(BODIES)))
def test_a_body_that_is_no_request_is_a_400(client, body):
    answer = client.post(COMPLETIONS, content=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("extra", "part"), [(b"[" * 32 + b"]" * 32, "nested"), (b"NaN", "NaN"), (b"-Infinity", "Inf")]
)
def test_fields_that_nobody_reads_are_json_too(client, extra, part):
    answer = client.post(COMPLETIONS, content=b'{"prompt": "a", "x": ' + extra + b"}")
    assert answer.status_code == 400 and part in answer.json()["error"]["message"]


def test_a_string_without_end_is_read_once():
    """A scan that began again at each of its quotes would take hours."""
    with pytest.raises(ApiError):
        parse_json(b'{"prompt": "' + b'\\"' * 2_000_000)


def test_a_lone_surrogate_is_escaped():
    assert dumped({"a": "é"}) == '{"a":"é"}'.encode()
    assert dumped({"a": "\ud800"}) == b'{"a":"\\ud800"}'


def test_the_last_of_two_equal_keys_counts(fake, client):
    body = b'{"prompt": "a", "prompt": "the cat", "seed": 5, "max_tokens": 20}'
    text = client.post(COMPLETIONS, content=body).json()["choices"][0]["text"]
    assert text == expected(fake, fake.tokenizer.encode(PROMPT), 20, 5)[1]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v2", 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("DELETE", "/", 405, "method_not_allowed"),
        ("GET", "/v1/models/", 404, "model_not_found"),
    ],
)
def test_wrong_paths_and_methods_are_objects_too(client, method, path, status, code):
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_another_model_is_not_found(client):
    answer = client.post(COMPLETIONS, content=json.dumps({**BODY, "model": "gpt-\ud800"}))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_body_is_refused(client, chunked):
    size = LIMITS.max_body_bytes + 1
    body = (b" " * 1000 for _ in range(size // 1000 + 1)) if chunked else b" " * size
    answer = client.post(COMPLETIONS, content=body)
    assert answer.status_code == 413 and answer.headers["connection"] == "close"
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.fixture(scope="module")
def locked(tokenizer) -> Iterator[TestClient]:
    access = Access(
        host="0.0.0.0",
        api_key="secret",
        allow_origins=("https://app.example",),
        allow_hosts=("llm.example",),
    )
    made = make_fake(tokenizer, access=access)
    with TestClient(made.app, base_url="http://127.0.0.1:8000") as client:
        yield client
    made.close()


KEY = {"Authorization": "Bearer secret"}


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer secret2", 401),
        ("Bearer ", 401),
        ("secret", 401),
        ("Basic secret", 401),
        ("Bearer s\u00e9cret", 401),
        ("Bearer secret", 200),
        ("bearer secret", 200),
    ],
)
def test_the_key_is_asked_for(locked, header, status):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/v1/models", "/metrics", "/tokenizer_info"):
        answer = locked.get(path, headers=headers)
        assert answer.status_code == status
        if status == 401:
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "secret" not in answer.text
    assert locked.post(COMPLETIONS, json=BODY, headers=headers).status_code == status
    assert locked.get("/health").status_code == locked.get("/").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("192.168.1.7", 200),
        ("llm.example:443", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("localhost@evil.example", 403),
        ("evil.example@localhost", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost/evil", 403),
        ("localhost:port", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
def test_the_host_must_be_this_server(locked, host, status):
    answer = locked.get("/v1/models", headers={**KEY, "Host": host})
    assert answer.status_code == status
    if status == 403:
        assert answer.json()["error"]["type"] == "permission_error"


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://app.example", 200),
        ("http://127.0.0.1:8000", 200),
        ("https://evil.example", 403),
        ("http://127.0.0.1:3000", 403),
        ("null", 403),
    ],
)
def test_pages_of_other_origins_may_not_ask(locked, origin, status):
    answer = locked.post(COMPLETIONS, json=BODY, headers={**KEY, "Origin": origin})
    assert answer.status_code == status
    shared = answer.headers.get("access-control-allow-origin")
    assert shared == (origin if origin == "https://app.example" else None)


def test_a_preflight_is_answered_for_allowed_origins_only(locked, client):
    headers = {"Access-Control-Request-Method": "POST", "Origin": "https://app.example"}
    answer = locked.options(COMPLETIONS, headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://app.example"
    answer = locked.options(COMPLETIONS, headers={**headers, "Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
    answer = client.options(COMPLETIONS, headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def hostile(draw: random.Random) -> tuple[str, bytes]:
    """A path and a body, somewhere between valid and noise."""
    values: list[Any] = [
        *(None, True, False, 0, 1, -1, 2, 3.5, 1e308, 10**25, "", "a", "\ud83d", "\x00", "é€"),
        *([], {}, [[]], [1, 2], ["a", "b"], [None], {"a": {"b": [1]}}, [[1], "a"], {"1": 5}),
        *("text", [{"role": "user", "content": "hi"}], [{"role": "user", "content": [{}]}]),
    ]
    names = (
        "prompt messages model max_tokens max_completion_tokens n best_of echo logprobs tokens "
        "top_logprobs stop stream stream_options seed temperature top_p top_k min_p logit_bias "
        "repetition_penalty presence_penalty frequency_penalty suffix response_format content"
    ).split()
    path = draw.choice([COMPLETIONS, COMPLETIONS, CHAT, CHAT, "/tokenize", "/detokenize"])
    body: dict[str, Any] = {"prompt": "a", "messages": USER, "tokens": [1], "max_tokens": 5}
    for _ in range(draw.choice([1, 1, 2, 4])):
        body[draw.choice(names)] = draw.choice(values)
    content = json.dumps(body).encode()
    for _ in range(draw.choice([0, 0, 0, 1, 3])):
        at = draw.randrange(len(content))
        mode = draw.randrange(3)
        junk = draw.choice([b"", b"[" * 99, b"\xff", b"NaN", b"1e999", b'"', b"\\u0000", b"{"])
        content = (content[:at] + junk + content[at + mode :], content[:at] + junk)[mode == 2]
        content = content or b"0"
    return path, content


def test_300_hostile_bodies_are_never_a_500(fake, client):
    draw = random.Random(20)
    seen: dict[int, int] = {}
    for number in range(300):
        path, content = hostile(draw)
        answer = client.post(path, content=content)
        seen[answer.status_code] = seen.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404), (number, path, content, answer.text)
        if answer.status_code != 200:
            assert answer.json()["error"]["message"]
    assert min(seen[200], seen[400]) > 50, "both sides of the border are visited"
    assert fake.service.pending == fake.service.in_flight == 0
    assert fake.worker.failure is None
