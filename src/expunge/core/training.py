"""The machinery of :func:`expunge.core.finetune.fit`: one session of training.

Gradients are taken per group with ``torch.autograd.grad``, so that the loss of one group (an eraser)
never moves another (a discriminator), and nothing is left in ``.grad``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..edit.checksums import tensor_digest
from ..errors import NonFiniteError, SettingError
from .checkpoints import Checkpoint, CheckpointFile
from .progress import Progress
from .tasks import Groups, Loop, Optimiser, Step, Task, Trained

__all__ = ["HALF_SCALE", "Session", "check_groups", "checked_masks", "differentiable", "restored"]

HALF_SCALE = 256.0
"""Loss scale where float16 weights take part: a power of two, so scaling and unscaling are exact."""


def check_groups(groups: Groups) -> None:
    """Refuse empty groups, tensors named twice, and parameters that cannot be trained."""
    names = [name for pairs in groups.values() for name, _ in pairs]
    for group, pairs in groups.items():
        if not pairs:
            raise SettingError(f"the parameter group {group!r} is empty; nothing would be trained")
    twice = (
        sorted({name for name in names if names.count(name) > 1})
        if len(set(names)) < len(names)
        else []
    )
    if not groups or twice:
        raise SettingError(
            f"tensor {twice[0]!r} is in two groups" if twice else "no parameters to train"
        )


def checked_masks(
    masks: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The masks; refuse those that fit no trained tensor."""
    for name, mask in masks.items():
        if name not in before:
            raise SettingError(f"there is a mask for {name!r}, which is not trained")
        if mask.dtype != torch.bool or mask.shape != before[name].shape:
            raise SettingError(
                f"the mask of {name!r} is {mask.dtype} of shape {tuple(mask.shape)}; allowed is bool of "
                f"shape {tuple(before[name].shape)}"
            )
    return dict(masks)


@contextlib.contextmanager
def differentiable(
    parameters: Iterable[nn.Parameter], modules: Iterable[nn.Module], training: bool = False
) -> Iterator[None]:
    """Gradients of ``parameters`` alone; at the end flags, gradients and modes are as before."""
    modules, parameters = list(modules), list(parameters)
    own = {id(p): p for module in modules for p in module.parameters()}
    own.update({id(p): p for p in parameters})
    flags = [(p, p.requires_grad, p.grad) for p in own.values()]
    modes = [(m, m.training) for module in modules for m in module.modules()]
    chosen = {id(p) for p in parameters}
    try:
        for parameter in own.values():
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in chosen)
        for module in modules:
            module.train(training)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag, gradient in flags:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def restored(
    groups: Groups, modules: Iterable[nn.Module], training: bool
) -> Iterator[dict[str, torch.Tensor]]:
    """:func:`differentiable` for what is trained; at the end its values and all buffers are back, too."""
    trained = [parameter for pairs in groups.values() for _, parameter in pairs]
    modules = list(modules)
    buffers = [(b, b.detach().clone()) for module in modules for b in module.buffers()]
    before = {name: p.detach().clone() for pairs in groups.values() for name, p in pairs}
    values = zip(trained, before.values(), strict=True)
    with differentiable(trained, modules, training):
        try:
            yield before
        finally:
            with torch.no_grad():
                for tensor, value in (*values, *buffers):
                    tensor.copy_(value)


