"""The end of a server process: signals, a failed engine, kill -9; and bytes that are no HTTP."""

import json
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.serving.fake_server import FAIL, HOLD
from tests.serving.processes import Served, serving

COMPLETIONS = "/v1/completions"


@pytest.fixture
def start(process_env) -> Callable[..., AbstractContextManager[Served]]:
    def start(seconds: float = 100) -> AbstractContextManager[Served]:
        command = [sys.executable, "-m", "tests.serving.fake_server", str(seconds)]
        return serving(command, process_env)

    return start


def held_stream(client: httpx2.Client) -> Any:
    """A request whose text has begun, and waits for the server's standard input."""
    # Some text does not end within the first step.
    body = {"prompt": [HOLD, 3], "max_tokens": 30, "seed": 1, "stream": True}
    return client.stream("POST", COMPLETIONS, json=body)


def test_sigterm_lets_requests_finish_and_refuses_new_ones(start):
    with start() as served, httpx2.Client(base_url=served.url, timeout=100) as client:
        with held_stream(client) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            served.process.send_signal(signal.SIGTERM)
            served.wait_for("^SIGTERM: finishing 1 requests, at most 100 s")
            late = httpx2.post(served.url + COMPLETIONS, json={"prompt": "a"})
            assert late.status_code == 503
            assert late.json()["error"]["type"] == "service_unavailable_error"
            assert httpx2.get(served.url + "/health").status_code == 503
            assert httpx2.get(served.url + "/metrics").status_code == 200
            served.process.stdin.write("\n" * 20)
            served.process.stdin.flush()
            rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"]
        code, log = served.end()
    assert code == 0
    assert not [line for line in log if "Traceback" in line or "error" in line]


def test_what_does_not_finish_in_time_gets_an_error(start):
    with start(0.05) as served, httpx2.Client(base_url=served.url, timeout=100) as client:
        with held_stream(client) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        served.process.stdin.write("\n" * 20)
        served.process.stdin.flush()
        assert json.loads(rest[-1][6:])["error"]["type"] == "service_unavailable_error"
        code, log = served.end()
    assert code == 0
    assert not [line for line in log if "Traceback" in line]


@pytest.mark.parametrize(
    ("signals", "expected"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGTERM, signal.SIGTERM], 128 + 15),
    ],
    ids=["Ctrl-C", "SIGTERM twice"],
)
def test_other_signals(start, signals, expected):
    with start() as served, httpx2.Client(base_url=served.url, timeout=100) as client:
        if len(signals) == 1:
            served.process.send_signal(signals[0])
        else:
            with held_stream(client) as answer:
                lines = answer.iter_lines()  # closes the connection when it is collected
                next(lines)
                served.process.send_signal(signals[0])
                served.wait_for("finishing 1 requests")
                served.process.send_signal(signals[1])
                assert served.end()[0] == expected
        assert served.end()[0] == expected


def test_an_engine_that_fails_ends_the_server_with_one_line(start):
    body = {"prompt": [FAIL, 3], "max_tokens": 30, "seed": 1}
    with start() as served:
        answer = httpx2.post(served.url + COMPLETIONS, json=body)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        code, log = served.end()
    assert code == 1
    assert log[-1] == "error: the engine failed: RuntimeError: the device is gone"
    assert not [line for line in log if "Traceback" in line]


def test_a_killed_server_starts_again(start):
    body = {"prompt": "the cat", "max_tokens": 5, "seed": 1}
    with start() as served:
        before = httpx2.post(served.url + COMPLETIONS, json=body).json()["choices"]
        served.process.kill()
        assert served.end()[0] == -signal.SIGKILL
    with start() as served:
        assert httpx2.post(served.url + COMPLETIONS, json=body).json()["choices"] == before


@pytest.fixture(scope="module")
def served(process_env_of_module) -> Iterator[Served]:
    command = [sys.executable, "-m", "tests.serving.fake_server", "100"]
    with serving(command, process_env_of_module) as served:
        yield served


def raw(served: Served, content: bytes) -> bytes:
    """All that the server answers to bytes on a connection that then ends."""
    place = urlsplit(served.url)
    with socket.create_connection((place.hostname, place.port), timeout=100) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


TOO_LARGE = (b"400", b"431")  # whether it comes in pieces or at once
GET = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (GET + b"\r\n", b"200"),
        (GET.replace(b"/v1/models", b"/v1/models?key=%ff&prompt=hidden") + b"\r\n", b"200"),
        (GET.replace(b"/v1/models", b"/%00%ff/..//") + b"\r\n", b"404"),
        (b"GET /v1/models HTTP/1.0\r\n\r\n", b"403"),  # no Host
        (GET + b"X: " + b"x" * 20_000 + b"\r\n\r\n", TOO_LARGE),
        (GET + b"X: y\r\n" * 5_000 + b"\r\n", TOO_LARGE),
        (GET.replace(b"models", b"models?" + b"x" * 20_000) + b"\r\n", TOO_LARGE),
        (b"\x16\x03\x01\x02\x00\x01" * 20, b"400"),  # TLS
        (GET + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n", b"200"),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n{}", b""),
        (b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}", b"400"),
    ],
    ids=range(11),
)
def test_bytes_on_the_wire(served, content, status):
    assert raw(served, content)[9:12] in (status if isinstance(status, tuple) else (status,))
    assert httpx2.get(served.url + "/health").status_code == 200
    assert not [line for line in served.lines if "Traceback" in line or "hidden" in line]


def test_a_stream_arrives_while_it_is_written(served):
    with httpx2.Client(base_url=served.url, timeout=100) as client, held_stream(client) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines)[6:])["choices"][0]["finish_reason"] is None
    served.wait_for(r"^POST /v1/completions 200")  # the client left, and the server knows
    # The step that is under way goes on. Then the row is free, and no step waits any longer.
    served.process.stdin.write("\n")
    served.process.stdin.flush()
    answer = httpx2.post(served.url + COMPLETIONS, json={"prompt": "a", "n": 4}, timeout=100)
    assert answer.status_code == 200


def test_the_log_names_routes_and_no_prompt(served):
    body = {"prompt": "a secret text", "max_tokens": 2}
    httpx2.post(f"{served.url}{COMPLETIONS}?prompt=hidden", json=body)
    httpx2.post(f"{served.url}/v1/hidden", json=body)
    served.wait_for(r"^POST /v1/completions 200, \d+\.\d\d s$")
    served.wait_for(r"^POST other 404, ")
    assert not [line for line in served.lines if "hidden" in line or "secret" in line]
