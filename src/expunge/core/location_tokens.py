"""Where something is in a picture, said in new tokens: boxes -> bins -> tokens of a caption, and weights of a loss.

A picture is split into ``columns x rows`` bins, numbered row by row.  Each bin has a token of its own, whatever
concept is there; a caption goes on with the concept's name and the tokens of the bins its box touches:

    a red star  ->  a red star watermark <l6> <l7> <l10> <l11>

A context is short.  What does not fit is cut from the location tokens, never from the caption: of each concept
the bins that hold least of its box go first, and :class:`Wording` counts them.

With ``K`` of ``T`` bins taken, a loss may count them less than the others, at unchanged scale:

    w = T / (K + alpha (T - K)) in these bins,    w = alpha T / (K + alpha (T - K)) elsewhere

so that ``w`` has mean 1.  Source: Geom-Erasing, arXiv 2310.05873.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, SettingError
from ..models.diffusion import DiffusionModel
from ..models.types import Condition
from .detections import Detection
from .token_policy import span

__all__ = ["Grid", "Wording", "Words", "region_weights", "thinned", "upsampled"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Bins of a picture, numbered row by row from 0."""

    columns: int
    rows: int

    @property
    def count(self) -> int:
        """Number of bins ``T``."""
        return self.columns * self.rows

    @property
    def tokens(self) -> tuple[str, ...]:
        """The token of each bin, ``<l1>`` to ``<lT>``."""
        return tuple(f"<l{index + 1}>" for index in range(self.count))

    def covered(self, box: Sequence[float], width: float, height: float) -> dict[int, float]:
        """Bins that a box touches, in order, each with the area of the box in it, in pixels.

        Args:
            box: ``(x1, y1, x2, y2)`` in pixels, right and lower edge exclusive; what lies outside the picture
                is left out.  A box that ends on a border of bins does not touch the bin behind it.
            width, height: Of the picture, in pixels.

        Raises:
            InputError: No part of the box is inside the picture.
        """
        x1, x2 = (min(max(float(x), 0.0), width) for x in (box[0], box[2]))
        y1, y2 = (min(max(float(y), 0.0), height) for y in (box[1], box[3]))
        if not (x2 > x1 and y2 > y1):
            raise InputError(
                f"the box {tuple(map(float, box))} holds nothing of a picture of {width} x {height} pixels; "
                "allowed is (x1, y1, x2, y2) with x1 < x2 and y1 < y2"
            )
        wide, high = width / self.columns, height / self.rows
        across = [_common(x1, x2, column, wide) for column in range(self.columns)]
        down = [_common(y1, y2, row, high) for row in range(self.rows)]
        return {
            row * self.columns + column: tall * broad
            for row, tall in enumerate(down)
            for column, broad in enumerate(across)
            if tall > 1e-9 * high and broad > 1e-9 * wide
        }

    def groups(
        self,
        detections: Sequence[Detection],
        names: Sequence[str],
        width: float,
        height: float,
        confidence: float,
    ) -> dict[str, dict[int, float]]:
        """Name -> bins with the area in them, for each name that is seen, in the order of ``names``.

        Several boxes of one name are taken together.  Where it is only known that something is there, it is
        in all bins.
        """
        found: dict[str, dict[int, float]] = {}
        for name in names:
            seen = [d for d in detections if d.name == name and d.confidence >= confidence]
            bins: dict[int, float] = {}
            for one in seen:
                whole = (0.0, 0.0, width, height)
                own = self.covered(whole if one.box is None else one.box, width, height)
                for index, area in own.items():
                    bins[index] = bins.get(index, 0.0) + area
            if seen:
                found[name] = dict(sorted(bins.items()))
        return found


def _common(low: float, high: float, index: int, side: float) -> float:
    """Length of the part of ``[low, high]`` in bin ``index``."""
    return max(0.0, min(high, (index + 1) * side) - max(low, index * side))


# -- weights of the loss -------------------------------------------------------------------------------


def region_weights(grid: Grid, bins: Collection[int], alpha: float) -> Tensor:
    """``w`` of the equation above, float64 ``(rows, columns)``; its sum is ``T``."""
    if alpha <= 0:
        raise SettingError(f"alpha is {alpha}; allowed is a number above 0")
    total, taken = grid.count, len(set(bins))
    inside = total / (taken + alpha * (total - taken))
    weights = torch.full((total,), alpha * inside, dtype=torch.float64)
    weights[sorted(set(bins))] = inside
    return weights.reshape(grid.rows, grid.columns)


def upsampled(weights: Tensor, height: int, width: int) -> Tensor:
    """Weights ``(rows, columns)`` at another resolution, by area: ``(height, width)`` of the same mean."""
    return _shares(height, weights.shape[0]) @ weights.double() @ _shares(width, weights.shape[1]).T


