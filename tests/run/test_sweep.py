"""The sweep: what a cell is, that it is done once, what a kill leaves, and how it is spread."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expunge import catalogue
from expunge.cli import main
from expunge.core.resampling import layered
from expunge.errors import CatalogueError, InputError, MissingExtra, RunError, SettingError
from expunge.run.sweep import cluster, engine, forecast, record
from expunge.run.sweep.bench import Bench
from expunge.run.sweep.cells import attempt
from expunge.run.sweep.options import Options
from expunge.run.sweep.plan import Plan, planned
from expunge.run.sweep.store import Store

HERE = Path(__file__).parent
PACKAGE = HERE / "stub_package"
SMALL = Options(
    "stub", "stub-forgetter,stub-refuser", "stub-password,stub-forger", ("star", "heart"), (0,), n=6, kept_n=2,
    attack_n=4,
)  # fmt: skip


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Somebody else's package with a world, erasers and attacks; the file its methods write to."""
    monkeypatch.syspath_prepend(str(PACKAGE))
    log = tmp_path / "log.txt"
    monkeypatch.setenv("SWEEPSTUB_LOG", str(log))
    monkeypatch.setenv("EXPUNGE_RESULTS", str(tmp_path / "results"))
    for cached in (catalogue._catalogue, catalogue._registrars):
        cached.cache_clear()
    yield log
    for cached in (catalogue._catalogue, catalogue._registrars):
        cached.cache_clear()


def opened(**changes: Any) -> tuple[Bench, Plan]:
    import dataclasses

    bench = Bench(dataclasses.replace(SMALL, **changes))
    return bench, planned(bench)


def lines(log: Path, word: str = "end") -> Counter[str]:
    """How often each piece of work was started or ended."""
    found = log.read_text().splitlines() if log.exists() else []
    return Counter(line.partition(" ")[2] for line in found if line.startswith(word))


def results(store: Store) -> dict[str, Any]:
    """What was found, without what depends on the clock."""
    return {
        key: {k: v for k, v in store.read(key)["result"].items() if k != "fit_seconds"}
        for key in store.keys()
    }


# -- cells -----------------------------------------------------------------------------------------


def test_a_sweep_does_every_cell_once_and_controls_do_not_depend_on_erasers(
    tmp_path: Path, stub: Path
) -> None:
    bench, plan = opened()
    told: list[tuple[str, str]] = []
    done = engine.execute(
        bench, plan, tmp_path / "out", tell=lambda c, s: told.append((c.title, s))
    )
    # star: two controls and two erasers; heart, which never knows: one control; measures and two attacks each.
    assert done.total == len(plan.cells) == 2 * 2 + (4 + 3) * 3 == done.finished == len(told)
    # The refuser does not erase hearts: its fit, its measures and its attacks are refusals, not failures.
    assert done.refused == 4 and not done.failures
    store = Store(tmp_path / "out")
    fit = next(c for c in plan.cells.values() if c.title == "heart, stub-refuser, fit, seed 0")
    assert "a heart cannot be forgotten" in store.read(fit.key)["result"]["refused"]
    assert set(lines(stub).values()) == {1} and sum(lines(stub).values()) == 3 + 6 * 2
    # Everything is there: nothing is done again, by this or another sweep that shares cells.
    again = engine.execute(bench, plan, tmp_path / "out")
    assert again.finished == again.total and sum(lines(stub).values()) == 3 + 6 * 2
    more, wider = opened(erasers="stub-forgetter,stub-forgetter:left=0.2")
    engine.execute(more, wider, tmp_path / "out")
    assert sum(lines(stub).values()) == 3 + 6 * 2 + 2 + 2 * 2
    assert [p for p in (tmp_path / "out" / "runs").iterdir() if p.name.startswith(".")] == []
    assert list((tmp_path / "out" / "locks").iterdir()) == []


