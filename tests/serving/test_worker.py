"""The worker thread: clients that leave, engines that fail, a full queue, requests out of time."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sheepop_jax.errors import InputError
from sheepop_jax.generation.requests import Request
from sheepop_jax.serving.settings import Limits
from sheepop_jax.serving.worker import Worker
from tests.serving.fakes import Fake, make_fake, text_of

PATIENCE = 60  # seconds until something that has to happen counts as not happening
COMPLETIONS = "/v1/completions"


@pytest.fixture
def make(tokenizer) -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def make(**more: Any) -> Fake:
        made.append(make_fake(tokenizer, **more))
        return made[-1]

    yield make
    for fake in made:
        fake.close()


class Client:
    """One HTTP request to the app, whose connection a test closes when it likes."""

    def __init__(self, app: Any, body: dict[str, Any] | None, length: int | None = None):
        """Sends a body; None sends a first part, and nothing more."""
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        content, more = json.dumps(body).encode(), body is None
        self._messages.put_nowait({"type": "http.request", "body": content, "more_body": more})
        self.sent: list[dict[str, Any]] = []
        self.arrived = asyncio.Event()  # part of a body
        length = len(content) if length is None else length
        headers = [(b"host", b"localhost"), (b"content-length", str(length).encode())]
        scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "query_string": b""}
        scope |= {"headers": headers, "asgi": {"version": "3.0"}, "root_path": ""}
        self.task = asyncio.ensure_future(app(scope, self._messages.get, self._send))

    async def _send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        if message.get("body"):
            self.arrived.set()

    def leave(self) -> None:
        self._messages.put_nowait({"type": "http.disconnect"})

    async def done(self) -> None:
        await asyncio.wait_for(self.task, PATIENCE)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.001)


def long_seed(fake: Fake, prompt: str, limit: int) -> int:
    """A seed whose text does not end early."""
    ids = tuple(fake.tokenizer.encode(prompt))
    end = fake.tokenizer.end_of_text
    requests = (Request(ids, max_new_tokens=limit, seed=seed) for seed in range(10_000))
    return next(r.seed for r in requests if len(text_of(r, end)[0]) == limit)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row_before_the_next_step(make, stream):
    fake = make(slots=1)
    body = {"prompt": "the cat", "max_tokens": 120, "stream": stream}
    body["seed"] = long_seed(fake, "the cat", 120)

    async def test() -> None:
        fake.engine.gate.clear()
        leaving, waiting = Client(fake.app, body), Client(fake.app, {**body, "max_tokens": 4})
        await until(lambda: fake.service.pending == 2)
        leaving.leave()
        await leaving.done()
        assert fake.service.pending == 1
        fake.engine.gate.set()
        await waiting.done()
        assert waiting.status == 200

    asyncio.run(test())
    # A step that was under way may be the leaver's; its 120 tokens would have taken 40.
    assert fake.engine.steps <= 3
    assert fake.engine.num_active == fake.engine.num_waiting == fake.service.in_flight == 0
    assert "sheepop_jax_disconnects_total 1\n" in fake.service.metrics.render([])


def test_a_client_that_leaves_in_the_middle_of_its_stream(make):
    fake = make(slots=2)
    body = {"prompt": "the cat", "max_tokens": 300, "stream": True, "n": 5}
    body["seed"] = long_seed(fake, "the cat", 300)

    fake.engine.hold_after = 2

    async def test() -> None:
        client = Client(fake.app, body)
        await asyncio.wait_for(client.arrived.wait(), PATIENCE)
        client.leave()
        await client.done()
        fake.engine.gate.set()
        assert b"[DONE]" not in client.body
        worker = fake.worker
        await until(lambda: worker.num_active == worker.num_waiting == 0)  # as /metrics says
        other = Client(fake.app, {**body, "n": 1, "stream": False, "max_tokens": 2})
        await other.done()
        assert json.loads(other.body)["usage"]["completion_tokens"] == 2

    asyncio.run(test())
    assert fake.engine.steps <= 4, "300 tokens would take 100 steps"
    assert fake.engine.num_active == fake.engine.num_waiting == fake.service.pending == 0


def test_a_full_queue_is_429_and_says_when_to_come_again(make):
    fake = make(slots=1, limits=Limits(max_queue=2))
    fake.engine.gate.clear()

    async def test() -> None:
        first = Client(fake.app, {"prompt": "a", "n": 2})
        await until(lambda: fake.service.pending == 2)
        second = Client(fake.app, {"prompt": "a", "n": 2})
        await second.done()
        assert second.status == 429 and int(second.headers[b"retry-after"]) >= 1
        error = json.loads(second.body)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        third = Client(fake.app, {"prompt": "a"})
        await until(lambda: fake.service.pending == 3)
        fake.engine.gate.set()
        await asyncio.gather(first.done(), third.done())
        assert first.status == third.status == 200
        never = Client(fake.app, {"prompt": "a", "n": 4})
        await never.done()
        assert never.status == 400, "no queue will ever have room for it"

    asyncio.run(test())
    assert fake.service.pending == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_out_of_time_is_ended(make, stream):
    fake = make(limits=Limits(request_seconds=0.05))
    fake.engine.gate.clear()

    async def test() -> Client:
        client = Client(fake.app, {"prompt": "a", "stream": stream})
        await client.done()
        return client

    client = asyncio.run(test())
    assert client.status == (200 if stream else 504)
    lines = client.body.decode().removeprefix("data: ").strip()
    assert json.loads(lines)["error"]["type"] == "timeout_error"
    assert fake.service.pending == 0


def test_a_body_that_does_not_arrive_is_ended(make):
    fake = make(limits=Limits(request_seconds=0.05))

    async def test() -> Client:
        client = Client(fake.app, None)
        await client.done()
        return client

    assert asyncio.run(test()).status == 408


def test_a_body_that_will_be_too_large_is_not_waited_for(make):
    fake = make()

    async def test() -> Client:
        client = Client(fake.app, None, length=10**9)
        await client.done()
        return client

    assert asyncio.run(test()).status == 413


@pytest.mark.parametrize("stream", [True, False])
def test_an_engine_that_fails_ends_every_request(make, stream):
    fake = make(slots=1)
    fake.engine.gate.clear()

    async def test() -> None:
        body = {"prompt": "a", "stream": stream}
        clients = [Client(fake.app, body) for _ in range(3)]
        await until(lambda: fake.service.pending == 3)
        fake.engine.failure = RuntimeError("the device is gone")
        fake.engine.gate.set()
        late = Client(fake.app, body)
        for client in [*clients, late]:
            await client.done()
            assert client.status == (200 if stream else 500)
            assert b'"type":"server_error"' in client.body and b"[DONE]" not in client.body
            assert b"device" not in client.body
        after = Client(fake.app, body)
        await after.done()
        assert b'"type":"server_error"' in after.body

    asyncio.run(test())
    assert str(fake.worker.failure) == "the device is gone"
    assert fake.service.pending == 0


def test_an_engine_that_cannot_be_made_is_an_error_of_start(tokenizer):
    def broken() -> Any:
        raise InputError("context", 1, "more")

    with pytest.raises(InputError, match="context"):
        Worker(broken, lambda texts, top: [], tokenizer).start()


def test_a_request_that_the_engine_refuses_is_a_400(make, monkeypatch):
    fake = make()
    refusal = InputError("prompt", "401 tokens", "fewer", "`truncate` left")

    def refuse(request: Request) -> int:
        if request.sample == 1:
            raise refusal
        return type(fake.engine).add(fake.engine, request)

    monkeypatch.setattr(fake.engine, "add", refuse)

    async def test() -> None:
        client = Client(fake.app, {"prompt": "a", "n": 3})
        await client.done()
        assert client.status == 400 and b"truncate" not in client.body
        other = Client(fake.app, {"prompt": "a"})
        await other.done()
        assert other.status == 200

    asyncio.run(test())
    assert fake.engine.num_active == fake.engine.num_waiting == 0


def test_scores_that_cannot_be_computed_are_a_400_and_texts_go_on(make, monkeypatch):
    fake = make()

    def refuse(texts: Any, top: int) -> Any:
        raise InputError("text", "logits", "finite logits")

    monkeypatch.setattr(fake.worker, "_score", refuse)

    async def test() -> None:
        body = {"prompt": "a b c", "max_tokens": 30}
        scored = Client(fake.app, {**body, "echo": True, "logprobs": 1})
        plain = Client(fake.app, body)
        await asyncio.gather(scored.done(), plain.done())
        assert (scored.status, plain.status) == (400, 200)

    asyncio.run(test())
    assert fake.worker.failure is None and fake.engine.num_active == 0


def test_while_it_shuts_down_requests_finish_and_new_ones_are_503(make):
    fake = make(slots=1)
    fake.engine.gate.clear()

    async def test() -> None:
        running = Client(fake.app, {"prompt": "a", "n": 2})
        await until(lambda: fake.service.pending == 2)
        fake.service.draining = True
        refused = Client(fake.app, {"prompt": "a"})
        await refused.done()
        assert refused.status == 503 and refused.headers[b"connection"] == b"close"
        error = json.loads(refused.body)["error"]
        assert error["type"] == "service_unavailable_error"
        fake.engine.gate.set()
        await running.done()
        assert running.status == 200 and len(json.loads(running.body)["choices"]) == 2

    asyncio.run(test())


def test_a_long_batch_of_prompts_to_score_lets_texts_go_on(make, monkeypatch):
    """Between two groups of prompts, the texts that are being written take a step."""
    fake = make(slots=4)
    order: list[str] = []
    score, step = fake.worker._score, fake.engine.step

    def watched_score(texts: Any, top: int) -> Any:
        order.append(f"score {len(texts)}")
        return score(texts, top)

    def watched_step() -> Any:
        order.append("step")
        return step()

    monkeypatch.setattr(fake.worker, "_score", watched_score)
    monkeypatch.setattr(fake.engine, "step", watched_step)
    fake.engine.gate.clear()

    async def test() -> None:
        body = {"prompt": "the cat", "max_tokens": 30, "seed": long_seed(fake, "the cat", 30)}
        text = Client(fake.app, body)
        await until(lambda: fake.service.pending == 1)
        prompts = ["a b c"] * 20
        scored = Client(fake.app, {"prompt": prompts, "max_tokens": 0, "echo": True, "logprobs": 1})
        await until(lambda: fake.service.pending == 21)
        fake.engine.gate.set()
        await asyncio.gather(text.done(), scored.done())

    asyncio.run(test())
    found = [place for place, name in enumerate(order) if name.startswith("score")]
    assert [order[place] for place in found] == ["score 8", "score 8", "score 4"]
    assert all(b - a == 2 for a, b in zip(found, found[1:], strict=False))


def test_many_clients_at_once_each_get_their_own_text(make):
    fake = make(slots=3, limits=Limits(max_queue=200))

    async def one(number: int) -> None:
        ids = fake.tokenizer.encode(f"cat {number}")
        body = {"prompt": f"cat {number}", "max_tokens": number, "seed": number}
        client = Client(fake.app, {**body, "stream": bool(number % 2)})
        if number % 5 == 4:
            client.leave()
        await client.done()
        if number % 5 == 4:
            return
        request = Request(tuple(ids), max_new_tokens=number, seed=number)
        tokens, _ = text_of(request, fake.tokenizer.end_of_text)
        text = client.body.decode()
        if number % 2:
            lines = [json.loads(x[6:]) for x in text.split("\n\n") if x.startswith("data: {")]
            found = "".join(line["choices"][0]["text"] for line in lines)
        else:
            found = json.loads(text)["choices"][0]["text"]
        assert found == fake.tokenizer.decode_after(ids, tokens)

    async def test() -> None:
        await asyncio.gather(*(one(number) for number in range(60)))

    asyncio.run(test())
    assert fake.service.pending == fake.engine.num_active == fake.engine.num_waiting == 0


def test_the_thread_ends_when_it_is_told(make):
    fake = make()
    fake.close()
    assert fake.worker._thread not in threading.enumerate()
