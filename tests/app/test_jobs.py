"""Jobs: one at a time, watched, stopped where methods can bear it."""

import threading

import pytest

from expunge.app.jobs import Job, Queue, sentence
from expunge.core.progress import Progress, Report, watching
from expunge.errors import WrongState


def test_progress_is_told_to_whoever_watches_and_to_nobody_else():
    told = []
    with watching(told.append), Progress("training", 3, done=1, unit="round") as bar:
        bar.advance("loss 0.5")
        bar.advance(units=2)
    with Progress("other", 1) as bar:
        bar.advance()
    assert told == [
        Report("training", 1, 3, "round"),
        Report("training", 2, 3, "round", "loss 0.5"),
        Report("training", 4, 3, "round"),
    ]


def test_watchers_nest_and_end():
    outer, inner = [], []
    with watching(outer.append):
        with watching(inner.append), Progress("a", 1):
            pass
        with Progress("b", 1):
            pass
    assert [r.label for r in inner] == ["a"]
    assert [r.label for r in outer] == ["b"]


def test_jobs_run_one_at_a_time_in_order():
    queue, order, gate = Queue(), [], threading.Event()
    first = queue.submit("first", lambda: (gate.wait(10), order.append(1)))
    second = queue.submit("second", lambda: order.append(2) or "result")
    assert queue.before(second) == 1 and second.state == "waiting"
    gate.set()
    assert second.wait(10) and first.over
    assert order == [1, 2] and second.result == "result" and second.state == "done"


def test_a_stop_is_heard_at_the_next_step_and_only_once():
    begun, steps = threading.Event(), []

    def work():
        with Progress("long", 1000) as bar:
            try:
                for step in range(1000):
                    steps.append(step)
                    begun.set()
                    threading.Event().wait(0.002)
                    bar.advance()
            except KeyboardInterrupt:
                bar.advance()  # what cleans up is left alone
                steps.append("saved")
                raise

    job = Queue().submit("long", work)
    assert begun.wait(10)
    job.stop()
    assert job.wait(10) and job.state == "stopped"
    assert steps[-1] == "saved" and len(steps) < 1000


def test_a_job_that_waits_can_be_called_off():
    queue, gate, done = Queue(), threading.Event(), []
    queue.submit("first", gate.wait)
    second = queue.submit("second", lambda: done.append(1))
    second.stop()
    gate.set()
    assert second.wait(10) and second.state == "stopped" and not done


def test_rate_and_time_left_count_this_session_only():
    job = Job("x", lambda: None)
    job.take(Report("train", 100, 200))
    assert job.rate is None and job.left is None
    job._first -= 10  # ten seconds ago
    job.take(Report("train", 150, 200))
    assert job.rate == pytest.approx(5, rel=0.01) and job.left == pytest.approx(10, rel=0.01)
    job.take(Report("draw", 0, 3))
    assert job.rate is None, "another piece of work begins anew"


def test_every_error_becomes_one_sentence(capsys):
    def fails():
        raise WrongState("the edit was fitted on the bare base")

    job = Queue().submit("bad", fails)
    job.wait(10)
    assert job.state == "failed"
    assert job.error.startswith("The edit was fitted on the bare base. Leave can be given")
    assert "disk" in sentence(OSError(28, "No space left on disk", "run"))
    assert "float16" in sentence(MemoryError())
    told = sentence(ValueError("tensor\n is\n odd"))
    assert "\n" not in told and "ValueError: tensor is odd" in told
    assert "ValueError" in capsys.readouterr().err, "the terminal has the details"
