"""A tiny model with companions, so that windows can be tried in seconds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from expunge import Concept
from expunge.app.session import Session
from expunge.app.shelf import Desk
from expunge.method import Judge, Prompt, Verdicts
from expunge.models.base import Companions
from expunge.testing import tiny_diffusion

NAMES = {"star": "object", "heart": "object", "moon": "object", "night": "style"}


class Redness(Judge):
    """Sees a concept where a picture is more red than blue."""

    id, protocol, threshold = "redness", "redness/1", 0.5

    def judge(self, outputs: Any, concept: Concept, prompts: Any) -> Verdicts:
        means = np.asarray(outputs, float).mean(axis=(1, 2))
        hit = means[:, 0] > means[:, 2]
        return Verdicts(hit, hit.astype(float), np.ones(len(hit), bool))


def _concept(name: str) -> Concept | None:
    if name not in NAMES:
        return None
    return Concept(name, NAMES[name], phrases=(f"{name}let",), anchor="thing")


def _prompts(
    name: str, n: int, seed: int = 0, split: str = "test", route: str = "name"
) -> list[Prompt]:
    return [Prompt(f"a {name} number {k}", seed=k, concept=name) for k in range(n)]


COMPANIONS = Companions(
    world="tiny",
    never=lambda: tiny_diffusion(1),
    never_lacks=("star",),
    judge=Redness,
    concept=_concept,
    neighbours=lambda c: tuple(n for n, kind in NAMES.items() if kind == c.kind and n != c.name),
    unrelated=("night",),
    prompts=_prompts,
)


def desk_with(folder: Path, companions: Companions | None = COMPANIONS, name: str = "tiny") -> Desk:
    """A desk on which a tiny model is open already."""
    desk = Desk(folder)
    model = tiny_diffusion()
    model.name = name
    model.companions = companions
    desk.models[name] = desk.watched(model)
    return desk


def session_on(desk: Desk, name: str = "tiny") -> Session:
    """A window that has chosen the tiny model."""
    session = Session(desk)
    job = session.open(name)
    assert job.wait(60) and job.state == "done", job.error
    return session


def without(**fields: Any) -> Companions:
    """The companions without some of them."""
    return dataclasses.replace(COMPANIONS, **fields)
