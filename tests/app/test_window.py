"""The page itself, in headless Chromium: opened, used as a person uses it, looked at by what it shows.

It needs the extra `ui` and a Chromium, so it runs where they are.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .browser import CHROMIUM, Browser

NEEDED = {"gradio (extra `ui`)": importlib.util.find_spec("gradio"), "chromium": CHROMIUM}
MISSING = [name for name, there in NEEDED.items() if not there]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"the page needs {' and '.join(MISSING)}, which is not installed here"
    ),
    pytest.mark.timeout(600),
]

START = """
import sys
from expunge.app import launch
launch({model!r}, {runs!r}, browser=False)
"""
HOSTILE = "a <b>red</b> star ${1+1} {{x}} <img src=x onerror=document.title=666>"


class Window:
    """A running program, and a page of it."""

    def __init__(self, folder: Path, model: str) -> None:
        self.runs = folder / "runs"
        code = START.format(model=model, runs=str(self.runs))
        self.log = (folder / "log.txt").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-c", code], stdout=self.log, stderr=self.log, text=True
        )
        self.address = self._address(folder / "log.txt")
        self.browser = Browser(folder / "profile")
        self.browser.open(self.address)

    def _address(self, log: Path) -> str:
        end = time.monotonic() + 120
        while time.monotonic() < end and self.process.poll() is None:
            said = log.read_text()
            if "expunge is open at " in said:
                return said.partition("expunge is open at ")[2].split()[0]
            time.sleep(0.2)
        raise AssertionError(f"the program did not start: {log.read_text()}")

    def close(self) -> None:
        self.browser.close()
        self.process.terminate()
        self.process.wait(20)
        self.log.close()

    def field(self, id: str) -> str:
        return f"document.querySelector('#{id} input, #{id} textarea')"

    def pick(self, id: str, text: str) -> None:
        self.browser.type(self.field(id), text, enter=True)

    def press(self, id: str) -> None:
        self.browser.until(
            f"document.querySelector('#{id}') && !document.querySelector('#{id}').disabled"
        )
        self.browser.click(f"document.querySelector('#{id}')")

    def tab(self, name: str) -> None:
        self.browser.click(
            "[...document.querySelectorAll('#tabs [role=tab]')]"
            f".find(e => e.innerText.trim() == '{name}' && e.offsetParent)"
        )

    def shows(self, id: str, text: str, seconds: float = 120) -> None:
        self.browser.until(
            f"document.querySelector('#{id}')?.innerText.includes({json.dumps(text)})", seconds
        )

    def toast(self) -> str:
        said = self.browser.until("document.querySelector('.toast-wrap')?.innerText.trim()", 30)
        self.browser.run("document.querySelectorAll('.toast-close').forEach(e => e.click())")
        self.browser.until("!document.querySelector('.toast-wrap')?.innerText.trim()", 30)
        return str(said)


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    opened = Window(tmp_path_factory.mktemp("window"), "world")
    try:
        opened.shows("card", "trained without star")
        yield opened
    finally:
        opened.close()


# The tests go on where the one before stopped, as a person does.


def test_an_error_is_a_toast_of_one_sentence(window):
    window.press("erase")
    said = window.toast()
    assert "No concept is chosen" in said and "Traceback" not in said


def test_erasing_shows_progress_and_gives_an_edit(window):
    window.pick("concepts", "star")
    window.browser.until(f"{window.field('anchor')}?.value == 'circle'")
    window.pick("method", "uce")
    window.browser.until("document.body.innerText.includes('UCE: Unified')")
    window.press("erase")
    window.shows("edits", "uce: star")
    window.shows("panel", "done in")
    edits = list(window.runs.glob("uce-star-*/edit.safetensors"))
    assert len(edits) == 1


def test_before_after_and_never_stand_side_by_side(window):
    window.press("look")
    window.browser.until("document.querySelectorAll('#grid .x-cell img').length == 18", 180)
    counts = window.browser.run("[...document.querySelectorAll('.x-count')].map(e => e.innerText)")
    assert [c.split()[0] for c in counts] == ["Before", "After", "Never"]
    assert "3 of 3" in counts[0] and "0 of 3" in counts[1] and "0 of 3" in counts[2]


def test_what_a_user_types_stays_text(window):
    window.browser.type(window.field("prompts"), HOSTILE)
    window.browser.type(window.field("steps"), "2")
    window.press("draw")
    window.browser.until("document.querySelectorAll('#grid .x-cell img').length == 3", 120)
    said = window.browser.run("document.querySelector('.x-prompt').innerText")
    assert HOSTILE in said
    assert window.browser.run("document.title") == "expunge"


def test_a_setting_out_of_range_is_told_by_its_name(window):
    window.browser.type(window.field("steps"), "many")
    window.press("draw")
    assert "steps is 'many'" in window.toast().lower()
    window.browser.type(window.field("steps"), "")


def test_an_audit_opens_its_report_inside_the_page(window):
    window.tab("Audit")
    window.browser.until("document.querySelectorAll('#attacks input').length > 0")
    checked = "document.querySelectorAll('#attacks input:checked')"
    while window.browser.run(f"{checked}.length"):  # attacks take minutes on two cores
        left = window.browser.run(f"{checked}.length") - 1
        window.browser.click(f"{checked}[0]")
        window.browser.until(f"{checked}.length == {left}")
    for id, number in (("n", "2"), ("kept-n", "1"), ("attack-n", "1")):
        window.browser.type(window.field(id), number)
    window.press("audit")
    window.browser.until("document.querySelector('iframe.x-report') !== null", 300)
    address = window.browser.run("document.querySelector('iframe.x-report').src")
    text = window.browser.run(f"fetch({json.dumps(address)}).then(r => r.text())")
    assert "Evidence on star in world" in text
    policy = window.browser.run(
        f"fetch({json.dumps(address)}).then(r => r.headers.get('content-security-policy'))"
    )
    assert "default-src 'none'" in policy
    assert len(list(window.runs.glob("audit-star-*/report.html"))) == 1


def test_only_the_folder_of_runs_is_served(window):
    for path in ("/etc/hostname", str(window.runs.parent / "log.txt"), f"{window.runs}/../log.txt"):
        status = window.browser.run(f"fetch('/gradio_api/file={path}').then(r => r.status)")
        assert status in (403, 404), path


def test_an_edit_can_be_loaded_by_another_page(window):
    file = next(window.runs.glob("uce-star-*/edit.safetensors"))
    window.browser.open(window.address)
    window.shows("card", "trained without star")
    window.shows("panel", "done in")
    window.browser.upload("#load input[type=file], input[type=file]", file)
    window.shows("edits", "uce: star")
    window.browser.upload("#load input[type=file], input[type=file]", _broken(window.runs.parent))
    assert "is not a safetensors file" in window.toast()


def _broken(folder: Path) -> Path:
    file = folder / "broken.safetensors"
    file.write_bytes(b"\0" * 100)
    return file


def test_the_page_asked_nobody_else_and_broke_nowhere(window):
    hosts = {
        url.split("/")[2].rsplit(":", 1)[0]
        for url in window.browser.requests
        if url.startswith("http")
    }
    assert hosts == {"127.0.0.1"}
    assert window.browser.errors == []
