"""What all recipes share: the resumable loop, learning rates, EMA, atomic files, command-line options.

Every random draw of step n comes from a generator seeded by (seed, n), so a run that is killed and resumed
draws what the uninterrupted one draws, and a checkpoint needs no generator states. A checkpoint is one
safetensors file (weights, EMA, optimiser moments; the counters are its metadata), replaced atomically.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
DEFAULT_CACHE = ".cache/world-train"
CHECKPOINT_SECONDS = 120.0

StepLoss = Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]]


def arguments(description: str, steps: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """The options that every recipe understands."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=steps, help="optimiser steps in all")
    parser.add_argument("--batch", type=int, default=batch, help="pictures per step")
    parser.add_argument("--lr", type=float, default=lr, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1, help="seed of everything that is drawn")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument(
        "--out", type=Path, default=WEIGHTS, help="folder that receives the finished weights"
    )
    parser.add_argument(
        "--cache", type=Path, default=Path(DEFAULT_CACHE), help="folder of pictures and checkpoints"
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="compute in bfloat16, weights in float32: 1.5 times faster where the processor has it",
    )
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True, help="use a checkpoint"
    )
    return parser


def generator_for(seed: int, step: int) -> torch.Generator:
    """The generator of one step, the same whether or not the run was interrupted."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def numpy_for(seed: int, step: int) -> np.random.Generator:
    """The numpy counterpart of `generator_for`."""
    return np.random.default_rng([seed, step])


def batch_indices(step: int, batch: int, size: int, seed: int) -> np.ndarray:
    """Indices of step's pictures when whole passes over `size` pictures are shuffled one after another."""
    first = step * batch
    found: list[np.ndarray] = []
    needed = batch
    while needed:
        epoch, offset = divmod(first, size)
        order = np.random.default_rng([seed, 7919, epoch]).permutation(size)
        found.append(order[offset : offset + needed])
        needed -= len(found[-1])
        first += len(found[-1])
    return np.concatenate(found)


def learning_rate(
    step: int, steps: int, top: float, warmup: int = 50, decay: float = 1.0, floor: float = 0.02
) -> float:
    """Linear warm-up, constant, then a cosine over the last `decay` share of the run (0: never falls)."""
    if step < warmup:
        return top * (step + 1) / warmup
    start = steps - int(decay * (steps - warmup))
    if step < start or start >= steps:
        return top
    share = (step - start) / (steps - start)
    return top * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))


