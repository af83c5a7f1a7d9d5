"""From events of a page to sessions and back: which session a request belongs to, errors as toasts, jobs as progress.

This file and :mod:`layout` are the only ones that know Gradio.
"""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from . import views
from .jobs import Job, sentence
from .session import Session

if TYPE_CHECKING:
    from .shelf import Desk

__all__ = ["QUIET", "Windows", "follow", "spoken", "toast"]

QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""For every event: the panel shows what runs, and the page is the only caller."""
TICK_S = 0.2
"""Seconds between two looks at a job."""


class Windows:
    """The sessions of a running program, one for each open page."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._open: dict[str, Session] = {}

    def of(self, request: gr.Request) -> Session:
        """The session of the page that a request comes from."""
        key = str(request.session_hash)
        if key not in self._open:
            self._open[key] = Session(self.desk)
        return self._open[key]

    def drop(self, request: gr.Request) -> None:
        """A page was closed."""
        session = self._open.pop(str(request.session_hash), None)
        if session is not None:
            session.close()


def toast(text: str) -> gr.Error:
    """An error as one sentence on the page; Gradio would read it as HTML."""
    return gr.Error(
        html.escape(text), title="That did not work", duration=12, print_exception=False
    )


def spoken(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler, with every error turned into a toast; works for functions that return."""

    @functools.wraps(handler)
    def quiet(*arguments: Any) -> Any:
        try:
            return handler(*arguments)
        except gr.Error:
            raise
        except Exception as error:
            raise toast(sentence(error)) from None

    return quiet


def follow(session: Session, begin: Callable[[], Job]) -> Iterator[tuple[str, bool, Job | None]]:
    """Begin a job and look at it until it is over: what the panel shows, whether it can be stopped, the job at the end.

    A failed job becomes a toast.
    """
    try:
        job = begin()
    except Exception as error:
        raise toast(sentence(error)) from None
    queue = session.desk.queue
    yield views.progress(job, queue.before(job)), True, None
    while not job.wait(TICK_S):
        yield views.progress(job, queue.before(job)), True, None
    yield views.progress(job), False, job
    if job.state == "failed":
        raise toast(job.error)