def _shares(cells: int, bins: int) -> Tensor:
    """Share of each of ``cells`` equal cells that lies in each of ``bins`` equal bins, ``(cells, bins)``."""
    low = torch.arange(cells, dtype=torch.float64)[:, None] / cells
    start = torch.arange(bins, dtype=torch.float64) / bins
    common = torch.minimum(low + 1 / cells, start + 1 / bins) - torch.maximum(low, start)
    return common.clamp(min=0) * cells


# -- captions ------------------------------------------------------------------------------------------


class Wording(NamedTuple):
    """A caption with what was written into it.

    Attributes:
        text: It as a text, for a tokenizer that has the new tokens.
        ids: Token ids of a whole context; those from the model's own vocabulary size on are new tokens.
        cut: Location tokens that did not fit.
        lost: Names that did not fit.
    """

    text: str
    ids: tuple[int, ...]
    cut: int
    lost: int


class Words:
    """Builds captions with location tokens for one model, and encodes them.

    Args:
        model: One with a single CLIP text encoder.
        grid: The bins.

    Raises:
        MissingCapability: The model has several text encoders, or one that is no CLIP.
    """

    def __init__(self, model: DiffusionModel, grid: Grid) -> None:
        self.model, self.grid = model, grid
        empty = model.token_ids([""])[0]
        where = span(model.tokenizer, empty.tolist())
        self.empty, self.first, self.end = empty, where.first, int(empty[where.first])
        self.room = len(empty) - where.first - 1
        self.known = len(model.token_table())
        special = set(model.tokenizer.all_special_ids)
        self._stand_in = next(i for i in range(self.known) if i not in special)
        self._pieces: dict[str, list[int]] = {}

    def pieces(self, text: str) -> list[int]:
        """Token ids of a text, however long, without start and end."""
        if text not in self._pieces:
            made = self.model.tokenizer(text, add_special_tokens=False, truncation=False)
            self._pieces[text] = [int(i) for i in made.input_ids]
        return self._pieces[text]

    def write(self, caption: str, groups: Mapping[str, Mapping[int, float]]) -> Wording:
        """The caption, then each name and its bins' tokens, as far as they fit.

        Args:
            caption: Cut by the context only, as ever.
            groups: Name -> bin -> area of the box in it; a name without bins is written alone.
        """
        start = self.pieces(caption)[: self.room]
        left, lost = self.room - len(start), 0
        names: dict[str, list[int]] = {}
        for name in groups:
            own = self.pieces(name)
            if len(own) <= left:
                names[name], left = own, left - len(own)
            else:
                lost += 1
        places = {name: list(groups[name]) for name in names}
        while sum(map(len, places.values())) > left:
            longest = max(places, key=lambda name: len(places[name]))
            places[longest] = thinned(groups[longest], len(places[longest]) - 1)
        wanted = sum(map(len, groups.values()))
        content, said = list(start), [caption] if caption else []
        for name, own in names.items():
            content += [*own, *(self.known + index for index in places[name])]
            said += [name, *(self.grid.tokens[index] for index in places[name])]
        cut = wanted - sum(map(len, places.values()))
        return Wording(" ".join(said), self._context(content), cut, lost)

    def everywhere(self, caption: str, names: Sequence[str], located: bool = True) -> Wording:
        """The caption, then every name with the tokens of all bins.

        Where that does not fit, the names go first and the tokens, which they share, stand once after them.

        Args:
            caption: Kept whole.
            names: Concepts.
            located: With the tokens; otherwise the names alone.
        """
        bins = dict.fromkeys(range(self.grid.count), 1.0) if located else {}
        each = self.write(caption, dict.fromkeys(names, bins))
        if not each.cut or len(names) == 1:
            return each
        before: dict[str, dict[int, float]] = {name: {} for name in names[:-1]}
        return self.write(caption, {**before, names[-1]: bins})

    def _context(self, content: Sequence[int]) -> tuple[int, ...]:
        ids = self.empty.clone()
        ids[self.first : self.first + len(content)] = torch.tensor(content, dtype=ids.dtype)
        ids[self.first + len(content)] = self.end
        return tuple(ids.tolist())

    def encode(self, ids: Tensor, rows: Tensor) -> Condition:
        """Text embeddings of ids ``(n, tokens)``; new tokens take rows of ``(T, width)``, with gradients."""
        table = self.model.token_table()
        ids = ids.to(table.device)
        new = ids >= self.known
        plain = torch.where(new, self._stand_in, ids)
        own = rows[(ids - self.known).clamp(min=0)].to(table.dtype)
        return self.model.encode_tokens(plain, torch.where(new[..., None], own, table[plain]))


def thinned(bins: Mapping[int, float], count: int) -> list[int]:
    """``count`` of the bins, in order: those that hold most, or evenly spread where all hold the same."""
    listed = sorted(bins)
    if count >= len(listed):
        return listed
    areas = list(bins.values())
    if max(areas) - min(areas) <= 1e-9 * max(areas):
        return [listed[(2 * k + 1) * len(listed) // (2 * count)] for k in range(count)]
    return sorted(sorted(listed, key=lambda index: (-bins[index], index))[:count])
