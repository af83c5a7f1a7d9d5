"""A training that is killed at any step and resumed by a fresh process equals an uninterrupted one, bit for bit.

One process imports everything and forks a fresh one for each run: the whole run, one that SIGKILL ends at a step drawn
anew each time, its resumption, and one that is a step short (control).  It runs no pass itself, so forking is safe.  It
makes an eraser's runs when a test asks for them, so that test processes that share the erasers repeat none.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expunge import catalogue
from expunge.edit import Edit

CHILD = """
import json, os, pathlib, random, signal, sys, traceback
import torch
torch.set_num_threads(1)
from expunge import catalogue
from expunge.testing import bench, resuming

folder = pathlib.Path(sys.argv[1])

def forked(work):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def run(method, name, kill_at=None, steps=resuming.STEPS):
    own = folder / method.id / name.removesuffix("-again")
    with resuming.writing(kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL)) as written:
        edit = resuming.short_run(method, own, steps)
    edit.save(own / "edit.safetensors")
    (own / "written.json").write_text(json.dumps(written))

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the runs say goes with their errors
for line in sys.stdin:
    id = line.strip()
    method = catalogue.resolve(id)
    bench.bench(method).opens()
    codes = {"whole": forked(lambda: run(method, "whole"))}
    written = json.loads((folder / id / "whole" / "written.json").read_text())
    if written:
        at = random.SystemRandom().randint(1, len(written) - 1)
        codes["killed"] = forked(lambda: run(method, "killed", kill_at=at))
        codes["left"] = sorted(p.name for p in (folder / id / "killed").iterdir())
        codes["again"] = forked(lambda: run(method, "killed-again"))
        codes["short"] = forked(lambda: run(method, "short", steps=resuming.STEPS - 1))
        codes["at"] = at
    print(json.dumps(codes), file=answers, flush=True)
"""

ERASERS = sorted(s.id for s in catalogue.implemented() if s.verb == "erase")


class Runs:
    """The process that makes the runs, each eraser's in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.errors = folder, folder / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip

    def __call__(self, id: str) -> tuple[dict, str]:
        """How an eraser's runs ended, and what the process has said on the way."""
        self.process.stdin.write(f"{id}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        said = self.errors.read_text()
        assert answer, said
        return json.loads(answer), said

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    made = Runs(tmp_path_factory.mktemp("runs"))
    yield made
    made.close()


@pytest.mark.parametrize("id", ERASERS)
def test_sigkill_at_any_step_then_resume_is_bit_for_bit(runs, id):
    folder = runs.folder
    codes, said = runs(id)
    assert codes["whole"] == 0, said
    if "killed" not in codes:
        pytest.skip(f"{id} trains nothing, so it writes no checkpoint")
    at = f"killed after checkpoint {codes['at']}\n{said}"
    assert codes["killed"] == -signal.SIGKILL and codes["again"] == codes["short"] == 0, at
    assert "edit.safetensors" not in codes["left"], at
    edits = {
        name: Edit.load(folder / id / name / "edit.safetensors")
        for name in ("whole", "killed", "short")
    }
    assert edits["killed"].digest == edits["whole"].digest, at  # covers every tensor's bytes
    assert edits["short"].manifest.tensors_digest != edits["whole"].manifest.tensors_digest, at
    whole, rest = (
        json.loads((folder / id / name / "written.json").read_text())
        for name in ("whole", "killed")
    )
    assert len(rest) < len(whole), f"began again from the start, {at}"
