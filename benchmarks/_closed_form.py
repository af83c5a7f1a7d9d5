"""What ``closed_form.py`` measures: matrices and texts of SD 1.5's sizes, and UCE and RECE in three forms each."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import torch

from expunge import Concept
from expunge.core.closed_form import Moments, Solution
from expunge.core.factors import thin_factors
from expunge.core.projections import Projections
from expunge.core.token_policy import Pair
from expunge.erase.diffusion.rece import RECE
from expunge.models.types import Segment, TextInput
from expunge.testing.bench import timed

CHUNK = 32
ERASE_SCALE, KEEP_SCALE, RIDGE = 1.0, 1.0, 0.5


def relative(found: torch.Tensor, wanted: torch.Tensor, old: torch.Tensor) -> float:
    """Distance of two edits of one matrix, relative to the change."""
    return float((found - wanted).double().norm() / (wanted - old).double().norm())


@dataclasses.dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
        width: Of the text embeddings.
        heights: Of the layers' matrices, keys and values alike.
        rows: Of a text.
        erased, kept: Phrases of UCE's solve.
        texts: Numbers of texts that RECE erases.
        growth: Numbers of erased phrases.
        prompts: Numbers of pairs and kept texts whose peak of memory is measured.
    """

    width: int
    heights: tuple[int, ...]
    rows: int
    erased: int
    kept: int
    texts: tuple[int, ...]
    growth: tuple[int, ...]
    prompts: tuple[int, ...]


FULL = Size(
    768, (320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320), 77, 100, 1000,
    (1, 10), (1, 10, 100, 1000, 10_000), (300, 3000, 10_000),
)  # fmt: skip
QUICK = Size(64, (32, 64, 48), 12, 10, 40, (1, 2), (1, 10, 50), (40, 120))


def matrices(size: Size) -> list[torch.Tensor]:
    """Random keys and values of all layers, (out, width) float32; 77 MB in full."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(h, size.width, generator=generator) / size.width**0.5
        for h in size.heights
        for _ in range(2)
    ]


def embeddings(size: Size, n: int, seed: int) -> torch.Tensor:
    """Embedding rows as an encoder gives them, (n, width) float32.

    All share a common mean, as text embeddings do; a norm of about 28 a row is that of CLIP.
    """
    mean = torch.randn(size.width, generator=torch.Generator().manual_seed(99))
    return 0.7 * mean + 0.7 * torch.randn(
        n, size.width, generator=torch.Generator().manual_seed(seed)
    )


def phrases(size: Size, count: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Rows of phrases, some phrases at a time: (n * rows, width)."""
    for start in range(0, count, CHUNK):
        yield embeddings(size, min(CHUNK, count - start) * rows, 1000 * seed + start)


def moments_of(size: Size, erased: int, kept: int, rows: int) -> Moments:
    """Streamed moments."""
    moments = Moments(size.width)
    sources, targets = phrases(size, erased, rows, 1), phrases(size, erased, rows, 2)
    for c, g in zip(sources, targets, strict=True):
        moments.erase(c, g, ERASE_SCALE)
    for p in phrases(size, kept, rows, 3):
        moments.keep(p, KEEP_SCALE)
    return moments


def applied(weights: Sequence[torch.Tensor], solution: Solution) -> list[torch.Tensor]:
    """Every matrix edited, by thin factors."""
    left, right, _ = thin_factors(solution.change, solution.rank_bound)
    left, right = left.float(), right.float()
    return [torch.addmm(w, w @ left, right) for w in weights]


def ours(
    size: Size, weights: Sequence[torch.Tensor], erased: int, kept: int, rows: int = 1
) -> list[torch.Tensor]:
    """The edited matrices by the library's solver."""
    return applied(weights, moments_of(size, erased, kept, rows).solve(RIDGE))


Block = tuple[torch.Tensor, torch.Tensor, float]
"""Sources and targets (n, width), and their weight; kept rows are their own targets."""


def looped(
    weights: Sequence[torch.Tensor], chosen: int, blocks: Sequence[Block], ridge: float
) -> torch.Tensor:
    """One matrix by the published procedure: values of all matrices for every block, and an inverse.

    The products of a block's rows are made one by one and then summed, as there.
    """
    left = ridge * weights[chosen]
    right = ridge * torch.eye(weights[0].shape[1])
    for sources, targets, scale in blocks:
        values = [targets @ w.T for w in weights]
        left = left + scale * (values[chosen][:, :, None] @ sources[:, None, :]).sum(0)
        right = right + scale * (sources[:, :, None] @ sources[:, None, :]).sum(0)
    return left @ torch.inverse(right)


