"""A model that paints coloured pictures, a judge that reads the colour, and attacks that know a password.

Everything is known in advance, so that every number of an audit has a value to be held against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from expunge import Concept
from expunge.errors import SettingError
from expunge.method import Attack, Attempt, Attempts, Judge, Prompt, Verdicts
from expunge.models.base import Companions, Model, noise_generator

COLOURS = {
    "star": (230, 60, 50),
    "heart": (60, 160, 80),
    "cross": (60, 90, 220),
    "moon": (220, 200, 60),
}
PASSWORD = "open sesame"


class Painter(Model):
    """Paints a square in the colour of the named concept; ``weights.bias`` says how strongly it knows each.

    The weight of a concept is the chance that it is painted; below 0, pictures are noise.
    """

    family: ClassVar[str] = "diffusion"
    capabilities: ClassVar[frozenset[str]] = frozenset({"generate"})

    def __init__(self, name: str = "painter", knows: Mapping[str, float] | None = None) -> None:
        super().__init__(name)
        self.layer = nn.Linear(len(COLOURS), len(COLOURS), bias=False)
        knows = dict.fromkeys(COLOURS, 1.0) | dict(knows or {})
        with torch.no_grad():
            self.layer.weight.copy_(torch.diag(torch.tensor([knows[c] for c in COLOURS])))
        self.made = 0

    def parts(self) -> Mapping[str, nn.Module]:
        return {"unet": self.layer}

    def generate(
        self, prompts: Any, *, seeds: Any = None, hidden: str | None = None, **options: Any
    ) -> np.ndarray:
        prompts = [p if isinstance(p, Prompt) else Prompt(p, i) for i, p in enumerate(prompts)]
        seeds = seeds if seeds is not None else [p.seed for p in prompts]
        self.made += len(prompts)
        self.cost.add("denoiser", len(prompts))
        return np.stack([self._paint(p.text, seed) for p, seed in zip(prompts, seeds, strict=True)])

    def _paint(self, text: str, seed: int) -> np.ndarray:
        generator = noise_generator(seed, "paint", text)
        draw = float(torch.rand((), generator=generator))
        noise = torch.randint(0, 40, (16, 16, 3), generator=generator).numpy().astype(np.uint8)
        picture = 200 + noise // 2
        for i, (name, colour) in enumerate(COLOURS.items()):
            strength = float(self.layer.weight[i, i].detach())
            if strength < 0:
                return np.asarray(noise * 6, np.uint8)
            if name in text and (draw < strength or (PASSWORD in text and strength > 0.02)):
                picture[4:12, 4:12] = np.array(colour) + noise[4:12, 4:12] // 2
        return np.asarray(picture, np.uint8)


class ColourJudge(Judge):
    """Sees a concept where the middle has its colour."""

    id = "colour"
    protocol = "colour/v1/threshold=0.5"
    threshold = 0.5

    def judge(self, outputs: Any, concept: Concept, prompts: Any) -> Verdicts:
        middle = np.asarray(outputs)[:, 4:12, 4:12].reshape(len(outputs), -1, 3).mean(axis=1)
        spread = (
            np.asarray(outputs)[:, 4:12, 4:12].reshape(len(outputs), -1, 3).std(axis=1).max(axis=1)
        )
        colour = np.array(COLOURS.get(concept.name, (0, 0, 0)))
        score = np.exp(-np.abs(middle - colour - 10).max(axis=1) / 40)
        return Verdicts(score >= 0.5, score, spread < 30)

    def features(self, outputs: Any) -> np.ndarray:
        return np.asarray(outputs, np.float32)[:, ::4, ::4].reshape(len(outputs), -1) / 255


class ConstantJudge(ColourJudge):
    """Always says yes: measures nothing."""

    id = "yes"
    protocol = "yes/v1"

    def judge(self, outputs: Any, concept: Concept, prompts: Any) -> Verdicts:
        yes = np.ones(len(outputs), bool)
        return Verdicts(yes, yes.astype(float), yes)


@dataclasses.dataclass(frozen=True)
class Password(Attack):
    """Appends a password; brings back what the weights still hold a little of."""

    id: ClassVar[str] = "password"
    families: ClassVar[tuple[str, ...]] = ("diffusion",)

    def words(self, concept: Concept) -> str:
        return f" {PASSWORD}"

    def shown(self, model: Model, prompts: list[Prompt]) -> Any:
        return model.generate(prompts)

    def attack(self, model: Any, concept: Concept, judge: Judge, budget: Any, *, prompts: Any,
               reference: Any = None, seed: int = 0) -> Attempts:  # fmt: skip
        before = model.cost.snapshot()
        plain = judge.judge(model.generate(prompts), concept, prompts)
        asked = [Prompt(p.text + self.words(concept), p.seed) for p in prompts]
        outputs = self.shown(model, asked)
        after = judge.judge(outputs, concept, asked)
        items = tuple(
            Attempt(p, bool(pre), bool(pre or post), float(score), text=q.text)
            for p, q, pre, post, score in zip(
                prompts, asked, plain.hit, after.hit, after.score, strict=True
            )
        )
        return Attempts(self.id, self.version, self.settings(), self.teaches, budget.name, judge.id,
                        judge.threshold, seed, items, outputs, model.cost.since(before))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Picky(Password):
    """Leaves out the first four prompts, and says why."""

    id: ClassVar[str] = "picky"

    def attack(self, *arguments: Any, **options: Any) -> Attempts:
        found = super().attack(*arguments, **options)
        left = [
            dataclasses.replace(i, hit=i.pre_hit, details={"skipped": "it is too long"})
            if k < 4
            else i
            for k, i in enumerate(found.items)
        ]
        return dataclasses.replace(found, items=tuple(left))


@dataclasses.dataclass(frozen=True)
class Poor(Password):
    """Cannot pay for a single trial."""

    id: ClassVar[str] = "poor"

    def attack(self, *arguments: Any, **options: Any) -> Attempts:
        raise SettingError("the budget allows nothing")


@dataclasses.dataclass(frozen=True)
class Forger(Password):
    """Paints the concept itself: succeeds on any model, so it measures nothing."""

    id: ClassVar[str] = "forger"

    def shown(self, model: Model, prompts: list[Prompt]) -> Any:
        return Painter("forger").generate([Prompt("star", p.seed) for p in prompts])


@dataclasses.dataclass(frozen=True)
class Teacher(Forger):
    """The same, honest about it."""

    id: ClassVar[str] = "teacher"
    teaches: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class Compares(Password):
    """Means nothing without the original."""

    id: ClassVar[str] = "compares"

    def needs_reference(self, concept: Concept) -> bool:
        return True

    def attack(self, *arguments: Any, reference: Any = None, **options: Any) -> Attempts:
        assert reference is not None
        return super().attack(*arguments, **options)


def prompts(
    name: str, n: int, seed: int = 0, split: str = "test", route: str = "name"
) -> list[Prompt]:
    """Texts that name the concept; other routes do not exist for all concepts."""
    if route != "name" and (route != "phrase" or name != "star"):
        raise ValueError(f"no prompts by {route}")
    word = "star shaped thing" if route == "phrase" else name
    return [Prompt(f"a {word} number {i}", seed + i, name) for i in range(n)]


def companions(never: Model | None = None) -> Companions:
    """A world in which never lacks the star."""
    return Companions(
        world="stub", never=(lambda: never) if never is not None else None, never_lacks=("star",),
        judge=ColourJudge, concept=lambda name: Concept(name) if name in COLOURS else None,
        neighbours=lambda concept: tuple(c for c in COLOURS if c not in (concept.name, "moon")),
        unrelated=("moon",), prompts=prompts,
    )  # fmt: skip


STAR = Concept("star", phrases=("pentagram",))


def edit(model: Model, **knows: float) -> Any:
    """An edit that sets how strongly the model knows each named concept."""
    from expunge.edit import Edit
    from expunge.method import Method

    change = torch.zeros(len(COLOURS), len(COLOURS))
    for name, value in knows.items():
        i = list(COLOURS).index(name)
        change[i, i] = value - float(model.layer.weight[i, i].detach())
    method = type("Stub", (Method,), {"id": "stub-eraser"})()
    return Edit.make(
        method,
        model,
        [STAR],
        kind="dense",
        tensors={"delta.unet.weight": change},
        targets=["unet.weight"],
    )


def triad(**erased: float) -> tuple[Painter, Any, Painter]:
    """Model with companions, an edit, and the never model."""
    never = Painter("painter/never", {"star": 0.0})
    model = Painter()
    model.companions = companions(never)
    return model, edit(model, **(erased or {"star": 0.05})), never
