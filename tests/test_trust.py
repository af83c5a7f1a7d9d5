"""A training that is killed at any step and resumed by a fresh process equals an uninterrupted one, bit for bit.

One process imports everything and forks a fresh one for each run: the whole run, one that SIGKILL ends at a step drawn
anew each time, its resumption, and one that is a step short (control).  It runs no pass itself, so forking is safe.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys

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

for id in sys.argv[2:]:
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
    (folder / (id + ".json")).write_text(json.dumps(codes))
"""

ERASERS = sorted(s.id for s in catalogue.implemented() if s.verb == "erase")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), *ERASERS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


@pytest.mark.parametrize("id", ERASERS)
def test_sigkill_at_any_step_then_resume_is_bit_for_bit(runs, id):
    folder, said = runs
    codes = json.loads((folder / f"{id}.json").read_text())
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