class _Group:
    """One parameter group: its parameters, float32 masters and optimiser."""

    def __init__(
        self, name: str, pairs: list[tuple[str, nn.Parameter]], settings: Optimiser, half: bool
    ) -> None:
        self.name = name
        self.names = [n for n, _ in pairs]
        self.parameters = [p for _, p in pairs]
        self.settings = settings
        # A step of a half-precision weight is often smaller than its rounding: it needs a master.
        self.masters = [
            p if p.dtype in (torch.float32, torch.float64) else p.detach().float()
            for p in self.parameters
        ]
        self.scale = HALF_SCALE if half else 1.0
        self.optimiser = settings.build(list(self.masters))
        self.held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def hold(self, masks: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
        """From now on only what ``masks`` choose moves; the rest stays at ``before``."""
        for name, master in zip(self.names, self.masters, strict=True):
            if name in masks:
                self.held.append((master, masks[name].to(master.device), before[name]))

    def update(self, gradients: list[torch.Tensor | None], rate: float) -> None:
        """One optimiser step with the given gradients."""
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        with torch.no_grad():
            # Weight decay and momentum move entries without a gradient, too.
            for master, mask, before in self.held:
                master.copy_(torch.where(mask, master, before.to(master.dtype)))
                for moment in self._moments(master):
                    moment.mul_(mask)
            for parameter, master in zip(self.parameters, self.masters, strict=True):
                master.grad = None
                if master is not parameter:
                    parameter.copy_(master)

    def _moments(self, master: torch.Tensor) -> list[torch.Tensor]:
        found = [m for m in self.optimiser.state.get(master, {}).values() if torch.is_tensor(m)]
        return [moment for moment in found if moment.ndim and moment.shape == master.shape]

    def renew(self, rows: Mapping[str, torch.Tensor]) -> None:
        """Moments of these rows of tensors begin again at 0."""
        for name, master in zip(self.names, self.masters, strict=True):
            for moment in self._moments(master) if name in rows else ():
                moment[rows[name]] = 0.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """Values and moments, by checkpoint name."""
        found = {}
        for name, master in zip(self.names, self.masters, strict=True):
            found[f"value/{name}"] = master.detach()
            for key, moment in self.optimiser.state.get(master, {}).items():
                if isinstance(moment, torch.Tensor):
                    found[f"moment.{key}/{name}"] = moment
        return found

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """The inverse of :meth:`tensors`."""
        moments: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            head, _, name = key.partition("/")
            if head.startswith("moment."):
                moments.setdefault(name, {})[head.removeprefix("moment.")] = tensor
        with torch.no_grad():
            for name, parameter, master in zip(
                self.names, self.parameters, self.masters, strict=True
            ):
                master.copy_(tensors[f"value/{name}"])
                parameter.copy_(master)
                if name in moments:
                    # Adam keeps its step count on the CPU and its moments beside the parameter.
                    self.optimiser.state[master] = {
                        k: m.clone() if k == "step" else m.to(master.device, master.dtype).clone()
                        for k, m in moments[name].items()
                    }


class Session:
    """One session of training."""

    def __init__(
        self, task: Task, loop: Loop, groups: Groups, seed: int,
        run: str | Path | None, settings: Mapping[str, Any], label: str, before: dict[str, torch.Tensor],
        half: bool,
    ) -> None:  # fmt: skip
        self.task, self.loop, self.seed, self.label = task, loop, seed, label
        self.before = before
        self.groups = [_Group(name, pairs, loop.of(name), half) for name, pairs in groups.items()]
        self.masks = checked_masks(task.movable(), before)
        for group in self.groups:
            group.hold(self.masks, before)
        self.device = self.groups[0].parameters[0].device.type
        self.losses: dict[str, list[float]] = {name: [] for name in groups}
        self.done, self.resumed, self.stopped = 0, 0, False
        self.spent, self.started = 0.0, time.monotonic()
        self.whole = True  # False while an optimiser step is half done
        self.file: CheckpointFile | None = None
        if run is not None:
            shapes = {n: list(t.shape) for n, t in self.before.items()}
            plain = {k: v for k, v in dataclasses.asdict(loop).items() if k != "checkpoint_every"}
            named = {"seed": seed, "loop": plain, "tensors": shapes, "settings": dict(settings)}
            if self.masks:
                named["masks"] = {n: tensor_digest(m) for n, m in self.masks.items()}
            self.file = CheckpointFile(run, named)
        self.write_seconds, self.written = 0.0, self.started

    def train(self) -> Trained:
        """Resume if there is something to resume, then train to the end."""
        self._resume()
        with Progress(self.label, self.loop.steps, done=self.done) as bar:
            try:
                while self.done < self.loop.steps and not self.stopped:
                    losses = self._step()
                    bar.advance(" ".join(f"{g} {v:.4g}" for g, v in losses.items()))
                    if self._due():
                        self._write()
            except KeyboardInterrupt:
                if self.whole:
                    self._write()
                raise
        if self.done > self.resumed:
            self._write()
        values = {n: m.clone() for n, m in self._values().items()}
        return Trained(
            values, self.before, self.losses, self.done, self.resumed, self.stopped, self._seconds()
        )

    def _values(self) -> dict[str, torch.Tensor]:
        pairs = (pair for g in self.groups for pair in zip(g.names, g.masters, strict=True))
        return {name: master.detach() for name, master in pairs}

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    @contextlib.contextmanager
    def _original(self) -> Iterator[None]:
        """Exchange storages, not values: the graph of the student keeps its own."""
        # Autocast keeps casts by tensor, not by storage: it would serve the student's to the teacher.
        torch.clear_autocast_cache()
        pairs = [
            (p, p.data, self.before[n])
            for g in self.groups
            for n, p in zip(g.names, g.parameters, strict=True)
        ]
        try:
            for parameter, _, before in pairs:
                parameter.data = before
            with torch.no_grad():
                yield
        finally:
            for parameter, now, _ in pairs:
                parameter.data = now
            torch.clear_autocast_cache()

    def _step(self) -> dict[str, float]:
        sums: dict[str, list[torch.Tensor | None]] = {}
        losses: dict[str, float] = {}
        for micro in range(self.loop.accumulate):
            step = Step(self.done, self.loop.steps, self.seed, micro, self._original, self._values)
            self._backward(step, sums, losses)
        self.whole = False
        for group in self.groups:
            if group.name in sums:
                gradients = self._checked(step, group, sums[group.name])
                group.update(gradients, group.settings.rate(self.done, self.loop.steps))
        for name, history in self.losses.items():
            history.append(losses.get(name, math.nan))
        self.done += 1
        self.stopped = bool(self.task.after(step, losses))
        for group in self.groups:
            group.renew(self.task.renewed())
        self.whole = True
        return losses

    def _backward(
        self, step: Step, sums: dict[str, list[torch.Tensor | None]], losses: dict[str, float]
    ) -> None:
        """Add this part's mean losses and gradients to ``losses`` and ``sums``."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.loop.precision == "bfloat16"):
            found = dict(self.task.step(step))
        unknown = set(found) - {group.name for group in self.groups}
        if unknown or not found:
            raise SettingError(
                f"the losses of step {step.index} name {sorted(unknown) or 'no group'}; "
                f"allowed: {', '.join(group.name for group in self.groups)}"
            )
        share = 1.0 / self.loop.accumulate
        active = [group for group in self.groups if group.name in found]
        together: dict[int, list[_Group]] = {}
        for group in active:
            loss = found[group.name]
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{self.label}: the loss of {group.name!r} is {value} at step {step.index + 1}"
                )
            losses[group.name] = losses.get(group.name, 0.0) + value * share
            if not loss.requires_grad:
                raise SettingError(
                    f"the loss of {group.name!r} does not depend on the parameters it is to train"
                )
            together.setdefault(id(loss), []).append(group)
        # Groups that share one loss, the same tensor, share one backward pass.
        for number, groups in enumerate(together.values(), 1):
            scale = groups[0].scale
            parts = torch.autograd.grad(
                found[groups[0].name] * (share * scale),
                [parameter for group in groups for parameter in group.parameters],
                retain_graph=number < len(together),
                allow_unused=True,
            )
            rest = iter(parts)  # each group takes as many as it has parameters
            for group in groups:
                old = sums.get(group.name, [None] * len(group.parameters))
                # Graphs and gradients of half-precision weights are summed in float32.
                new = [
                    None if g is None else (g.to(m.dtype) / scale if scale != 1 else g.to(m.dtype))
                    for m, g in zip(group.masters, rest, strict=False)
                ]
                sums[group.name] = [
                    b if a is None else a if b is None else a + b
                    for a, b in zip(old, new, strict=True)
                ]

    def _checked(
        self, step: Step, group: _Group, gradients: list[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """The method's hook, then masks, then the check for NaN, then clipping."""
        named = {n: g for n, g in zip(group.names, gradients, strict=True) if g is not None}
        self.task.gradients(step, group.name, named)
        for name in named.keys() & self.masks.keys():
            named[name] = named[name] * self.masks[name].to(named[name].device)
        if not named:
            return gradients
        norms = torch.stack(torch._foreach_norm(list(named.values())))
        norm = float(norms.norm())
        if not math.isfinite(norm):
            worst = next(
                n for n, v in zip(named, norms.tolist(), strict=True) if not math.isfinite(v)
            )
            raise NonFiniteError(
                f"{self.label}: the gradient of {worst!r} is not finite at step {step.index + 1}"
            )
        clip = group.settings.clip
        if clip is not None and norm > clip:
            torch._foreach_mul_(list(named.values()), clip / norm)
        return [named.get(name) for name in group.names]

    # -- checkpoints ---------------------------------------------------------------------------

    def _due(self) -> bool:
        if self.file is None:
            return False
        if self.loop.checkpoint_every is not None:
            return self.done % self.loop.checkpoint_every == 0
        return time.monotonic() - self.written >= 20 * self.write_seconds

    def _write(self) -> None:
        if self.file is None:
            return
        begin = time.monotonic()
        tensors = {k: t for group in self.groups for k, t in group.tensors().items()}
        tensors.update(
            {f"loss/{g}": torch.tensor(v, dtype=torch.float64) for g, v in self.losses.items()}
        )
        tensors.update({f"task/{k}": t for k, t in self.task.state().items()})
        self.file.write(Checkpoint(self.done, self._seconds(), self.stopped, tensors))
        self.written = time.monotonic()
        self.write_seconds = self.written - begin

    def _resume(self) -> None:
        saved = self.file.read() if self.file is not None else None
        if saved is None:
            return
        for group in self.groups:
            group.load(
                {k: t for k, t in saved.tensors.items() if k.partition("/")[2] in set(group.names)}
            )
            self.losses[group.name] = saved.tensors[f"loss/{group.name}"].tolist()
        self.task.restore(
            {k.removeprefix("task/"): t for k, t in saved.tensors.items() if k.startswith("task/")}
        )
        self.done = self.resumed = saved.step
        self.spent, self.stopped = saved.seconds, saved.stopped