def vectorised(
    weights: Sequence[torch.Tensor], blocks: Sequence[Block], ridge: float
) -> list[torch.Tensor]:
    """All matrices, each with its own values, system and inverse; all rows in one product."""
    sources = torch.cat([block[0] for block in blocks])
    targets = torch.cat([block[1] for block in blocks])
    scales = torch.cat([torch.full((len(b[0]), 1), b[2]) for b in blocks])
    edited = []
    for w in weights:
        weighted = scales * sources
        left = ridge * w + (w @ targets.T) @ weighted
        right = ridge * torch.eye(w.shape[1]) + sources.T @ weighted
        edited.append(left @ torch.inverse(right))
    return edited


def uce_blocks(size: Size) -> list[Block]:
    """Erased and kept phrases, one row and one block each."""
    erased, guides, kept = (
        torch.cat(list(phrases(size, n, 1, s)))
        for n, s in ((size.erased, 1), (size.erased, 2), (size.kept, 3))
    )
    blocks = [(c[None], g[None], ERASE_SCALE) for c, g in zip(erased, guides, strict=True)]
    return blocks + [(p[None], p[None], KEEP_SCALE) for p in kept]


# -- texts and RECE --------------------------------------------------------------------------------


class Texts:
    """A stand-in for a text encoder: fixed random rows for every text, made when they are asked for."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.words = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=1)

    def rows(self, text: str) -> torch.Tensor:
        """(rows, width), from the text alone."""
        return embeddings(self.size, self.size.rows, zlib.crc32(text.strip().encode()))

    def __call__(self, texts: Sequence[str]) -> list[Segment]:
        ids = torch.ones(len(texts), self.size.rows, dtype=torch.long)
        ids[:, 0] = 0
        for row, text in zip(ids, texts, strict=True):
            row[1 : 1 + len(text.split())] = 2
        return [Segment(self.words, ids, torch.stack([self.rows(text) for text in texts]))]


def projections(size: Size, weights: Sequence[torch.Tensor]) -> Projections:
    """The matrices as a model would hand them over."""
    tensors = {f"layer{i}": w for i, w in enumerate(weights)}
    model = SimpleNamespace(tensors=lambda: tensors, edits=SimpleNamespace(originals={}))
    return Projections(model, TextInput(tuple(tensors), size.width, Texts(size)))


def rece_texts(count: int) -> tuple[list[Concept], list[Pair], list[str]]:
    """What is erased and kept."""
    concepts = [Concept(f"concept number{i}", anchor="something") for i in range(count)]
    return concepts, [Pair(c.name, "something", c.name) for c in concepts], ["another thing"]


METHOD = RECE(epochs=3, derive_ridge=0.1)


def rece_ours(size: Size, weights: Sequence[torch.Tensor], count: int) -> list[torch.Tensor]:
    """Whole RECE by the eraser's own code."""
    solutions, _ = METHOD.solutions(projections(size, weights), *rece_texts(count))
    return applied(weights, solutions[-1])


def rece_published(
    size: Size,
    weights: list[torch.Tensor],
    count: int,
    solve: Callable[[list[torch.Tensor], Sequence[Block], float], list[torch.Tensor]],
) -> list[torch.Tensor]:
    """Whole RECE with the derivation summed over all layers in every epoch, and a solver of one's own."""
    rows = Texts(size).rows
    concepts, _, kept = rece_texts(count)
    # The names are as long as one another's, and one word longer than the guide.
    i, k, held = 2, 1, [rows(text) for text in ("", *kept)]
    weight = max(0.1, round(1 / len(held), 3))
    blocks = [(rows(c.name)[i:], rows("something")[k : size.rows - (i - k)], 1.0) for c in concepts]
    current = solve(weights, blocks + [(p, p, weight) for p in held], METHOD.ridge)
    for _ in range(METHOD.epochs):
        gram = sum(w.T @ w for w in current)
        cross = sum(w.T @ o for w, o in zip(current, weights, strict=True))
        derive = torch.inverse(METHOD.derive_ridge * torch.eye(size.width) + gram) @ cross
        blocks = [(rows(c.name) @ derive.T, rows("something"), 1.0) for c in concepts]
        blocks += [(p, p, METHOD.epoch_preserve_scale) for p in held]
        current = solve(current, blocks, METHOD.epoch_ridge)
    return current


class OneMatrix:
    """A solver that times one matrix of the published loop and makes all by the vectorised form."""

    def __init__(self, chosen: int) -> None:
        self.chosen, self.seconds, self.rest = chosen, 0.0, 0.0
        self.off = 0.0

    def __call__(
        self, weights: list[torch.Tensor], blocks: Sequence[Block], ridge: float
    ) -> list[torch.Tensor]:
        seconds, one = timed(lambda: looped(weights, self.chosen, blocks, ridge))
        self.seconds += seconds
        rest, edited = timed(lambda: vectorised(weights, blocks, ridge))
        self.rest += rest
        self.off = max(self.off, relative(one, edited[self.chosen], weights[self.chosen]))
        return edited