def test_a_search_that_reads_no_arm_is_run_once_and_counts_for_every_arm(
    tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWEEPSTUB_PAUSE", "0.2")
    bench, plan = opened(attacks="stub-searcher", erasers="stub-forgetter", concepts=("star",))
    engine.execute(bench, plan, tmp_path / "out")
    assert lines(stub)["search star"] == 1
    store = Store(tmp_path / "out")
    made = [store.read(c.key) for c in plan.cells.values() if c.attack is not None]
    assert len(made) == 3
    assert {entry["result"]["cost"]["encoder.forward"] for entry in made} == {100}
    # Each waits 0.2 seconds in its own work, and as long in the search.
    assert all(entry["seconds"] >= 0.4 for entry in made)


def test_work_is_ordered_from_controls_and_quick_methods_to_slow_ones() -> None:
    _, plan = opened(attacks="stub-password,random-tokens,unlearndiffatk", seeds=(0, 1))
    cells = list(plan.cells.values())
    assert [c.case.seed for c in cells] == sorted(c.case.seed for c in cells)
    first = [c for c in cells if c.case.seed == 0]
    arms = [c.arm in ("original", "never") for c in first]
    assert arms == sorted(arms, reverse=True)
    erased = [c for c in first if c.arm not in ("original", "never")]
    slow = [c.kind == "attack" for c in erased]
    assert slow == sorted(slow)
    place = {c.key: i for i, c in enumerate(cells)}
    assert all(place[key] < place[c.key] for c in cells for key in c.needs)


CHANGES = {
    "budget": {"budget": "quick"}, "seed": {"seeds": (1,)}, "prompts": {"attack_n": 3}, "split": {"n": 3},
    "concept": {"concepts": ("cross",)}, "setting": {"erasers": "stub-forgetter:left=0.1"},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_requests_name_everything_that_can_change_the_answer(change: str) -> None:
    small = {"erasers": "stub-forgetter", "attacks": "stub-password", "concepts": ("star",)}
    before = {
        c.title: c.key for c in opened(**small)[1].cells.values() if c.arm == "stub-forgetter"
    }
    changed = opened(**{**small, **CHANGES[change]})[1].cells.values()
    after = {c.key for c in changed if c.kind == ("measures" if change == "split" else "attack")}
    assert after and not after & set(before.values())


def test_requests_name_versions_weights_protocol_and_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"erasers": "stub-forgetter", "attacks": "stub-password", "concepts": ("star",)}
    keys = set(opened(**small)[1].cells)
    from sweepstub import methods

    from expunge.run.sweep import plan as plans

    changes = [
        (methods.Forgetter, "version", 2),
        (methods.LoggedPassword, "version", 2),
        (plans, "RESULTS", 99),
    ]
    for owner, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            assert set(opened(**small)[1].cells) != keys
    bench = Bench(
        Options("stub", "stub-forgetter", "stub-password", ("star",), n=6, kept_n=2, attack_n=4)
    )
    assert set(planned(bench).cells) == keys
    for name in ("state", "protocol"):
        with monkeypatch.context() as patch:
            patch.setattr(bench, name, "another")
            assert not set(planned(bench).cells) & keys
    bench.judge.protocol = "another"
    assert not set(planned(bench).cells) & keys


def test_what_an_eraser_is_told_is_not_measured_and_changes_no_control() -> None:
    few, many = opened(told=0)[1], opened(told=1)[1]
    (case,) = {
        id(c.case): c.case for c in many.cells.values() if c.case.concept.name == "star"
    }.values()
    assert case.keep == ("heart",) and "heart" not in case.sets.kept and "cross" in case.sets.kept
    attacks = [{c.key for c in plan.cells.values() if c.arm in ("original", "never") and c.kind == "attack"}
               for plan in (few, many)]  # fmt: skip
    assert attacks[0] == attacks[1]


def test_mistakes_are_refused_before_any_work(tmp_path: Path) -> None:
    for changes, error, words in (
        ({"erasers": "stub-forgeter"}, CatalogueError, "stub-forgeter"),
        ({"erasers": "stub-password"}, SettingError, "for attack"),
        ({"attacks": "uce"}, SettingError, "for erase"),
        ({"attacks": "stub-password@5"}, SettingError, "--attack-n"),
        ({"erasers": "stub-forgetter,stub-forgetter"}, SettingError, "twice"),
        ({"erasers": "stub-forgetter:lef=1"}, SettingError, "lef"),
        ({"erasers": "none"}, SettingError, "no eraser is left|none"),
        ({"concepts": ("stra",)}, SettingError, "star"),
        ({"concepts": ()}, SettingError, "concepts is empty"),
        ({"seeds": (0, 0)}, SettingError, "twice"),
        ({"budget": "wrold"}, SettingError, "world"),
        ({"attack_n": 0}, SettingError, "attack_n is 0"),
        ({"split": "train"}, SettingError, "split"),
    ):
        with pytest.raises(error, match=words):
            opened(**changes)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(RunError, match="not a folder"):
        Store(file)


def test_a_cell_that_fails_is_told_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, plan = opened(attacks="stub-fails", concepts=("star",), erasers="stub-forgetter")
    monkeypatch.setenv("SWEEPSTUB_FAILS", "1")
    done = engine.execute(bench, plan, tmp_path / "out")
    assert done.finished == done.total - 3 and len(done.failures) == 3
    assert all("ZeroDivisionError: a mistake" in one["error"] for one in done.failures.values())
    monkeypatch.delenv("SWEEPSTUB_FAILS")
    again = engine.execute(bench, plan, tmp_path / "out")
    assert again.finished == again.total and not again.failures


def test_refusals_stay_until_they_are_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, plan = opened(erasers="stub-refuser", concepts=("heart",), attacks="none")
    assert engine.execute(bench, plan, tmp_path / "out").refused == 2
    from sweepstub import methods

    monkeypatch.setattr(methods.Refuser, "erase", methods.Forgetter.erase)
    assert engine.execute(bench, plan, tmp_path / "out").refused == 2
    assert engine.execute(bench, plan, tmp_path / "out", retry=True).refused == 0


# -- claims and kills ------------------------------------------------------------------------------


def test_a_claimed_cell_is_left_alone_and_a_dead_owner_frees_it(tmp_path: Path) -> None:
    bench, plan = opened(concepts=("star",))
    store, cell = Store(tmp_path / "out"), next(iter(plan.cells.values()))
    code = (
        "import fcntl, os, sys, time; h = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT);"
        "fcntl.flock(h, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"
    )
    lock = tmp_path / "out" / "locks" / f"{cell.key}.lock"
    lock.parent.mkdir(parents=True)
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
    assert attempt(cell, bench, store) == "busy"
    holder.kill()
    holder.wait()
    holder.stdout.close()
    assert attempt(cell, bench, store) == "done" and attempt(cell, bench, store) == "found"


def test_a_second_writer_changes_nothing_where_locks_are_granted_to_all(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    store.publish({"a": 1}, "k", {"value": 1}, 0.0, {"edit.bin": b"one"})
    store.publish({"a": 1}, "k", {"value": 2}, 0.0, {"edit.bin": b"two"})
    assert (
        store.read("k")["result"] == {"value": 1}
        and (store.place("k") / "edit.bin").read_bytes() == b"one"
    )
    assert store.keys() == {"k"} and len(list((tmp_path / "out" / "runs").iterdir())) == 1


@pytest.mark.parametrize(
    "point", ["expunge.edit.files.os.replace", "expunge.run.sweep.store.os.rename"]
)
def test_an_error_while_writing_leaves_no_half_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    store = Store(tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(point, full)
        with pytest.raises(OSError, match="No space"):
            store.publish({"a": 1}, "k", {"value": 1}, 0.0)
    assert not store.finished("k") and store.keys() == set()
    assert list((tmp_path / "out" / "runs").iterdir()) == []


def test_what_a_killed_writer_left_is_swept_up(tmp_path: Path) -> None:
    store = Store(tmp_path / "out")
    left = tmp_path / "out" / "runs" / ".abc.x1y2"
    left.mkdir(parents=True)
    (left / "run.json").write_text("{")
    with store.claim("abc") as free:
        assert free
        Store(tmp_path / "out").sweep_up()
        assert left.exists()  # somebody works on it
    store.sweep_up()
    assert not left.exists() and not store.finished("abc")


CHILD = """
import os, sys, time
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from expunge.run.sweep import engine
from expunge.run.sweep.options import Options
import numpy, torch, evidence.stubs, sweepstub.methods, sweepstub.world  # once, for all children
text, folder = sys.argv[3], Path(sys.argv[4])
print("ready", flush=True)
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        bench, plan = engine.opened(text)
        print(os.getpid(), flush=True)  # nothing is written before, so a kill would try nothing
        done = engine.execute(bench, plan, folder)
        os._exit(0 if done.finished == done.total else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


def killed(log: Path, folder: Path, options: Options, times: int, dice: random.Random) -> int:
    """Start the sweep again and again in real processes and kill each; the last one is let finish.

    Returns:
        How many were killed before they were done.
    """
    environment = {**os.environ, "SWEEPSTUB_PAUSE": "0.06", "SWEEPSTUB_LOG": str(log)}
    mother = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(HERE.parent), str(PACKAGE), options.text(), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True,
    )  # fmt: skip
    assert mother.stdin is not None and mother.stdout is not None
    assert mother.stdout.readline() == "ready\n"
    dead = 0
    for number in range(times + 1):
        mother.stdin.write("go\n")
        mother.stdin.flush()
        pid = int(mother.stdout.readline())
        if number < times:
            time.sleep(dice.uniform(0.0, 0.12))
            with contextlib.suppress(ProcessLookupError):  # it was done before
                os.kill(pid, 9)
        status = int(mother.stdout.readline())
        dead += status == -9
    mother.stdin.close()
    assert status == 0 and mother.wait() == 0
    mother.stdout.close()
    return dead


def test_killed_at_random_moments_it_loses_and_repeats_nothing(tmp_path: Path, stub: Path) -> None:
    options = Options("stub", "stub-forgetter,stub-refuser", "stub-password,stub-forger", ("star", "heart"), (0, 1),
                      n=6, kept_n=2, attack_n=4)  # fmt: skip
    log, out = tmp_path / "killed.txt", tmp_path / "killed"
    dead = killed(log, out, options, 20, random.Random(3))
    assert dead >= 10  # the machine may be so quick that the last ones come too late
    bench, plan = opened(seeds=(0, 1))
    engine.execute(bench, plan, tmp_path / "whole")
    assert results(Store(out)) == results(Store(tmp_path / "whole")) and len(plan.cells) == 50
    started, ended = lines(log, "start"), lines(log)
    assert started.keys() == ended.keys() == lines(stub).keys()
    # A kill costs at most the cell in flight: each is started once more at most as often as there were kills.
    assert sum(started.values()) - len(started) <= dead
    assert [p.name for p in (out / "runs").iterdir() if p.name.startswith(".")] == []
    assert not list((out / "work").glob("*")) and not list((out / "failed").glob("*"))


@pytest.mark.slow
def test_two_workers_killed_with_their_parent_lose_nothing(tmp_path: Path, stub: Path) -> None:
    arguments = [
        sys.executable, "-m", "expunge", "sweep", "--model", "stub", "--erasers", SMALL.erasers, "--attacks",
        SMALL.attacks, "--concepts", "star,heart", "--n", "6", "--kept-n", "2", "--attack-n", "4", "--jobs", "2",
        "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    path = os.pathsep.join([str(HERE.parent), str(PACKAGE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "SWEEPSTUB_PAUSE": "0.3"}
    dice = random.Random(5)
    for _ in range(4):
        process = subprocess.Popen(
            arguments, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        time.sleep(dice.uniform(5, 12))
        process.kill()
        process.wait()
    subprocess.run(arguments, env=environment, check=True, capture_output=True)
    _, plan = opened()
    assert Store(tmp_path / "out").keys() == set(plan.cells)
    assert set(lines(stub).values()) == {1}


# -- several processes -----------------------------------------------------------------------------


def test_jobs_share_the_cells_and_give_what_one_process_gives(
    tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(PACKAGE), *sys.path]))
    bench, plan = opened(concepts=("star",))
    told: list[str] = []
    done = engine.execute(
        bench, plan, tmp_path / "two", jobs=2, tell=lambda cell, status: told.append(status)
    )
    assert done.finished == done.total == len(told) and not done.notes
    assert set(lines(stub).values()) == {1}
    engine.execute(bench, plan, tmp_path / "one")
    assert results(Store(tmp_path / "two")) == results(Store(tmp_path / "one"))
    assert engine.threads(2)["OMP_NUM_THREADS"] == str(max(1, (os.cpu_count() or 1) // 2))
    assert engine._end(-9).startswith("was ended by SIGKILL, perhaps because memory ran out")


class Inline(types.ModuleType):
    """Stands in for Ray: runs each task where it is sent from, and keeps the order of arrival."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.sent: list[str] = []
        self.options: dict[str, Any] = {}
        self.calls: list[str] = []
        self.dies: set[str] = set()

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str, runtime_env: Any) -> None:
        self.calls.append(f"init {address} {runtime_env['env_vars']['OMP_NUM_THREADS']}")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def remote(self, **options: Any) -> Any:
        self.options = options

        def wrapped(function: Any) -> Any:
            def send(text: str, folder: str, key: str) -> Any:
                self.sent.append(key)
                if key in self.dies:
                    return RuntimeError("the node was lost")
                return function(text, folder, key)

            return types.SimpleNamespace(remote=lambda *a: Reference(send(*a)))

        return wrapped

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        return references[:num_returns], references[num_returns:]

    def get(self, reference: Any) -> Any:
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value


class Reference:
    def __init__(self, value: Any) -> None:
        self.value = value


def test_a_cluster_is_sent_one_task_a_cell_after_those_it_needs(
    tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Inline()
    monkeypatch.setitem(sys.modules, "ray", ray)
    bench, plan = opened()
    lost = next(
        c.key for c in plan.cells.values() if c.title == "star, stub-forgetter, stub-forger, seed 0"
    )
    ray.dies = {lost}
    done = engine.execute(bench, plan, tmp_path / "out", ray="auto")
    assert done.finished == done.total - 1 and done.failures[lost]["error"] == "the node was lost"
    assert ray.calls == ["init auto 1", "shutdown"] and ray.options == {
        "num_cpus": 1,
        "max_retries": 3,
    }
    place = {key: i for i, key in enumerate(ray.sent)}
    assert all(place[n] < place[c.key] for c in plan.cells.values() for n in c.needs)
    ray.dies, ray.sent = set(), []
    again = engine.execute(bench, plan, tmp_path / "out", ray="auto")
    assert again.finished == again.total and ray.sent == [lost]
    assert set(lines(stub).values()) == {1}


def test_without_ray_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"expunge\[cluster\]"):
        cluster._ray()


@pytest.mark.slow
@pytest.mark.extras
@pytest.mark.timeout(900)  # two clusters are started, and each opens torch in every worker
def test_the_real_ray_repeats_a_lost_task_resumes_and_gives_what_one_process_gives(
    tmp_path: Path, stub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="extra cluster")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(PACKAGE), *sys.path]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # no network in tests
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray keeps the token of its cluster
    deadly = tmp_path / "deadly"
    deadly.touch()
    monkeypatch.setenv("SWEEPSTUB_DEADLY", str(deadly))
    bench, plan = opened(concepts=("star",))
    told: list[str] = []
    done = engine.execute(
        bench, plan, tmp_path / "ray", ray="local", tell=lambda cell, status: told.append(status)
    )
    assert done.finished == done.total == len(told) and set(told) == {"done"} and not done.failures
    # Whose process was killed was started twice; everything was ended once.
    assert not deadly.exists() and sorted(lines(stub, "start").values())[-2:] == [1, 2]
    assert set(lines(stub).values()) == {1}
    bench, plan = opened()
    told.clear()
    again = engine.execute(
        bench, plan, tmp_path / "ray", ray="local", tell=lambda cell, status: told.append(status)
    )
    assert again.finished == again.total == len(told) and told.count("found") == done.total
    assert again.refused == 4 and set(lines(stub).values()) == {1}
    engine.execute(bench, plan, tmp_path / "one")
    assert results(Store(tmp_path / "ray")) == results(Store(tmp_path / "one"))


# -- forecast and command --------------------------------------------------------------------------


def test_a_forecast_counts_what_is_left_and_learns_from_what_is_done(tmp_path: Path) -> None:
    bench, plan = opened(concepts=("star",))
    store = Store(tmp_path / "out")
    first = forecast.forecast(bench, plan, store)
    attacks = [key for key, cell in plan.cells.items() if cell.kind == "attack"]
    assert all(first.rows[key] == 2_000 * 4 and key in first.bound for key in attacks)
    told = "\n".join(forecast.lines(first, plan, bench, 100.0))
    assert "never fitted here: stub-forgetter, stub-refuser" in told and "at most" in told
    assert f"{len(attacks) * 8_000:,}" in told and "--attack-n 2" in told
    engine.execute(bench, plan, tmp_path / "out")
    assert forecast.forecast(bench, plan, store).rows == {}
    bench, plan = opened(concepts=("star",), seeds=(0, 1))
    second = forecast.forecast(bench, plan, store)
    assert len(second.rows) == second.finished == len(plan.cells) / 2 and not second.bound
    password = {
        second.rows[key]
        for key, cell in plan.cells.items()
        if key in second.rows and cell.label == "stub-password"
    }
    assert password == {2.0 * 4}  # the plain picture and the attacked one of each prompt
    told = "\n".join(forecast.lines(second, plan, bench, 100.0, jobs=2))
    assert "never fitted" not in told and "with 2 jobs" in told and "1 of 2 seeds" in told


def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: Any
) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["expunge", *map(str, arguments)])
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    shown = capsys.readouterr()
    return status, shown.out, shown.err


