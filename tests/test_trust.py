"""A run that is killed at a checkpoint and resumed by a fresh process equals an uninterrupted one."""

from __future__ import annotations

import signal
import subprocess
import sys

from expunge.edit import Edit
from expunge.erase.diffusion.esd import ESD
from expunge.testing import tiny_diffusion

SETTINGS = {"steps": 4, "sampling_steps": 4, "lr": 1e-3, "layers": "esd-x-strict"}

# The loop writes after every step; the process kills itself hard right after the second one.
CHILD = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from expunge.core import checkpoints
from expunge.core.finetune import Loop
from expunge.erase.diffusion import esd
from expunge.testing import tiny_diffusion
write = checkpoints.CheckpointFile.write
def killing(self, checkpoint):
    write(self, checkpoint)
    if checkpoint.step == 2 and sys.argv[2] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
checkpoints.CheckpointFile.write = killing
loop = esd.finetune.Loop
esd.finetune.Loop = lambda **options: loop(**options, checkpoint_every=1)
edit = esd.ESD(**{settings!r}).erase(tiny_diffusion(), "star", seed=5, run=sys.argv[1])
edit.save(sys.argv[1] + "/edit.safetensors")
"""


def child(folder, mode):
    code = CHILD.replace("{settings!r}", repr(SETTINGS))
    return subprocess.run(
        [sys.executable, "-c", code, str(folder), mode], capture_output=True, text=True
    )


def test_sigkill_at_a_checkpoint_then_resume_is_bit_for_bit(tmp_path):
    killed = child(tmp_path, "kill")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["training.safetensors"]
    resumed = child(tmp_path, "finish")
    assert resumed.returncode == 0, resumed.stderr
    again = Edit.load(tmp_path / "edit.safetensors")
    assert again.manifest.report["resumed_at"] == 2
    whole = ESD(**SETTINGS).erase(tiny_diffusion(), "star", seed=5)
    assert again.digest == whole.digest  # the digest covers every tensor's bytes
    short = ESD(**{**SETTINGS, "steps": 3}).erase(tiny_diffusion(), "star", seed=5)  # control
    assert short.manifest.tensors_digest != whole.manifest.tensors_digest
