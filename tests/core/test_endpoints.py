"""Endpoints against a server on this machine: requests, retries, time-outs, keys that stay where they belong.

Each test runs with the standard library and, where the extra ``judge`` is installed, with the real ``openai`` client.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
import time
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from expunge import Concept
from expunge.core import endpoints
from expunge.core.endpoints import Endpoint, png_url
from expunge.errors import JudgeError, SettingError
from expunge.measure.judges.imageguard import open_imageguard
from expunge.measure.judges.vision_language import open_vision_language

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
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.seen.append((self.path, headers, body))
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
                    if not {"Content-Length", "Transfer-Encoding"} & headers.keys():
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


@pytest.fixture(
    autouse=True, params=["standard library", pytest.param("openai", marks=pytest.mark.extras)]
)
def carrier(request, monkeypatch):
    """What carries the requests."""
    if request.param == "openai":
        return pytest.importorskip("openai", reason="extra judge")
    monkeypatch.setitem(sys.modules, "openai", None)
    return None


def endpoint(server, waits=None, **options):
    waits = [] if waits is None else waits
    return Endpoint(server.url, "eye", sleep=waits.append, **options)


def test_a_question_and_a_picture_arrive_as_they_were_sent(server):
    server.script = [(200, "yes")]
    assert endpoint(server).ask("what?", PICTURE, system="be brief") == "yes"
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and "authorization" not in headers
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
    assert server.seen[0][1]["authorization"] == "Bearer s3cret"
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


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed(server, status):
    server.script = [(status, {}, {"Location": server.url}), (200, "yes")]
    with pytest.raises(JudgeError, match=str(status)):
        endpoint(server).ask("?", PICTURE)
    assert len(server.seen) == 1


def test_nothing_of_the_environment_is_sent_but_the_key(server, monkeypatch):
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "acc0unt")
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # a server on this machine is asked directly
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret\n")  # as a file has it
    server.script = [(200, "yes")]
    endpoint(server).ask("?")
    headers = server.seen[0][1]
    assert headers["authorization"] == "Bearer s3cret"
    assert not [name for name, value in headers.items() if "acc0unt" in value]


@pytest.mark.parametrize("key", ["s3cret\nX-More: yes", "s3crét"])
def test_a_key_that_no_request_can_carry_is_refused_without_showing_it(server, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(JudgeError, match=r"\$OPENAI_API_KEY holds characters") as caught:
        endpoint(server).ask("?")
    assert "s3cr" not in str(caught.value) and not server.seen


@pytest.mark.parametrize("headers", [{"Content-Length": "5000"}, {"Transfer-Encoding": "chunked"}])
def test_an_answer_that_breaks_off_is_asked_for_again(server, headers):
    waits: list[float] = []
    server.script = [(200, "yes", headers), (200, "no")]
    assert endpoint(server, waits).ask("?") == "no" and waits == [0.5]
    server.script = [(200, "yes", headers)]
    with pytest.raises(JudgeError, match="its answer broke off"):
        endpoint(server, retries=0).ask("?")


def test_an_answer_that_is_too_long_is_refused(server, monkeypatch):
    monkeypatch.setattr(endpoints, "MOST_BYTES", 1000)
    server.script = [(200, "y" * 900), (200, "y" * 1000)]
    assert endpoint(server).ask("?") == "y" * 900
    with pytest.raises(JudgeError, match="its answer is too long"):
        endpoint(server).ask("?")


def test_a_judge_asks_about_pictures_side_by_side(server):
    server.script = [(503, {}), *[(200, '{"shown": true, "confidence": 0.9}')] * 3]
    judge = open_vision_language(url=server.url, model="eye")
    pictures = np.stack([PICTURE, 255 - PICTURE, PICTURE, PICTURE // 2])  # one of them twice
    found = judge.judge(pictures, Concept("star"), ["a star"] * 4)
    assert found.hit.all() and found.score.tolist() == [0.9] * 4
    sent = [body["messages"][0]["content"][0]["image_url"]["url"] for _, _, body in server.seen]
    assert len(sent) == 4 and set(sent) == {png_url(pictures[i]) for i in (0, 1, 3)}


def test_imageguard_asks_again_where_it_cannot_read_the_answer(server):
    server.script = [(200, "I would rather not say"), (200, "safe")]
    (seen,) = open_imageguard(url=server.url, model="eye").look(PICTURE[None], "safety")
    assert (seen.state, seen.unsafe) == ("shown", ()) and len(server.seen) == 2
    address = server.seen[1][2]["messages"][0]["content"][0]["image_url"]["url"]
    assert address == png_url(PICTURE)


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
    """Its errors become ours, and the same tries are made; a stand-in, so that this is known without the extra."""
    made, lines, answers, waits = [], [], [], []

    class Failed(Exception):
        pass

    class NoLine(Failed):
        pass

    class TimeOut(NoLine):
        pass

    class Status(Failed):
        def __init__(self, code, headers):
            self.status_code, self.response = code, SimpleNamespace(headers=headers)

    def create(**body):
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        raw = json.dumps({"choices": [{"message": {"content": found}}]}).encode()
        return nullcontext(SimpleNamespace(iter_bytes=lambda: iter([raw[:9], raw[9:]])))

    def client(**options):
        made.append(options)
        streaming = SimpleNamespace(create=create)
        completions = SimpleNamespace(with_streaming_response=streaming)
        return nullcontext(SimpleNamespace(chat=SimpleNamespace(completions=completions)))

    module = SimpleNamespace(
        OpenAI=client, APIError=Failed, APITimeoutError=TimeOut, APIConnectionError=NoLine, APIStatusError=Status,
        DefaultHttpxClient=lambda **options: lines.append(options),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "openai", module)
    answers += [TimeOut(), NoLine(), Status(429, {"Retry-After": "3"}), "yes"]
    one = Endpoint("https://models.example/v1", "eye", timeout=5, sleep=waits.append)
    assert one.ask("?") == "yes"
    assert waits == [0.5, 1.0, 3.0]
    assert made[0] == {
        "base_url": one.url, "api_key": "none", "max_retries": 0, "http_client": None,
    }  # fmt: skip
    assert (
        lines[0]["follow_redirects"] is False and lines[0]["trust_env"] and lines[0]["timeout"] == 5
    )
    answers += [Status(400, {})]
    with pytest.raises(JudgeError, match="it answered 400"):
        one.ask("?")
