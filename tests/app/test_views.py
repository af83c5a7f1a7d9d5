"""HTML of a window: what is said, and that no text of a user becomes markup."""

import numpy as np
import pytest

from expunge.app import views
from expunge.app.comparing import Cell, Grid, Row
from expunge.app.jobs import Job
from expunge.core.progress import Report

HOSTILE = "<img src=x onerror=alert(1)>\"'&"


def picture(side=16):
    return np.zeros((side, side, 3), np.uint8)


def grid(columns=("before", "after", "never"), hit=True, asks=True, output=None):
    cells = {c: Cell(picture() if output is None else output, hit) for c in columns}
    return Grid(columns, (Row("a star", 3, cells, asks),), ("star",), ("A note.",))


def test_nothing_hostile_becomes_markup():
    job = Job(HOSTILE, lambda: None)
    job.report, job.state = Report(HOSTILE, 1, 2, "step", HOSTILE), "running"
    bad = Grid(
        ("before",), (Row(HOSTILE, 0, {"before": Cell(picture(), True)}),), (HOSTILE,), (HOSTILE,)
    )
    texts = Grid(("before",), (Row("x", 0, {"before": Cell(HOSTILE)}),), (), ())
    shown = [
        views.note(HOSTILE), views.card([(HOSTILE, HOSTILE)]), views.code(HOSTILE), views.progress(job),
        views.grid(bad),
        views.grid(texts), views.report_frame(HOSTILE, HOSTILE),
        views.exported({"tensors": 1, "rank": 0, "left_out": [HOSTILE], "warning": HOSTILE}, HOSTILE),
    ]  # fmt: skip
    for html in shown:
        assert "<img src=x" not in html and "&lt;img src=x" in html
        assert "\"'&" not in html and "&quot;" in html


def test_counts_stand_above_the_pictures_and_marks_beside_them():
    html = views.grid(grid())
    assert html.count("<strong>1 of 1</strong> show star") == 3
    assert html.count(">shown</span>") == 3 and html.count('class="pic small"') == 3
    assert "A note." in html and "seed 3" in html
    quiet = views.grid(grid(hit=False, asks=False))
    assert "not shown</span>" not in quiet, "on another prompt only a sighting is worth a word"
    assert "star seen" in views.grid(grid(hit=True, asks=False))
    assert "n2" in views.grid(grid(("before", "after")))


def test_what_nobody_judged_has_no_marks():
    html = views.grid(grid(hit=None))
    assert "shown</span>" not in html and "the model as it was" in html


def test_large_pictures_are_smaller_files():
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    html = views.grid(grid(("before",), output=noise))
    assert "data:image/webp;base64," in html and 'class="pic"' in html


def test_texts_are_shown_as_texts():
    assert "<blockquote>Lisbon</blockquote>" in views.grid(grid(("before",), output="Lisbon"))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("waiting", "2 jobs before this one"),
        ("stopped", "stopped"),
        ("done", "done in"),
        ("failed", "It broke."),
    ],
)
def test_every_state_of_a_job_is_said(state, words):
    job = Job("Erasing star", lambda: None)
    job.state, job.error = state, "It broke." if state == "failed" else ""
    assert words in views.progress(job, 2)


def test_progress_has_a_share_a_rate_and_an_end():
    job = Job("Erasing star", lambda: None)
    job.run()
    job.state = "running"
    job.take(Report("esd", 10, 100))
    job._first -= 5
    job.take(Report("esd", 30, 100, note="loss 0.5"))
    html = views.progress(job)
    assert "width:30.0%" in html and "esd: 30 of 100 steps" in html and "4 steps/s" in html
    assert "0:18 left" in html and "loss 0.5" in html and 'aria-valuenow="30"' in html


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (125, "2:05"), (3725, "1:02:05")]
)
def test_clock(seconds, shown):
    assert views.clock(seconds) == shown
