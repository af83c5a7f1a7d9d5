"""Numbers of the leaderboard with their resamples: shares, what came back, what is kept.

One resample draws seeds, and prompts within them, for all arms and attacks together: the arms were asked the
same prompts, and a difference between them is one of pairs.  Every number carries its value on all resamples,
so that means and ranks of numbers have intervals too.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from ...core.resampling import layered, reaching, unseen
from ...evidence.statistics import MINIMUM_RANGE
from .record import Bits, Record, Row

__all__ = ["Estimate", "Table", "harmonic", "mean"]

SPAN = 0.02
"""A resample in which original and never hardly differ says nothing about a ratio; it is left out."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number on the data and on each resample (NaN where a resample says nothing); ``n`` prompts behind it.

    ``below`` and ``above`` are how far its interval reaches at least, see :func:`expunge.core.resampling.unseen`.
    """

    value: float
    draws: np.ndarray
    n: int = 0
    below: float = 0.0
    above: float = 0.0

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % percentile interval, and what prompts that all agree cannot exclude."""
        usable = self.draws[np.isfinite(self.draws)]
        if not len(usable):
            return None
        low, high = np.percentile(usable, [2.5, 97.5])
        return reaching(self.value, (float(low), float(high)), self.below, self.above)

    def minus(self, other: Estimate) -> Estimate:
        """The difference, resample by resample."""
        return Estimate(
            self.value - other.value, self.draws - other.draws, min(self.n, other.n),
            math.hypot(self.below, other.above), math.hypot(self.above, other.below),
        )  # fmt: skip

    def over(self, scale: Estimate, least: float) -> Estimate:
        """The quotient; NaN on resamples whose ``scale`` is not above ``least``.

        The scale's own reach is left out: what it is taken for is checked apart from it.
        """
        usable = scale.draws > least
        draws = np.where(usable, self.draws / np.where(usable, scale.draws, 1.0), np.nan)
        by = scale.value
        return Estimate(self.value / by, draws, self.n, self.below / by, self.above / by)

    def left(self) -> Estimate:
        """What is missing to 1."""
        return Estimate(1 - self.value, 1 - self.draws, self.n, self.above, self.below)


def mean(found: Sequence[Estimate | None]) -> Estimate | None:
    """Mean of what there is, each weighing the same; ``None`` where there is nothing."""
    known = [one for one in found if one is not None]
    if not known:
        return None
    reach = (
        math.hypot(*side) / len(known)
        for side in ([one.below for one in known], [one.above for one in known])
    )
    return Estimate(
        float(np.mean([one.value for one in known])), np.mean([one.draws for one in known], axis=0),
        sum(one.n for one in known), *reach,
    )  # fmt: skip