@pytest.mark.parametrize(
    "given",
    [
        ("--concepts", "star, heart,cross"), ("-c", "star", "-c", "heart", "-c", "cross"),
        ("--concept", "star,", "--concepts", "heart,cross"),
    ],
)  # fmt: skip
def test_concepts_are_joined_by_commas_or_by_repeating(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, given: tuple[str, ...]
) -> None:
    seen: list[tuple[str, ...]] = []

    def options(*arguments: Any, **_: Any) -> None:
        seen.append(arguments[3])
        raise SettingError("that is all")

    monkeypatch.setattr("expunge.run.sweep.options.Options", options)
    status, _, err = run(capsys, monkeypatch, "sweep", "-m", "stub", "-o", "out", *given)
    assert status == 1 and "that is all" in err
    assert seen == [("star", "heart", "cross")]


def test_the_command_sweeps_resumes_records_and_makes_pages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("sweep", "-m", "stub", "-o", tmp_path / "out", "--erasers", SMALL.erasers, "--attacks",
             "stub-password,stub-teacher,stub-fails", "--concepts", "star", "--n", 6, "--kept-n", 2, "--attack-n", 4,
             "--seeds", "0,1")  # fmt: skip
    status, out, _ = run(capsys, monkeypatch, *small, "--dry-run")
    assert status == 0 and "cells to do" in out and not (tmp_path / "out").exists()
    monkeypatch.setenv("SWEEPSTUB_FAILS", "1")
    status, out, err = run(capsys, monkeypatch, *small)
    assert status == 1 and "8 cells failed; the same command tries them again" in err
    monkeypatch.delenv("SWEEPSTUB_FAILS")
    kept, page = tmp_path / "record.json", tmp_path / "docs" / "leaderboard"
    status, out, err = run(capsys, monkeypatch, *small, "--record", kept, "--page", page)
    assert status == 0 and "36 of 36 cells finished" in out and "[8/8]" in err and "rows/s" in err
    texts = {
        s: page.with_name(f"leaderboard.{s}").read_text() for s in ("md", "html", "json", "svg")
    }
    assert "stub-forgetter" in texts["md"] and json.loads(texts["json"])["finished"] == 36
    assert record.read(kept).cells == 36
    elsewhere = [tmp_path / "elsewhere" if part == tmp_path / "out" else part for part in small]
    status, out, _ = run(capsys, monkeypatch, *elsewhere, "--record", kept)
    assert status == 0 and f"36 cells taken over from {kept}" in out
    status, out, _ = run(capsys, monkeypatch, "leaderboard", kept, "--page", tmp_path / "again")
    assert status == 0 and (tmp_path / "again.md").read_text() == texts["md"].replace(
        "leaderboard.svg", "again.svg"
    )
    for wrong, words in (
        (("--seeds", "a"), "whole numbers"),
        (("--ray", "auto", "--jobs", "2"), "give one of them"),
    ):
        status, _, err = run(capsys, monkeypatch, *small, *wrong)
        assert status == 1 and words in err


