"""The fence around the program, without the program: loopback only, own host names, headers."""

import asyncio
import subprocess
import sys

import pytest

from expunge.app.server import Guard, check_host
from expunge.errors import MissingExtra, SettingError


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.0.7", "example.org", "", "127.0.0.1.evil.org"]
)
def test_other_hosts_are_refused_in_words(host):
    with pytest.raises(SettingError, match=r"127\.0\.0\.1 only"):
        check_host(host)


def test_this_machine_is_allowed():
    check_host("127.0.0.1")
    check_host("localhost")


async def _page(scope, receive, send):
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-security-policy", b"old"), (b"x", b"y")],
        }
    )
    await send({"type": "http.response.body", "body": b"page"})


def ask(path="/", host="127.0.0.1:7860"):
    sent = []

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode())] if host is not None else []
    asyncio.run(Guard(_page)({"type": "http", "path": path, "headers": headers}, None, send))
    return (
        sent[0]["status"],
        {k.decode(): v.decode() for k, v in sent[0]["headers"]},
        sent[1]["body"],
    )


@pytest.mark.parametrize("host", ["evil.org", "127.0.0.1.evil.org:7860", "10.0.0.1:7860", None])
def test_a_rebound_name_is_turned_away(host):
    status, _, body = ask(host=host)
    assert status == 400 and body != b"page"


def test_the_page_talks_to_this_program_only():
    status, headers, body = ask(host="localhost:7860")
    policy = headers["content-security-policy"]
    assert status == 200 and body == b"page" and headers["x"] == "y"
    assert (
        "default-src 'self'" in policy and "connect-src 'self'" in policy and "http" not in policy
    )
    assert headers["x-content-type-options"] == "nosniff"


def test_a_file_may_not_run_anything():
    _, headers, _ = ask("/gradio_api/file=/runs/audit/report.html")
    assert (
        "default-src 'none'" in headers["content-security-policy"]
        and "sandbox" in headers["content-security-policy"]
    )


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch, tmp_path):
    from expunge.app import launch

    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtra, match=r"expunge\[ui\]"):
        launch(None, tmp_path, browser=False, block=False)


def test_the_command_refuses_a_host_before_anything_is_loaded():
    code = "import sys; sys.argv = ['expunge', 'ui', '--host', '0.0.0.0']; from expunge.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (
        done.returncode == 1
        and "host '0.0.0.0' is refused" in done.stderr
        and "Traceback" not in done.stderr
    )
