"""Low-rank training that aligns a denoiser's predictions on a concept, its neighbours and points beyond.

The second stage of RealEra, arXiv 2410.09140; the loss as in a third-party re-implementation.  Rows of one
batch stand for the concept's embedding, new neighbours of it and new points beyond; the teacher is the model
before the first stage.  The changes of both stages are added by hooks, so that no weight is ever touched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..edit import Edit, deltas
from ..errors import MissingPart, SettingError, UnsupportedModel
from ..models.diffusion import DiffusionModel
from ..models.types import Condition
from . import finetune, scores, trajectories
from .low_rank import LowRank
from .neighbour_mining import free_rows, mine
from .projections import Projections
from .token_policy import Pair, span

__all__ = ["LAYERS", "Alignment", "adapted", "need_rows"]

LAYERS = ("text-projections", "cross-attention", "attention", "all")


def adapted(model: DiffusionModel, layers: str) -> list[str]:
    """Canonical names of the denoiser's linear weights that a choice of layers changes.

    Raises:
        MissingPart: The choice selects nothing in this denoiser.
    """
    if layers == "text-projections":
        return list(model.text_projections())
    inside = {"cross-attention": (".attn2.",), "attention": (".attn1.", ".attn2."), "all": ("",)}
    linear = {id(m.weight) for m in model.denoiser.modules() if isinstance(m, nn.Linear)}
    names = [
        name
        for name, parameter in model.tensors().items()
        if id(parameter) in linear and any(part in name for part in inside[layers])
    ]
    if not names:
        raise MissingPart(f"{model.name}: lora_layers={layers!r} selects nothing in this denoiser")
    return names


def need_rows(method: str, model: DiffusionModel, groups: Sequence[Projections]) -> None:
    """Refuse, in words, models where the embedding of a text is not one tensor of tokens' rows.

    Raises:
        UnsupportedModel: Several groups or segments, or rows that the denoiser makes itself.
    """
    fields = [group.text.field for group in groups]
    if fields != ["embeddings"] or len(groups[0].text.segments([""])) != 1:
        raise UnsupportedModel(
            f"{method}: the noise alignment perturbs the rows of one text, as one tokenizer and one input give them; "
            f"{model.name} is {model.layout.title}, where they come in parts; align=False leaves it out"
        )


class Alignment(finetune.Task):
    """The loss of the alignment; squared distances are means over a prediction's numbers.

    Args:
        method: The eraser; read are ``mining`` and ``first_row``, ``around(pairs)`` (the texts that are mined
            around), ``lora_rank``, ``lora_layers``, ``batch``, ``guidance``, ``sampling_steps``,
            ``step_neighbours``, ``step_beyond``, ``target``, ``eta_g``, ``alternate`` and ``bank``.
        model: The model before the first stage.
        stage: The edit of the first stage, not on the model.
        pairs: What is erased and what replaces it; the texts are walked towards in turn.
        seed: Seed of points, perturbations and the start of the changes.

    Raises:
        SettingError: The bank has no point for some of the texts.
    """

    def __init__(
        self,
        method: Any,
        model: DiffusionModel,
        stage: Edit,
        pairs: Sequence[Pair],
        seed: int,
    ) -> None:
        self.method, self.model, self.seed = method, model, seed
        self.texts = [pair.erased for pair in pairs]
        around = [pair.erased for pair in method.around(pairs)]
        with torch.no_grad():
            self.concept = model.encode(self.texts).detach()
            self.anchor = model.encode([pair.replacing for pair in pairs]).detach()
            self.mined = model.encode(around).detach()
            self.empty = model.unconditional().detach()
        segment = model.text_inputs()[0].segments(around)[0]
        spans = [span(segment.tokenizer, ids.tolist()) for ids in segment.ids]
        seen = [None] * len(spans) if segment.attended is None else segment.attended.tolist()
        self.free = [
            free_rows(own, attended, first_row=method.first_row)
            for own, attended in zip(spans, seen, strict=True)
        ]
        self.closed = _fixed(model, stage)
        names = adapted(model, method.lora_layers)
        self.changes = LowRank(model, names, rank=method.lora_rank, seed=seed, purpose="alignment")
        self.bank: tuple[trajectories.Trajectories, Tensor] | None = None
        if method.bank is not None:
            if method.bank < len(self.texts):
                raise SettingError(
                    f"bank={method.bank} has no point for {len(self.texts) - method.bank} of {len(self.texts)} texts; "
                    "allowed is at least one each"
                )
            points = self._walked(0, method.bank)
            self.bank = points, self.targets(points)

    def parameters(self) -> finetune.Groups:
        return {"changes": self.changes.parameters()}

    @contextlib.contextmanager
    def student(self) -> Iterator[None]:
        """The model with both changes."""
        with self.closed.attached(), self.changes.attached():
            yield

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """The loss at one draw of points and perturbations."""
        method = self.method
        points, y = self._points(step)
        near, far = (self._perturbed(points, step, beyond) for beyond in (False, True))
        own = not method.alternate or step.index % 2 == 0
        rest = not method.alternate or step.index % 2 == 1
        terms: list[tuple[Condition, Tensor, int]] = []  # rows, wished predictions, rows a point
        if own:
            terms.append((self.concept.select(points.which), y, 1))
        if rest and near is not None:
            each = method.step_neighbours
            terms.append((near, y.repeat_interleave(each, 0), each))
        if rest and far is not None:
            each = method.step_beyond
            wished = self.teacher(points.repeat(each), far)
            terms.append((far, wished, each))
        if not terms:
            terms.append((self.concept.select(points.which), y, 1))
        latents = [points.repeat(each) for _, _, each in terms]
        with self.student():
            made = scores.epsilon(
                self.model,
                trajectories.Trajectories.concatenate(latents),
                Condition.concatenate([c for c, _, _ in terms]),
            )
        self.model.cost.add("denoiser", len(made), "backward")
        parts = made.split([len(wished) for _, wished, _ in terms])
        losses = [
            (part - wished).square().mean() * (each if method.alternate else 1)
            for part, (_, wished, each) in zip(parts, terms, strict=True)
        ]
        return {"changes": torch.stack(losses).sum()}

    def teacher(self, points: trajectories.Trajectories, condition: Condition) -> Tensor:
        """What the model predicts without both changes."""
        with torch.no_grad():
            return scores.epsilon(self.model, points, condition)

    def targets(self, points: trajectories.Trajectories, batch: int = 64) -> Tensor:
        """``y`` of each point."""
        found = []
        for start in range(0, len(points.which), batch):
            some = points.select(slice(start, start + batch))
            if self.method.target == "anchor":
                found.append(self.teacher(some, self.anchor.select(some.which)))
                continue
            empty = self.teacher(some, self.empty.repeat(len(some.which)))
            concept = self.teacher(some, self.concept.select(some.which))
            found.append(empty - self.method.eta_g * (concept - empty))
        return torch.cat(found)

    def _points(self, step: finetune.Step) -> tuple[trajectories.Trajectories, Tensor]:
        count = self.method.batch
        if self.bank is None:
            points = self._walked(step.index * count, count)
            return points, self.targets(points)
        points, targets = self.bank
        pick = torch.randint(len(targets), (count,), generator=step.generator("pick"))
        return points.select(pick), targets[pick]

    def _walked(self, first: int, count: int) -> trajectories.Trajectories:
        """Points of the model with both changes as they are now."""
        method = self.method
        with self.student():
            return trajectories.draw(
                self.model, self.texts, count, steps=method.sampling_steps, guidance=method.guidance,
                seed=self.seed, first=first,
            )  # fmt: skip

    def _perturbed(
        self, points: trajectories.Trajectories, step: finetune.Step, beyond: bool
    ) -> Condition | None:
        """New neighbours of each point's text, or points beyond: ``each`` rows a point, or ``None`` of none."""
        each = self.method.step_beyond if beyond else self.method.step_neighbours
        if not each:
            return None
        draw = step.generator("beyond" if beyond else "neighbours")
        rows = self.mined.select(points.which)
        found = [
            mine(
                e, self.free[int(which)], each, beyond=beyond, mining=self.method.mining,
                generator=draw,
            ).points
            for e, which in zip(rows.embeddings, points.which, strict=True)
        ]  # fmt: skip
        return rows.repeat(each).with_embeddings(torch.cat(found))


def _fixed(model: DiffusionModel, stage: Edit) -> LowRank:
    """The changes of an edit, to be added by hooks; not trained."""
    names = [target.name for target in stage.manifest.targets]
    changes = LowRank(model, names)
    for name in names:
        weight = model.tensor(name)
        pair = deltas.factors(stage, name, weight)
        assert pair is not None
        held = [nn.Parameter(t.to(weight.device, torch.float32), requires_grad=False) for t in pair]
        changes.up[name], changes.down[name] = held
    return changes