def save_atomically(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file so that a kill leaves either the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(
        {name: value.detach().contiguous() for name, value in tensors.items()},
        temporary,
        metadata=metadata,
    )
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def lock(cache: Path, name: str) -> object:
    """Hold `name` for this process as long as the result lives; RuntimeError when another one trains it."""
    path = Path(cache) / f"{name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RuntimeError(f"{name} is being trained by another process (lock {path})") from None
    return file


@contextlib.contextmanager
def precision(bfloat16: bool) -> Iterator[None]:
    """Matrix products and convolutions in bfloat16, or everything in float32.

    The fused attention of processors is slow in bfloat16 (its backward pass takes a quarter of a denoiser's step);
    plain products are not.
    """
    if not bfloat16:
        yield
        return
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        yield


class Training:
    """One resumable training of `model`: call `run` with a function that computes a step's loss."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        options: argparse.Namespace,
        *,
        ema: float = 0.998,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.99),
        warmup: int = 50,
        decay: float = 1.0,
    ) -> None:
        self.name, self.model, self.options = name, model, options
        self.ema_rate, self.warmup, self.decay = ema, warmup, decay
        self.step = 0
        self.stopping = False
        self.path = Path(options.cache) / f"{name}.safetensors"
        named = [(key, value) for key, value in model.named_parameters() if value.requires_grad]
        self.parameters = dict(named)
        # Only matrices decay; gains, biases and the temperature must not be pulled to zero.
        groups = [
            {"params": [p for _, p in named if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimiser = torch.optim.AdamW(groups, lr=options.lr, betas=betas, foreach=True)
        self.ema = {key: value.detach().clone() for key, value in model.state_dict().items()}
        if options.resume and self.path.exists():
            self._load()

    def _load(self) -> None:
        with safe_open(self.path, "pt") as file:
            metadata = file.metadata() or {}
            parts = {key: file.get_tensor(key) for key in file.keys()}
        self.step = int(metadata["step"])
        self.model.load_state_dict({k[6:]: v for k, v in parts.items() if k.startswith("model.")})
        self.ema = {k[4:]: v for k, v in parts.items() if k.startswith("ema.")}
        for key, parameter in self.parameters.items():
            if f"mean.{key}" in parts:
                self.optimiser.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": parts[f"mean.{key}"].clone(memory_format=torch.preserve_format),
                    "exp_avg_sq": parts[f"square.{key}"].clone(memory_format=torch.preserve_format),
                }
        print(f"[{self.name}] resumed at step {self.step}", flush=True)

    def save(self) -> None:
        """Write the checkpoint."""
        parts = {f"model.{key}": value for key, value in self.model.state_dict().items()}
        parts |= {f"ema.{key}": value for key, value in self.ema.items()}
        for key, parameter in self.parameters.items():
            state = self.optimiser.state.get(parameter)
            if state:
                parts[f"mean.{key}"], parts[f"square.{key}"] = state["exp_avg"], state["exp_avg_sq"]
        save_atomically(parts, self.path, {"step": str(self.step)})

    @torch.no_grad()
    def _average(self) -> None:
        rate = min(self.ema_rate, (1 + self.step) / (10 + self.step))
        for key, value in self.model.state_dict().items():
            if value.is_floating_point():
                self.ema[key].lerp_(value, 1 - rate)
            else:
                self.ema[key].copy_(value)

    def run(
        self, loss_of: StepLoss, on_save: Callable[[], None] | None = None, every: int = 25
    ) -> None:
        """Train until `options.steps`, showing rate and time left, writing a checkpoint every two minutes.

        SIGTERM ends the run after the current step, with a checkpoint and what the caller writes.
        """
        options = self.options
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._stop)
        self.model.train()
        began = saved = time.monotonic()
        sums: dict[str, float] = {}
        first, seen = self.step, 0
        while self.step < options.steps and not self.stopping:
            rate = learning_rate(self.step, options.steps, options.lr, self.warmup, self.decay)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.optimiser.zero_grad(set_to_none=True)
            with precision(options.bfloat16):
                loss, shown = loss_of(self.step, generator_for(options.seed, self.step))
                loss.backward()
            norm = nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"{self.name}: the gradient of step {self.step} is not finite"
                )
            self.optimiser.step()
            self.step += 1
            self._average()
            for key, value in ({"loss": float(loss.detach()), "norm": float(norm)} | shown).items():
                sums[key] = sums.get(key, 0.0) + value
            seen += 1
            now = time.monotonic()
            if self.step % every == 0 or self.step == options.steps:
                self._show(sums, seen, (now - began) / (self.step - first), rate)
                sums, seen = {}, 0
            if now - saved > CHECKPOINT_SECONDS:
                self.save()
                saved = now
                if on_save is not None:
                    on_save()
        self.save()

    def _stop(self, *_: object) -> None:
        self.stopping = True

    def _show(self, sums: dict[str, float], seen: int, seconds: float, rate: float) -> None:
        numbers = " ".join(f"{key} {value / seen:.4f}" for key, value in sums.items())
        left = (self.options.steps - self.step) * seconds / 60
        at = f"[{self.name}] {self.step}/{self.options.steps}"
        print(f"{at} {numbers} lr {rate:.1e} {seconds:.2f} s/step, {left:.1f} min left", flush=True)

    def averaged(self) -> Iterator[tuple[str, Tensor]]:
        """The EMA weights, name by name."""
        yield from self.ema.items()

    def use_average(self) -> nn.Module:
        """Put the EMA weights into the model and return it, ready to be saved."""
        self.model.load_state_dict(self.ema)
        return self.model.eval()


def as_float(images: np.ndarray, channels_last: bool = True) -> Tensor:
    """uint8 (n, h, w, 3) pictures as float (n, 3, h, w) in 0..1."""
    found = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float().div_(255)
    return (
        found.contiguous(memory_format=torch.channels_last) if channels_last else found.contiguous()
    )


def shifted(images: Tensor, generator: torch.Generator, most: int = 2) -> Tensor:
    """The pictures moved together by up to `most` pixels each way, edges repeated."""
    dx, dy = (int(v) for v in torch.randint(0, 2 * most + 1, (2,), generator=generator))
    height, width = images.shape[-2:]
    padded = nn.functional.pad(images, (most,) * 4, mode="replicate")
    return padded[..., dy : dy + height, dx : dx + width]
