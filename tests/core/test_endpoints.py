"""Endpoints against a server on this machine: requests, retries, time-outs, keys that stay where they belong."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from expunge.core.endpoints import Endpoint, png_url
from expunge.errors import JudgeError, SettingError

PICTURE = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)


class StandIn:
    """A chat server whose answers are a script: (status, content or body, headers, seconds to wait)."""

    def __init__(self) -> None:
        self.script: list = []
        self.seen: list = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append((self.path, dict(self.headers), body))
                given = outer.script.pop(0)
                status, content, headers, wait = (*given, *((200, "", {}, 0)[len(given) :]))
                time.sleep(wait)
                if isinstance(content, str):
                    content = {"choices": [{"message": {"content": content}}]}
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                try:
                    self.send_response(status)
                    for name, value in headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(raw)))
                    self.end_headers()
                    self.wfile.write(raw)
                except OSError:  # the other side has given up waiting
                    pass

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    made = StandIn()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(autouse=True)
def no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def endpoint(server, waits=None, **options):
    waits = [] if waits is None else waits
    return Endpoint(server.url, "eye", sleep=waits.append, **options)


def test_a_question_and_a_picture_arrive_as_they_were_sent(server):
    server.script = [(200, "yes")]
    assert endpoint(server).ask("what?", PICTURE, system="be brief") == "yes"
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    assert body["model"] == "eye" and body["temperature"] == 0 and body["max_tokens"] == 200
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    image, text = body["messages"][1]["content"]
    assert text == {"type": "text", "text": "what?"}
    address = image["image_url"]["url"]
    assert address == png_url(PICTURE) and address.startswith("data:image/png;base64,")
    back = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))
    np.testing.assert_array_equal(back, PICTURE)


def test_parts_of_an_answer_are_joined(server):
    server.script = [
        (200, {"choices": [{"message": {"content": [{"text": "un"}, {"text": "safe"}]}}]})
    ]
    assert endpoint(server).ask("?") == "unsafe"


def test_the_key_comes_from_the_environment_and_is_shown_nowhere(server, monkeypatch):
    monkeypatch.setenv("EYE_KEY", "s3cret")
    server.script = [(200, "yes"), (401, {"error": "s3cret is wrong"})]
    made = endpoint(server, key_variable="EYE_KEY")
    made.ask("?")
    assert server.seen[0][1]["Authorization"] == "Bearer s3cret"
    with pytest.raises(JudgeError, match="401") as caught:
        made.ask("?")
    assert "s3cret" not in f"{caught.value} {made!r}"


def test_a_key_does_not_go_over_an_open_line(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    with pytest.raises(JudgeError, match="unencrypted") as caught:
        Endpoint("http://models.example/v1", "eye").ask("?")
    assert "s3cret" not in str(caught.value)


def test_it_comes_again_and_waits_as_long_as_it_is_told(server):
    waits: list[float] = []
    server.script = [(503, {}), (429, {}, {"Retry-After": "7"}), (500, {}), (200, "no")]
    assert endpoint(server, waits).ask("?") == "no"
    assert waits == [0.5, 7.0, 2.0]


def test_it_gives_up_after_its_tries(server):
    waits: list[float] = []
    server.script = [(500, {})] * 3
    with pytest.raises(
        JudgeError, match=r"eye at 127.0.0.1 could not be asked after 3 tries: it answered 500"
    ):
        endpoint(server, waits, retries=2).ask("?")
    assert len(waits) == 2 and not server.script


def test_what_cannot_help_is_not_tried_again(server):
    server.script = [(404, {})]
    with pytest.raises(JudgeError, match="it answered 404"):
        endpoint(server).ask("?")


def test_a_slow_answer_is_a_time_out(server):
    server.script = [(200, "late", {}, 0.6), (200, "in time")]
    assert endpoint(server, timeout=0.2, retries=1).ask("?") == "in time"


def test_a_redirect_is_not_followed(server):
    server.script = [(302, {}, {"Location": server.url})]
    with pytest.raises(JudgeError, match="302"):
        endpoint(server).ask("?")
    assert len(server.seen) == 1


def test_nobody_there(server):
    made = endpoint(server, retries=1)
    server.server.server_close()
    with pytest.raises(JudgeError, match="no connection"):
        Endpoint("http://127.0.0.1:9/v1", "eye", retries=0).ask("?")
    assert made.host == "127.0.0.1"


@pytest.mark.parametrize(
    "content", [{}, {"choices": []}, {"choices": [{"message": {"content": None}}]}, "  ", b"<html>"]
)
def test_an_answer_without_text_is_an_error(server, content):
    server.script = [(200, content)]
    with pytest.raises(JudgeError, match=r"without any text|not JSON"):
        endpoint(server).ask("?")


@pytest.mark.parametrize(
    ("url", "words"),
    [("ftp://x/v1", "no http"), ("models", "no http"), ("https://me:pw@x/v1", "OPENAI_API_KEY")],
)
def test_bad_addresses_are_refused(url, words):
    with pytest.raises(SettingError, match=words) as caught:
        Endpoint(url, "eye")
    assert "pw" not in str(caught.value)


def test_the_openai_client_carries_the_request_where_it_is_installed(monkeypatch):
    """Its errors become ours, and the same tries are made."""
    made, answers, waits = [], [], []

    class TimeOut(Exception):
        pass

    class NoLine(Exception):
        pass

    class Status(Exception):
        def __init__(self, code, headers):
            self.status_code, self.response = code, SimpleNamespace(headers=headers)

    def create(**body):
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(model_dump=lambda: {"choices": [{"message": {"content": found}}]})

    def client(**options):
        made.append(options)
        return SimpleNamespace(chat=SimpleNamespace(completions=SimpleNamespace(create=create)))

    module = SimpleNamespace(
        OpenAI=client, APITimeoutError=TimeOut, APIConnectionError=NoLine, APIStatusError=Status
    )
    monkeypatch.setitem(sys.modules, "openai", module)
    answers += [TimeOut(), NoLine(), Status(429, {"Retry-After": "3"}), "yes"]
    one = Endpoint("https://models.example/v1", "eye", timeout=5, sleep=waits.append)
    assert one.ask("?") == "yes"
    assert waits == [0.5, 1.0, 3.0]
    assert made[0] == {"base_url": one.url, "api_key": "none", "timeout": 5, "max_retries": 0}
    answers += [Status(400, {})]
    with pytest.raises(JudgeError, match="it answered 400"):
        one.ask("?")