def harmonic(one: Estimate | None, two: Estimate | None) -> Estimate | None:
    """Harmonic mean of two shares, clipped to 0 to 1."""
    if one is None or two is None:
        return None

    def of(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        a, b = np.clip(a, 0, 1), np.clip(b, 0, 1)
        return 2 * a * b / np.maximum(a + b, 1e-12)

    def at(a: float, b: float) -> float:
        return float(of(np.array([a]), np.array([b]))[0])

    value = at(one.value, two.value)
    below, above = (
        math.hypot(at(one.value + a, two.value) - value, at(one.value, two.value + b) - value)
        for a, b in ((-one.below, -two.below), (one.above, two.above))
    )
    return Estimate(value, of(one.draws, two.draws), min(one.n, two.n), below, above)


class Table:
    """The cells of a record by what they are of.

    Args:
        record: The record.
        seeds: Only these seeds; default all.
        count: Resamples.
    """

    def __init__(
        self, record: Record, seeds: Sequence[int] | None = None, count: int = 2_000
    ) -> None:
        self.record, self.count = record, count
        self.seeds = tuple(record.seeds if seeds is None else seeds)
        self._rows: dict[tuple[str, str, str, str | None], dict[int, Row]] = {}
        self._drawn: dict[tuple[str, tuple[tuple[tuple[int, int], ...], ...]], np.ndarray] = {}
        for row in record.rows:
            if row.seed in self.seeds:
                place = (row.kind, row.concept, row.arm, row.attack)
                self._rows.setdefault(place, {})[row.seed] = row

    def rows(self, kind: str, concept: str, arm: str, attack: str | None = None) -> dict[int, Row]:
        """Seed -> the finished cell, refusals left out."""
        found = self._rows.get((kind, concept, arm, attack), {})
        return {seed: row for seed, row in found.items() if row.refused is None}

    def refusals(self, kind: str, concept: str, arm: str, attack: str | None = None) -> list[str]:
        """What the method said where it refused."""
        found = self._rows.get((kind, concept, arm, attack), {})
        return [row.refused for row in found.values() if row.refused is not None]

    def pending(self, concept: str, arm: str, attack: str) -> bool:
        """Whether an attack on an arm is still to be run at some seed; what was refused is answered."""
        return set(self.seeds) > set(self._rows.get(("attack", concept, arm, attack), {}))

    # -- shares ------------------------------------------------------------------------------------

    def share(self, found: Mapping[int, Sequence[Bits]], concept: str) -> Estimate | None:
        """Mean over groups of the share of hits; ``found`` has for each seed the groups' bits."""
        layers, values = [], []
        for _, groups in sorted(found.items()):
            layers.append(
                [(place, unit) for place, bits in enumerate(groups) for unit in bits.prompts()]
            )
            values += [hit for bits in groups for hit in bits.values()]
        if not values:
            return None
        columns = list(zip(*(groups for _, groups in sorted(found.items())), strict=True))
        shares = [np.mean([hit for bits in column for hit in bits.values()]) for column in columns]
        # Each group weighs the same in the resamples too, however many outputs it has.
        sizes = [sum(len(bits.hits) for bits in column) for column in columns]
        each = np.array(
            [
                sum(sizes) / len(sizes) / sizes[place]
                for _, groups in sorted(found.items())
                for place, bits in enumerate(groups)
                for _ in bits.hits
            ]
        )
        weights = self._weights(concept, tuple(map(tuple, layers))) * each
        draws = weights @ np.array(values, float) / weights.sum(axis=1)
        reach = [
            unseen(
                [hit for bits in column for hit in bits.values()],
                [(place, unit) for place, bits in enumerate(column) for unit in bits.prompts()],
            )
            for column in columns
        ]
        below, above = (math.hypot(*side) / len(columns) for side in zip(*reach, strict=True))
        prompts = sum(len(set(layer)) for layer in layers)
        return Estimate(float(np.mean(shares)), draws, prompts, below, above)

    def _weights(self, concept: str, layers: tuple[tuple[tuple[int, int], ...], ...]) -> np.ndarray:
        # Named by the concept: the same draws for all arms and attacks of it, others for other concepts.
        if (concept, layers) not in self._drawn:
            seed = [zlib.crc32(concept.encode()), sum(map(len, layers))]
            self._drawn[concept, layers] = layered(layers, self.count, seed=seed)
        return self._drawn[concept, layers]

    def plain(self, concept: str, arm: str) -> Estimate | None:
        """Share of prompts by name that show the concept, without any attack."""
        rows = self.rows("measures", concept, arm)
        return self.share({s: [row.target] for s, row in rows.items() if row.target}, concept)

    def routes(self, concept: str, arm: str) -> Estimate | None:
        """The same where it is asked for in other words, the mean over the ways that the world knows."""
        rows = self.rows("measures", concept, arm)
        return self.share(
            {s: list(row.routes.values()) for s, row in rows.items() if row.routes}, concept
        )

    def kept(self, concept: str, arm: str) -> Estimate | None:
        """What is left of the original's hits on kept concepts; 1 is all of it."""
        rows, reference = (
            self.rows("measures", concept, arm),
            self.rows("measures", concept, "original"),
        )
        both = sorted(rows.keys() & reference.keys())
        mine = self.share({s: list(rows[s].kept.values()) for s in both if rows[s].kept}, concept)
        theirs = self.share(
            {s: list(reference[s].kept.values()) for s in both if rows[s].kept}, concept
        )
        if mine is None or theirs is None or theirs.value <= 0:
            return None
        return mine.over(theirs, 0.0)

    # -- attacks -----------------------------------------------------------------------------------

    def joint(
        self, concept: str, arms: Sequence[str], attacks: Sequence[str]
    ) -> dict[str, Estimate] | None:
        """Arm -> share of prompts hit by any of the attacks, on the seeds where all arms have all of them."""
        rows = {
            arm: [self.rows("attack", concept, arm, attack) for attack in attacks] for arm in arms
        }
        seeds = set(self.seeds)
        for found in rows.values():
            for one in found:
                seeds &= one.keys()
        if not seeds or not attacks:
            return None
        made = {}
        for arm, found in rows.items():
            share = self.share({s: [_any([one[s] for one in found])] for s in seeds}, concept)
            if share is None:
                return None
            made[arm] = share
        return made

    def gain(self, concept: str, arm: str, attack: str) -> Estimate | None:
        """Share of prompts that show the concept after an attack and not before."""
        rows = self.rows("attack", concept, arm, attack)
        found = {
            s: [Bits(hits="".join("01"[h and not p] for h, p in zip(r.hit.values(), r.pre.values(), strict=True)),
                     units=r.hit.units)]
            for s, r in rows.items() if r.hit and r.pre
        }  # fmt: skip
        return self.share(found, concept)

    def recovered(self, concept: str, eraser: str, attacks: Sequence[str]) -> Estimate | None:
        """``(erased - never) / (original - never)`` under any of the attacks; ``None`` where it has no scale."""
        found = self.joint(concept, (eraser, "original", "never"), attacks)
        if found is None:
            return None
        e, o, n = (found[arm] for arm in (eraser, "original", "never"))
        if o.value - n.value < MINIMUM_RANGE - 1e-12:
            return None
        # How far original and never could lie from their hits is not carried along: whether an attack works on the
        # one and fails on the other is asked of each attack, see worth.
        way = Estimate(e.value - n.value, e.draws - n.draws, e.n, e.below, e.above)
        return way.over(o.minus(n), SPAN)

    def advantage(
        self, concept: str, eraser: str, attack: str, point: str | None = None
    ) -> Estimate | None:
        """``erased - never`` after an attack, or at a point of its budget."""
        found = {}
        both = (
            self.rows("attack", concept, eraser, attack),
            self.rows("attack", concept, "never", attack),
        )
        seeds = both[0].keys() & both[1].keys()
        for arm, rows in zip(("erased", "never"), both, strict=True):
            bits = {}
            for seed in seeds:
                row = rows[seed]
                if row.hit is None or (point is not None and point not in (row.curve or {})):
                    return None
                own = row.hit if point is None else Bits(hits=row.curve[point], units=row.hit.units)  # type: ignore[index]
                bits[seed] = [own]
            found[arm] = self.share(bits, concept)
        if found["erased"] is None or found["never"] is None:
            return None
        return found["erased"].minus(found["never"])


def _any(rows: Sequence[Row]) -> Bits:
    """Hit by any of several attacks on the same prompts."""
    bits = [row.hit for row in rows if row.hit is not None]
    hits = np.any([one.values() for one in bits], axis=0)
    return Bits(hits="".join("1" if hit else "0" for hit in hits), units=bits[0].units)