def test_a_record_takes_the_place_of_a_folder_that_is_gone(tmp_path: Path, stub: Path) -> None:
    """What it holds is not done again; a fit is, where a cell that needs its edit is missing."""
    bench, plan = opened()
    old, new = Store(tmp_path / "old"), Store(tmp_path / "new")
    engine.execute(bench, plan, old.folder)
    whole = record.gather(bench, plan, old)
    record.write(whole, tmp_path / "record.json")
    kept = record.read(tmp_path / "record.json")
    assert (
        record.restore(kept, plan, new) == len(plan.cells) and record.restore(kept, plan, new) == 0
    )
    again = record.gather(bench, plan, new)
    for name in record.Record.model_fields:
        assert getattr(again, name) == getattr(whole, name), name
    gone = next(r for r in kept.rows if r.arm == "stub-forgetter" and r.attack == "stub-forger")
    fit = next(
        r for r in kept.rows if r.arm == gone.arm and r.concept == gone.concept and r.kind == "fit"
    )
    less = kept.model_copy(update={"rows": tuple(r for r in kept.rows if r is not gone)})
    part = Store(tmp_path / "part")
    assert record.restore(less, plan, part) == len(plan.cells) - 2
    assert not part.finished(str(fit.key)) and not part.finished(str(gone.key))
    before = sum(lines(stub).values())
    engine.execute(bench, plan, part.folder)
    assert sum(lines(stub).values()) == before + 2  # the fit and the attack that was missing
    assert results(part).keys() == results(old).keys()
    for row in record.gather(bench, plan, part).rows:
        (same,) = [r for r in whole.rows if r.key == row.key]
        assert (row.hit, row.pre, row.target, row.kept) == (
            same.hit,
            same.pre,
            same.target,
            same.kept,
        )


