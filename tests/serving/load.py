"""Many clients of a server at once: some leave early, some send nonsense; every text is checked."""

import asyncio
import contextlib
import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2

from sheepop_jax.data.tokenizer import Tokenizer
from sheepop_jax.generation.requests import Completion
from tests.serving.processes import PATIENCE, Served

CLIENTS = 64
PATH = "/v1/completions"
GROWTH = 30e6  # bytes: of the allocators, which keep what was free for a moment
IDLE = ("texts_active", "texts_waiting", "texts_pending")
TOO_LONG = b"Content-Length: 99999999999\r\n\r\n"
CUT = b'Content-Length: 50\r\n\r\n{"prompt": "a", '

# Bodies, and the status of the answer.
MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"\xff\xfe", 400),
    (b"[" * 5000, 400),
    (b'{"prompt": "a", "temperature": "hot"}', 400),
    (b'{"prompt": "a", "temperature": NaN}', 400),
    (b'{"prompt": "a", "n": -1}', 400),
    (b'{"prompt": "a", "n": 100000}', 400),
    (b'{"prompt": [99999]}', 400),
    (json.dumps({"prompt": [5] * 5000}).encode(), 400),
    (b'{"prompt": "a", "max_tokens": 1000000000}', 400),
    (b'{"prompt": "a", "seed": -1}', 400),
    (b'{"prompt": "a", "logit_bias": {"99999": 1}}', 400),
    (b'{"prompt": "a", "suffix": "b"}', 400),
    (b'{"prompt": "a", "model": "another"}', 404),
)


@dataclass(frozen=True)
class Known:
    """A prompt with settings, and what `generate` writes for it alone.

    Attributes:
        body: fields of the request but for those that cut the text.
        ids: tokens of the prompt.
        samples: its texts, of as many tokens as a request may ask for.
    """

    body: dict[str, Any]
    ids: list[int]
    samples: Sequence[Completion]


@dataclass(frozen=True)
class Asked:
    """A request, and the texts and reasons of its answer."""

    body: dict[str, Any]
    wanted: list[tuple[str, str]]


