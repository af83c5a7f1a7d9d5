"""Headless Chromium, driven over its own debugging pipe: no driver, no port, no further library."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Browser:
    """One page.  Commands and answers are JSON texts that end in a zero byte, on the file descriptors 3 and 4."""

    def __init__(self, profile: Path, width: int = 1400, height: int = 1000) -> None:
        here, theirs_out = os.pipe()
        theirs_in, self._out = os.pipe()
        self._in = here

        def hand_over() -> None:
            # Their ends become 3 and 4, whatever numbers they have here.
            source, sink = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(source, 3)
            os.dup2(sink, 4)
            os.set_inheritable(3, True)
            os.set_inheritable(4, True)

        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--remote-debugging-pipe",
                f"--user-data-dir={profile}",
                "--disable-background-networking",
                "--disable-component-update",
                "--hide-scrollbars",
                "about:blank",
            ],
            preexec_fn=hand_over,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._number, self._rest = 0, b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session: str | None = None
        self._session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "DOM"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    _session: str | None = None

    def call(
        self, method: str, parameters: dict[str, Any] | None = None, timeout: float = 60
    ) -> dict[str, Any]:
        """Send one command and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters or {}}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._answer(self._number, time.monotonic() + timeout)

    def _answer(self, number: int, end: float) -> dict[str, Any]:
        while True:
            while b"\0" in self._rest:
                raw, _, self._rest = self._rest.partition(b"\0")
                message = json.loads(raw)
                if message.get("id") == number:
                    if "error" in message:
                        raise RuntimeError(message["error"]["message"])
                    return message["result"]
                self._event(message)
            ready, _, _ = select.select([self._in], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"no answer to command {number}")
            self._rest += os.read(self._in, 1 << 20)

    def _event(self, message: dict[str, Any]) -> None:
        told = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(told["exceptionDetails"])[:400])

    def resize(self, width: int, height: int) -> None:
        """Size of the page in pixels."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def open(self, address: str) -> None:
        """Go to a page."""
        self.call("Page.navigate", {"url": address})

    def run(self, script: str) -> Any:
        """The value of an expression."""
        answer = self.call(
            "Runtime.evaluate", {"expression": script, "returnByValue": True, "awaitPromise": True}
        )
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"])[:500])
        return answer["result"].get("value")

    def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = self.run(script)
            if found:
                return found
            time.sleep(0.1)
        raise TimeoutError(
            f"never true within {seconds:g} s: {script}\n{self.run('document.body.innerText')[:3000]}"
        )

    def click(self, selector: str) -> None:
        """Press an element."""
        self.run(
            f"(() => {{ const e = {selector}; e.scrollIntoView({{block: 'center'}}); e.click(); }})()"
        )

    def type(self, selector: str, text: str, enter: bool = False) -> None:
        """Replace what stands in a field, key by key as a person does."""
        self.run(
            f"(() => {{ const e = {selector}; e.scrollIntoView({{block: 'center'}}); "
            "e.focus(); e.select && e.select(); })()"
        )
        self.call("Input.insertText", {"text": text})
        if enter:
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self.call("Input.dispatchKeyEvent", {"type": "keyDown", **key})
            self.call("Input.dispatchKeyEvent", {"type": "keyUp", **key})

    def upload(self, selector: str, file: Path) -> None:
        """Give a file to a file field (``selector`` is CSS)."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", {"nodeId": root, "selector": selector})["nodeId"]
        self.call("DOM.setFileInputFiles", {"nodeId": node, "files": [str(file)]})

    def dark(self, on: bool) -> None:
        """What the system prefers."""
        value = "dark" if on else "light"
        self.call(
            "Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": value}]},
        )

    def picture(self, file: Path, whole: bool = False) -> None:
        """A screenshot; ``whole``: the page to its end."""
        answer = self.call(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole}
        )
        file.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """End the browser."""
        self._session = None
        with contextlib.suppress(RuntimeError, TimeoutError, OSError):
            self.call("Browser.close", timeout=10)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)


@contextlib.contextmanager
def browser(profile: Path, **size: int) -> Iterator[Browser]:
    """A browser inside the block."""
    opened = Browser(profile, **size)
    try:
        yield opened
    finally:
        opened.close()
