"""The program behind the window: on this machine only, asking nobody else, serving the folder of runs and no more."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from ..core.extras import needed
from ..errors import SettingError
from .held import MAX_FILE
from .shelf import Desk

__all__ = ["HOST", "Guard", "check_host", "launch"]

HOST = "127.0.0.1"
LOCAL = (HOST, "localhost")

# The page may talk to this program and to nobody else, and nobody may put it into a frame of theirs.
PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; frame-src 'self'; "
    "worker-src 'self' blob:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'; object-src 'none'"
)
# A report is text and pictures: neither scripts, nor forms, nor requests, whatever the file says.
FILE_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'self'; "
    "base-uri 'none'; form-action 'none'; sandbox allow-popups"
)

Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


def check_host(host: str) -> None:
    """Refuse to answer other machines.

    Raises:
        SettingError: Any host but this machine.
    """
    if host not in LOCAL:
        raise SettingError(
            f"host {host!r} is refused: the window has no accounts, so it answers on {HOST} only; from another "
            "machine, forward the port (ssh -L 7860:127.0.0.1:7860 NAME)"
        )


class Guard:
    """Refuses requests that name another host (rebound DNS) and adds the headers that fence the page in.

    An ASGI application around another one.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Send) -> None:
        """Answer one request."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {
            k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope.get("headers", [])
        }
        if headers.get("host", "").rsplit(":", 1)[0] not in LOCAL:
            await send(
                {
                    "type": "http.response.start",
                    "status": 400,
                    "headers": [(b"content-type", b"text/plain")],
                }
            )
            await send(
                {"type": "http.response.body", "body": b"This program answers to 127.0.0.1 only.\n"}
            )
            return
        policy = FILE_POLICY if "/file=" in scope["path"] else PAGE_POLICY
        added = {
            "content-security-policy": policy,
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-resource-policy": "same-origin",
        }

        async def fenced(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [
                    (k, v)
                    for k, v in message.get("headers", [])
                    if k.decode("latin-1").lower() not in added
                ]
                message["headers"] = [*kept, *((k.encode(), v.encode()) for k, v in added.items())]
            await send(message)

        await self.app(scope, receive, fenced)


def _gradio() -> Any:
    # Read when the library is imported: no analytics, no look-up of newer versions, no share link, no other host.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in (
        "GRADIO_SHARE",
        "GRADIO_ALLOWED_PATHS",
        "GRADIO_MCP_SERVER",
        "GRADIO_ROOT_PATH",
        "GRADIO_NUM_WORKERS",
    ):
        os.environ.pop(name, None)
    return needed("gradio", "gradio", "ui")


def launch(
    model: str | None = "world",
    runs: str | Path = "runs",
    *,
    host: str = HOST,
    port: int | None = None,
    browser: bool = True,
    device: str = "cpu",
    dtype: str | None = None,
    block: bool = True,
) -> tuple[Any, str]:
    """Start the program and, unless told otherwise, wait until it is ended.

    Args:
        model: Opened first; ``None`` opens none.
        runs: The folder that receives everything: edits, exports, reports.
        host: Checked by :func:`check_host`.
        port: ``None`` takes the first free one from 7860 on.
        browser: Open the page in the default browser.
        device, dtype: As for the commands.
        block: Return at once if false; the server then ends with the process, or with ``close()`` of the first
            value returned.

    Returns:
        The Gradio application and its address.

    Raises:
        MissingExtra: Gradio is not installed.
        SettingError: Another host, or a port that is taken.
    """
    check_host(host)
    _gradio()
    from . import layout

    desk = Desk(runs, device, dtype)
    page = layout.build(desk, model)
    page.queue(default_concurrency_limit=32)
    middleware = _middleware()
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            inbrowser=browser,
            prevent_thread_lock=True,
            quiet=True,
            show_error=True,
            allowed_paths=[str(desk.runs)],
            blocked_paths=[],
            root_path="",
            max_file_size=MAX_FILE,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            strict_cors=True,
            app_kwargs={"middleware": [middleware], "docs_url": None, "redoc_url": None},
            theme=layout.theme(),
            css_paths=[layout.CSS],
            i18n=None,
        )
    except OSError as error:
        raise SettingError(
            f"port {port} cannot be had ({error}); choose another with --port, or leave it out"
        ) from None
    print(f"expunge is open at {address} (results in {desk.runs}); Ctrl-C ends it")
    if block:
        page.block_thread()
    return page, address


def _middleware() -> Any:
    from starlette.middleware import Middleware

    return Middleware(Guard)