# -- resampling ------------------------------------------------------------------------------------


def test_layered_resamples_draw_seeds_then_prompts_within_them() -> None:
    weights = layered([["a", "a", "b"], ["c", "d"]], count=4_000, seed=1)
    assert weights.shape == (4_000, 5) and (weights[:, 0] == weights[:, 1]).all()
    first, second = weights[:, [0, 2]].sum(axis=1), weights[:, [3, 4]].sum(axis=1)
    assert (
        set(first) == {0, 2, 4} and ((first + second) == 4).all()
    )  # two layers of two prompts each
    assert np.mean(first == 0) == pytest.approx(0.25, abs=0.03)
    # With one layer it is the bootstrap over prompts: variance p (1 - p) / n.
    alone = layered([list(range(50))], count=4_000, seed=2)
    hits = np.arange(50) < 20
    assert np.std(alone @ hits / 50) == pytest.approx(np.sqrt(0.4 * 0.6 / 50), rel=0.1)
    # Seeds that differ widen what prompts alone would say.
    apart = layered([list(range(50)), list(range(50))], count=4_000, seed=3)
    assert np.std(apart @ np.r_[np.ones(50), np.zeros(50)] / 100) == pytest.approx(
        0.5 / np.sqrt(2), rel=0.1
    )
    with pytest.raises(InputError):
        layered([[]])