@dataclass
class Load:
    """Requests of many clients, and how they ended.

    Attributes:
        url: of the server.
        headers: of each request.
        tokenizer: of its model.
        known: what is asked for.
        longest: most new tokens of a request.
        problems: answers that are wrong.
        counts: requests by kind.
        latency: seconds of requests whose answer was read to its end.
        first_token: seconds to the first text of streams.
    """

    url: str
    headers: dict[str, str]
    tokenizer: Tokenizer
    known: Sequence[Known]
    longest: int
    problems: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    latency: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)

    def run(self, seed: str, requests: int | None = None, seconds: float = 0) -> None:
        """Sends requests from all clients, `requests` of them or for some time.

        Args:
            seed: of the choice of requests.
            requests: number of requests; None for `seconds`.
            seconds: time in which requests are begun.
        """
        asyncio.run(self._run(seed, requests, time.monotonic() + seconds))

    def report(self) -> str:
        """Requests by kind, and percentiles of the times."""
        lines = [", ".join(f"{kind} {n}" for kind, n in sorted(self.counts.items()))]
        for name in ("latency", "first_token"):
            values = sorted(getattr(self, name))
            shown = [f"p{p} {1e3 * values[len(values) * p // 100]:.0f} ms" for p in (50, 99)]
            lines.append(f"{name}: {', '.join(shown)}, of {len(values)}")
        return "\n".join(lines)

    async def _run(self, seed: str, requests: int | None, ends: float) -> None:
        counter = iter(range(requests)) if requests is not None else _until(ends)
        limits = httpx2.Limits(max_connections=2 * CLIENTS)
        made = httpx2.AsyncClient(
            base_url=self.url, headers=self.headers, timeout=PATIENCE, limits=limits
        )
        async with made as client, asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(client, random.Random(f"{seed}/{number}"), counter))

    async def _client(
        self, client: httpx2.AsyncClient, draw: random.Random, counter: Iterator[int]
    ) -> None:
        kinds = {
            self._whole: 30,
            self._stream: 30,
            self._leave_stream: 12,
            self._leave: 8,
            self._malformed: 12,
            self._raw: 8,
        }
        for _ in counter:
            [kind] = draw.choices(list(kinds), list(kinds.values()))
            await kind(client, draw)
            self.counts[kind.__name__.strip("_")] += 1

    async def _whole(self, client: httpx2.AsyncClient, draw: random.Random) -> None:
        asked = self._draw(draw)
        while True:
            begin = time.perf_counter()
            answer = await client.post(PATH, json=asked.body)
            if answer.status_code != 429:
                break
            await self._refused(answer)
        self.latency.append(time.perf_counter() - begin)
        if answer.status_code != 200:
            self.problems.append(f"{asked.body}: {answer.status_code} {answer.text}")
            return
        choices = answer.json()["choices"]
        self._compare(asked, [(choice["text"], choice["finish_reason"]) for choice in choices])

    async def _stream(self, client: httpx2.AsyncClient, draw: random.Random) -> None:
        asked = self._draw(draw)
        texts, reasons = [""] * len(asked.wanted), [""] * len(asked.wanted)
        begin, first = time.perf_counter(), 0.0
        async for event in self._events(client, asked):
            first = first or time.perf_counter() - begin
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
                reasons[choice["index"]] = choice["finish_reason"] or ""
        self.latency.append(time.perf_counter() - begin)
        self.first_token.append(first)
        self._compare(asked, list(zip(texts, reasons, strict=True)))

    async def _leave_stream(self, client: httpx2.AsyncClient, draw: random.Random) -> None:
        asked, left = self._draw(draw), draw.randrange(4)
        async with contextlib.aclosing(self._events(client, asked)) as events:
            async for _ in events:
                if not left:
                    break
                left -= 1

    async def _leave(self, client: httpx2.AsyncClient, draw: random.Random) -> None:
        body = json.dumps(self._draw(draw).body).encode()
        content = self._head + b"Content-Length: %d\r\n\r\n" % len(body) + body
        await self._connection(content, draw.choice([0, 0.001, 0.01, 0.05]))

    async def _malformed(self, client: httpx2.AsyncClient, draw: random.Random) -> None:
        body, status = draw.choice(MALFORMED)
        answer = await client.post(PATH, content=body)
        if answer.status_code != status or not answer.json()["error"]["message"]:
            self.problems.append(f"{body[:100]!r}: {answer.status_code} {answer.text}")

    async def _raw(self, client: httpx2.AsyncClient, draw: random.Random) -> None:
        head = self._head
        content, status = draw.choice(
            [  # None: the client leaves without an answer
                (b"\x16\x03\x01\x02\x00\x01" * 20, 400),
                (head + TOO_LONG, 413),
                (head + CUT, None),
                (head[:20], None),
                (b"", None),
            ]
        )
        answer = await self._connection(content, None if status else 0)
        if status and not answer.startswith(b"HTTP/1.1 %d " % status):
            self.problems.append(f"{content[:100]!r}: {answer[:100]!r}")

    @property
    def _head(self) -> bytes:
        lines = [f"POST {PATH} HTTP/1.1", "Host: localhost"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "".join(line + "\r\n" for line in lines).encode()

    async def _connection(self, content: bytes, leaves: float | None) -> bytes:
        """Sends bytes; leaves after some seconds, or returns all of the answer."""
        place = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(place.hostname, place.port)
        try:
            writer.write(content)
            if leaves is None:
                async with asyncio.timeout(PATIENCE):
                    return await reader.read()
            await writer.drain()
            await asyncio.sleep(leaves)
            return b""
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _events(
        self, client: httpx2.AsyncClient, asked: Asked
    ) -> AsyncIterator[dict[str, Any]]:
        """The events of a stream."""
        body, done = {**asked.body, "stream": True}, False
        while not done:
            async with client.stream("POST", PATH, json=body) as answer:
                if answer.status_code == 429:
                    await self._refused(answer)
                    continue
                async for line in answer.aiter_lines():
                    if line == "data: [DONE]":
                        done = True
                    elif line:
                        yield json.loads(line.removeprefix("data: "))
                if not done:
                    raise AssertionError(f"{body}: {answer.status_code}, and no end")

    async def _refused(self, answer: httpx2.Response) -> None:
        self.counts["queue full"] += 1
        if not 1 <= int(answer.headers["Retry-After"]) <= 60:
            self.problems.append(f"Retry-After {answer.headers['Retry-After']}")
        await asyncio.sleep(0.05)

    def _compare(self, asked: Asked, found: list[tuple[str, str]]) -> None:
        if found != asked.wanted:
            self.problems.append(f"{asked.body}:\n  {found}\n  not {asked.wanted}")

    def _draw(self, draw: random.Random) -> Asked:
        """A text or two of some length, sometimes with a stop string from the first one."""
        known = draw.choice(self.known)
        length, n = draw.randint(1, self.longest), draw.randint(1, len(known.samples))
        body = {**known.body, "max_tokens": length, "n": n}
        wanted = []
        for sample in known.samples[:n]:
            text = self.tokenizer.decode_after(known.ids, sample.tokens[:length])
            wanted.append((text, "stop" if len(sample.tokens) < length else "length"))
        first = wanted[0][0]
        if len(first) > 8 and draw.random() < 0.3:
            begin = draw.randrange(4, len(first) - 2)
            stop = body["stop"] = first[begin : begin + 3]
            wanted = [
                (text.partition(stop)[0], "stop" if stop in text else reason)
                for text, reason in wanted
            ]
        return Asked(body, wanted)


def bear(served: Served, load: Load, warmup: int, **amount: Any) -> None:
    """Loads a server twice, checks all texts, and that nothing is left in it.

    Its memory may grow in the warmup, and by `GROWTH` afterwards.
    """
    at_start = _files(served)
    load.run("warmup", requests=warmup)
    before = _memory_when_idle(served, load, at_start)
    load.run("load", **amount)
    after = _memory_when_idle(served, load, at_start)
    print(f"{load.report()}\nmemory: {before / 1e6:.0f} MB, then {after / 1e6:.0f} MB")
    assert not load.problems, "\n".join(load.problems[:5])
    assert after < before + GROWTH, (before, after)
    assert not [line for line in served.lines if "Traceback" in line or " 500" in line]


def _files(served: Served) -> int:
    """Open files and sockets of a server."""
    return len(os.listdir(f"/proc/{served.process.pid}/fd"))


def _memory_when_idle(served: Served, load: Load, open_files: int) -> int:
    """Waits until a server has nothing left to do; returns its resident bytes."""
    ends, headers = time.monotonic() + PATIENCE, {**load.headers, "Connection": "close"}
    while True:
        page = httpx2.get(served.url + "/metrics", headers=headers).text
        left = {name: re.findall(rf"(?m)^sheepop_jax_{name} (\d+)$", page) for name in IDLE}
        files = _files(served)
        if all(values == ["0"] for values in left.values()) and files <= open_files:
            break
        assert time.monotonic() < ends, (left, files, open_files)
        time.sleep(0.05)
    status = Path(f"/proc/{served.process.pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


def _until(ends: float) -> Iterator[int]:
    number = 0
    while time.monotonic() < ends:
        yield number
        number += 1
