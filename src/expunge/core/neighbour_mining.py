"""Neighbours of a text embedding, and points beyond them, by random perturbation.

From an embedding ``e`` (its free rows as one vector of ``m`` numbers) towards a random point ``v``:

    v ~ N(0, tau^2 I),    u = (v - e) / ||v - e||,    point = e + r u,    r ~ U[0, D]

    neighbour:  r <= D1 and S1 <= cos(e, point) <= S2          beyond:  cos(e, point) < S1

Source: RealEra, arXiv 2410.09140 (no official code).  There ``D = D1 = 400`` and ``tau = 1``, which is about
1.6 norms and one deviation of the text states of CLIP (norm about 250).  Here radii are given in norms of
``e``, and ``tau`` is the deviation of ``e`` unless it is set, so that other embedding spaces will do.

Along one ray the cosine only falls, so each set is one interval of ``r``.  With ``beta`` the angle between
``-e`` and ``u``, the point at angle ``theta`` from ``e`` has

    r(theta) = ||e|| sin(theta) / sin(theta + beta)            (never reached where theta + beta >= pi)

``analytic`` draws ``r`` uniformly from the interval, one draw a point; ``rejection`` draws from ``[0, D]``
until the conditions hold, as published.  For each ray both have the same distribution of ``r``.  Rejection
also prefers rays with longer intervals, which differ by little where ``m`` is large.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import SettingError
from .token_policy import Placed, Span
from .vocabulary_words import Words

__all__ = ["SAMPLERS", "Mined", "Mining", "Survey", "free_rows", "mine"]

SAMPLERS = ("analytic", "rejection")

CHUNK = 32
"""Points drawn at a time: bounds memory."""

PATIENCE = 200
"""Draws without a single hit after which the conditions are taken to be out of reach."""


@dataclasses.dataclass(frozen=True)
class Mining:
    """What counts as near.

    Attributes:
        radius: ``D`` in norms of ``e``.
        inner_radius: ``D1`` in norms of ``e``; ``None``: ``D``.
        low, high: ``S1`` and ``S2``.
        deviation: ``tau``; ``None``: ``||e|| / sqrt(m)``.
        sampler: One of ``SAMPLERS``.
    """

    radius: float = 1.6
    inner_radius: float | None = None
    low: float = 0.5
    high: float = 0.9
    deviation: float | None = None
    sampler: str = "analytic"

    def __post_init__(self) -> None:
        if not -1.0 <= self.low < self.high <= 1.0:
            raise SettingError(
                f"neighbour mining: the cosines are {self.low:g} and {self.high:g}; the first must be the smaller, "
                "and both between -1 and 1"
            )
        if self.sampler not in SAMPLERS:
            raise SettingError(
                f"neighbour mining: sampler {self.sampler!r} is unknown; allowed: {', '.join(SAMPLERS)}"
            )


class Mined(NamedTuple):
    """Perturbed embeddings.

    Attributes:
        points: ``(n, tokens, width)``; rows that are not free are those of ``e``.
        cosines: ``(n,)`` float64, over the free rows.
        accepted: Share of ``r ~ U[0, D]`` that the conditions allow, over the rays that were drawn.
    """

    points: Tensor
    cosines: Tensor
    accepted: float


def free_rows(text: Span, attended: Sequence[int] | None, *, first_row: bool) -> Tensor:
    """Which rows of a text are perturbed, bool ``(T,)``: those the denoiser sees.

    Without ``first_row`` the begin token stays as it is: it is the same in every text, so its change would
    be one of all texts.  A vector that stands for a whole text is always free.
    """
    free = torch.ones(text.length, dtype=torch.bool)
    if attended is not None:
        free &= torch.tensor(attended, dtype=torch.bool)
    if text.tokens and not first_row:
        free[: text.first] = False
    return free


def mine(
    embedding: Tensor,
    free: Tensor,
    count: int,
    *,
    beyond: bool,
    mining: Mining,
    generator: torch.Generator,
) -> Mined:
    """``count`` neighbours of an embedding, or points beyond them.

    Args:
        embedding: ``e``, ``(tokens, width)``.
        free: bool ``(tokens,)``: rows that are perturbed; norms and cosines are taken over them.
        count: Number of points.
        beyond: Points beyond the neighbours in place of neighbours.
        mining: The conditions.
        generator: A private CPU generator.

    Raises:
        SettingError: No row is free, the free rows are zero, or no ray meets the conditions.
    """
    e = embedding.detach()[free].flatten().to("cpu", torch.float64)
    size = float(e.norm())
    if size == 0.0:
        raise SettingError("neighbour mining: the embedding has no free row that is not zero")
    tau = size / math.sqrt(len(e)) if mining.deviation is None else mining.deviation
    found, cosines = [e.new_zeros(0, len(e))], [e.new_zeros(0)]
    done, drawn, allowed = 0, 0, 0.0
    while done < count:
        towards = tau * torch.randn(min(CHUNK, count - done), len(e), generator=generator) - e
        u = towards / towards.norm(dim=1, keepdim=True)
        radii, hit, share = _radii(e, u, beyond, mining, generator)
        points = (e + radii[:, None] * u)[hit]
        found.append(points)
        cosines.append(_cosines(e, points))
        done, drawn, allowed = done + len(points), drawn + len(u), allowed + float(share.sum())
        if not done and drawn >= PATIENCE:
            kind = f"a cosine below {mining.low:g}" if beyond else (
                f"a cosine from {mining.low:g} to {mining.high:g}")  # fmt: skip
            raise SettingError(
                f"neighbour mining: no point within {mining.radius:g} norms of the embedding has {kind}; "
                "raise the radius"
            )
    points = embedding.detach().repeat(count, 1, 1)
    points[:, free] = torch.cat(found).reshape(count, -1, embedding.shape[1]).to(points)
    return Mined(points, torch.cat(cosines), allowed / drawn if drawn else 0.0)


def _cosines(e: Tensor, points: Tensor) -> Tensor:
    return points @ e / (points.norm(dim=1) * e.norm())


def _radii(
    e: Tensor, u: Tensor, beyond: bool, mining: Mining, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """``r`` of each ray, whether it meets the conditions, and the share of ``[0, D]`` that does."""
    outer = mining.radius * float(e.norm())
    inner = outer
    if mining.inner_radius is not None:
        inner = min(outer, mining.inner_radius * float(e.norm()))
    dice = torch.rand(len(u), generator=generator, dtype=torch.float64)
    if mining.sampler == "rejection":
        radii = outer * dice
        cosines = _cosines(e, e + radii[:, None] * u)
        if beyond:
            hit = cosines < mining.low
        else:
            hit = (cosines >= mining.low) & (cosines <= mining.high) & (radii <= inner)
        return radii, hit, hit.double()
    edge = _reach(e, u, mining.low)
    start, stop = edge, torch.full_like(edge, outer)
    if not beyond:
        start, stop = _reach(e, u, mining.high), edge.clamp(max=inner)
    length = (stop - start).clamp_min(0.0)
    hit = length > 0
    radii = torch.where(hit, start + length * dice, torch.zeros_like(length))
    return radii, hit, length / outer


def _reach(e: Tensor, u: Tensor, cosine: float) -> Tensor:
    """``r`` at which the cosine to ``e`` falls to a value; infinite where it never does."""
    theta = math.acos(cosine)
    beta = torch.acos((-(u @ e) / e.norm()).clamp(-1.0, 1.0))
    radii = float(e.norm()) * math.sin(theta) / torch.sin(theta + beta)
    return torch.where(theta + beta < math.pi, radii, torch.full_like(radii, math.inf))


class Survey:
    """What mining found, over all texts of an edit.

    Args:
        words: Words that mined neighbours are compared with; ``None``: none.
    """

    def __init__(self, words: Words | None) -> None:
        self.words = words
        self.accepted: dict[bool, list[tuple[float, int]]] = {False: [], True: []}
        self.range: tuple[float, float] | None = None
        self.nearest: dict[str, dict[str, Any]] = {}

    def add(self, found: Mined, beyond: bool) -> None:
        """Take in the points of one text."""
        self.accepted[beyond].append((found.accepted, len(found.points)))
        if not beyond:
            low, high = float(found.cosines.min()), float(found.cosines.max())
            old = self.range or (low, high)
            self.range = min(old[0], low), max(old[1], high)

    def look(self, text: str, place: Placed, found: Mined, most: int = 5) -> None:
        """Which words the neighbours of one text are nearest to; texts that are no word are not looked at."""
        if self.words is None or place.segment != self.words.segment:
            return
        cosines = self.words.cosines(self.words.seen(found.points, place.span))
        itself = 0.0
        if text in self.words.words:
            here = self.words.words.index(text)
            itself = float((cosines.argmax(1) == here).double().mean())
            cosines[:, here] = -2.0
        others = Counter(self.words.words[i] for i in cosines.argmax(1).tolist())
        self.nearest[text] = {"itself": itself, "others": dict(others.most_common(most))}

    def report(self) -> dict[str, Any]:
        """Numbers of points, shares of draws accepted, range of cosines, nearest words.

        ``nearest_words``: for each text, the share of its neighbours that are nearest to the text itself, and
        the other words that most of them are nearest to, with numbers of neighbours.
        """
        found: dict[str, Any] = {}
        for beyond, name in ((False, "neighbours"), (True, "beyond")):
            parts = self.accepted[beyond]
            count = sum(n for _, n in parts)
            found[name] = count
            found[f"{name}_accepted"] = (
                sum(share * n for share, n in parts) / count if count else None
            )
        return {**found, "cosines": self.range and list(self.range), "nearest_words": self.nearest}
