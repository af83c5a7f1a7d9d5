"""The training loop of every eraser that fine-tunes, and of relearning attacks.

A method supplies a :class:`Task`: which parameters train, in named groups, and the loss of each group
at a step.  The loop owns the rest: optimisers, precision, gradients, checkpoints, resume, progress,
early stop, and putting the model back exactly as it was.

    class MyTask(Task):
        def parameters(self):            # {"weights": [("unet.conv_in.weight", parameter), ...]}
        def step(self, step):            # {"weights": loss}
    trained = fit(MyTask(), Loop(steps=200, optimiser=Optimiser(lr=1e-5)), seed=0, modules=[unet])
    trained.values["unet.conv_in.weight"]        # the model itself is unchanged

All randomness of step ``n`` comes from :meth:`Step.generator`, which depends on (seed, purpose, n)
only.  A run that was killed and resumed is therefore equal to an uninterrupted one, bit for bit on a
CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..edit import Edit, deltas
from ..edit.manifest import Kind
from .tasks import Groups, Loop, Optimiser, Step, Task, Trained
from .training import Session, check_groups, restored

if TYPE_CHECKING:
    from ..concept import Concept
    from ..method import Method
    from ..models.base import Model

__all__ = [
    "Groups", "Loop", "Optimiser", "Step", "Task", "Trained",
    "edit_from", "fit", "put_back", "request", "train_edit",
]  # fmt: skip


def fit(
    task: Task,
    loop: Loop,
    *,
    seed: int,
    modules: Iterable[nn.Module] = (),
    run: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    label: str = "fine-tuning",
) -> Trained:
    """Train and put everything back.

    Args:
        task: The method's part.
        loop: Steps, optimisers, precision.
        seed: Seed of the run.
        modules: Modules that take part.  Parameters of theirs that are not trained are frozen, and
            training mode, ``requires_grad``, gradients and buffers are as before at the end.
        run: Folder for checkpoints and resume; ``None`` writes nothing.
        settings: Everything else that can change the result (method, model state, data), as plain
            values; a folder with other settings is refused.
        label: Shown beside the progress bar.

    Raises:
        NonFiniteError: A loss or gradient is NaN or infinite; names the step and the tensor.
        ResumeMismatch: The folder holds a run with other settings.
        KeyboardInterrupt: After a checkpoint was written.
    """
    groups, modules = task.parameters(), list(modules)
    check_groups(groups)
    with restored(groups, modules, loop.training) as before:
        return Session(
            task, loop, groups, seed, run, settings or {}, label, before, _float16(groups, modules)
        ).train()


@contextlib.contextmanager
def put_back(own: Mapping[str, nn.Parameter], values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """At the end of the block the parameters have these values again; for methods of several stages."""
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)


def _float16(groups: Groups, modules: Sequence[nn.Module]) -> bool:
    """Whether gradients pass through float16: also where what trains is float32, as low-rank changes are."""
    trained = [parameter for pairs in groups.values() for _, parameter in pairs]
    own = [parameter for module in modules for parameter in module.parameters()]
    return any(parameter.dtype == torch.float16 for parameter in (*trained, *own))


def request(
    method: Method, model: Model, concepts: Sequence[Concept], **more: Any
) -> dict[str, Any]:
    """The settings that name a fine-tuning run: method, version, model state, concepts, ``more``."""
    return {
        "method": method.id,
        "version": method.version,
        "hyperparameters": method.settings(),
        "model": model.state.key,
        "concepts": [concept.to_dict() for concept in concepts],
        **more,
    }


def edit_from(
    method: Method,
    model: Model,
    concepts: Sequence[Concept],
    before: Mapping[str, torch.Tensor],
    after: Mapping[str, torch.Tensor],
    *,
    dense: bool = False,
    further: Mapping[str, torch.Tensor] | None = None,
    **provenance: Any,
) -> Edit:
    """The edit that turns ``before`` into ``after``, in the smaller of two storages.

    Low rank (numerical rank at 1e-6 of the largest singular value) is taken where its factors hold
    fewer numbers than the dense changes.  Tensors that did not change are left out.

    Args:
        method: What made it.
        model: The model in the state the edit was fitted on.
        concepts: What it erases.
        before: Canonical tensor name -> value on the model.
        after: Canonical tensor name -> value wanted; same names and shapes.
        dense: Entries that did not change are to stay exact zeros: no factors but those that pick out the few
            rows that changed, as of a token table.
        further: Tensors that are no changes (rows of new tokens), by their names in the edit.  Where no
            weight was trained the edit is of kind ``control``, made of them.
        provenance: Passed on to :meth:`Edit.make`: keep, seed, cost, seconds, report, data_digest, acts, tokens.
    """
    if not before:
        made = dict(further or {})
        return Edit.make(
            method, model, concepts, kind="control", tensors=made, targets=(), **provenance
        )
    change = {name: after[name].double() - before[name].double() for name in before}
    moved = {n: d for n, d in change.items() if bool(d.any())} or dict(list(change.items())[:1])
    factors = _changed_rows(moved) if dense else _smaller_factors(moved)
    kind: Kind
    if factors is None:
        kind, tensors = "dense", {deltas.DENSE + n: d.float() for n, d in moved.items()}
    else:
        kind, tensors = "low-rank", {}
        for name, (up, down) in factors.items():
            tensors[deltas.UP + name], tensors[deltas.DOWN + name] = up.float(), down.float()
    tensors |= further or {}
    return Edit.make(
        method, model, concepts, kind=kind, tensors=tensors, targets=tuple(moved), **provenance
    )


def _changed_rows(
    change: Mapping[str, torch.Tensor],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """Exact factors, a one in each column of the first, where few rows of every tensor changed; else ``None``."""
    found = {}
    for name, delta in change.items():
        rows = delta.reshape(len(delta), -1).any(1).nonzero().flatten() if delta.ndim else None
        if rows is None or delta.ndim != 2 or 2 * len(rows) * sum(delta.shape) > delta.numel():
            return None
        up = torch.zeros(len(delta), len(rows), dtype=delta.dtype, device=delta.device)
        up[rows, torch.arange(len(rows), device=delta.device)] = 1
        found[name] = (up, delta[rows])
    return found


def _smaller_factors(
    change: Mapping[str, torch.Tensor],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]] | None:
    """Factors of all changes if they hold fewer numbers than the changes; else ``None``."""
    dense = sum(delta.numel() for delta in change.values())
    # Rank one is the least a tensor can cost; with that for the rest, most full-rank updates are
    # known to be dense after a few decompositions instead of all.
    least = {n: d.shape[0] + d.numel() // d.shape[0] if d.ndim else 2 for n, d in change.items()}
    total, found = sum(least.values()), {}
    for name in sorted(change, key=lambda n: -change[n].numel()):
        if total >= dense:
            return None
        up, down, _ = deltas.low_rank(change[name].reshape(change[name].shape or (1,)))
        total += up.numel() + down.numel() - least[name]
        found[name] = (up, down)
    return found if total < dense else None


def train_edit(
    method: Method,
    model: Model,
    concepts: Sequence[Concept],
    task: Task,
    loop: Loop,
    *,
    seed: int,
    keep: Sequence[str] = (),
    run: str | Path | None = None,
    data_digest: str | None = None,
    report: Mapping[str, Any] | None = None,
    cost_before: Mapping[str, int] | None = None,
) -> Edit:
    """What a fine-tuning eraser does at its end: :func:`fit`, then :func:`edit_from`.

    Args:
        method: The eraser.
        model: The model; unchanged afterwards.
        concepts: What is erased.
        task: Parameters and loss.
        loop: Steps and optimisers.
        seed: Seed of the run.
        keep: Names the eraser was told to preserve.
        run: Folder for checkpoints and resume.
        data_digest: Digest of example data; part of what a resumed run must agree on.
        report: More numbers for the report of the edit.
        cost_before: ``model.cost.snapshot()`` from before the eraser's own preparation.
    """
    start = time.monotonic()
    counted = model.cost.snapshot() if cost_before is None else cost_before
    trained = fit(
        task,
        loop,
        seed=seed,
        modules=tuple(model.parts().values()),
        run=run,
        settings=request(method, model, concepts, keep=list(keep), data=data_digest),
        label=method.id,
    )
    return edit_from(
        method,
        model,
        concepts,
        trained.before,
        trained.values,
        dense=bool(task.movable()),
        keep=keep,
        seed=seed,
        cost=model.cost.since(counted),
        seconds=time.monotonic() - start,
        report={**trained.report(), **(report or {})},
        data_digest=data_digest,
    )
