"""The world's own UnlearnCanvas: every object in every style, drawn by a model of the world and read by its oracle.

The protocol is that of :mod:`expunge.measure.unlearncanvas`.  `plain` takes the place of the photographs: it is what
a picture looks like without a style, and is left out of the IRA of styles.  Reference concepts other than the
forgotten one are not in the grid, because the never model lacks them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..concept import Concept
from ..errors import InputError, nearest
from ..measure.unlearncanvas import Cell, Rates, canvas, rates
from ..method import Judge, Prompt
from . import vocabulary
from .judge import OracleJudge, entry_name

__all__ = ["world_canvas", "world_grid"]

TEMPLATE = "a {style} {object}"
SEEDS = (188, 288, 588, 688, 888)


def world_grid(
    forgotten: str,
    styles: Sequence[str] | None = None,
    objects: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    split: str = "test",
) -> tuple[str, list[tuple[Cell, Prompt]]]:
    """The kind of ``forgotten``, and the grid with its prompts; each prompt's concept is the forgotten one.

    Args:
        forgotten: A style or an object of the world.
        styles, objects: Which; default: all but other reference concepts.
        seeds: Pictures of each cell, as in the published protocol.
        split: ``development`` or ``test``: the range that the seeds of the noise come from.

    Raises:
        InputError: ``forgotten`` is neither, or a name is not known.
    """
    name = entry_name(Concept(forgotten))
    entry = vocabulary.concept(name)
    if entry.kind not in ("style", "object"):
        raise InputError(
            f"{forgotten!r} is of the kind {entry.kind}; the grid is of styles and objects"
        )
    banned = set(vocabulary.REFERENCE) - {name}
    chosen = []
    for given, known in ((styles, vocabulary.STYLES), (objects, vocabulary.OBJECTS)):
        for one in given or ():
            if one not in known:
                raise InputError(f"the world's grid has no {one!r}{nearest(one, known)}")
        chosen.append([one for one in (given or known) if given or one not in banned])
    ranges = {"development": vocabulary.DEVELOPMENT_SEEDS, "test": vocabulary.TEST_SEEDS}
    if split not in ranges:
        raise InputError(f"a split is 'development' or 'test', not {split!r}")
    start = ranges[split].start
    cells = []
    for seed in seeds:
        for s, style in enumerate(chosen[0]):
            for o, thing in enumerate(chosen[1]):
                text = TEMPLATE.format(style=style, object=thing)
                noise = start + seed * 10_007 + s * len(vocabulary.OBJECTS) + o
                labels = {"style": style, "object": thing}
                cells.append((Cell(style, thing, seed), Prompt(text, noise, name, labels)))
    return entry.kind, cells


def world_canvas(
    model: Any,
    forgotten: str,
    *,
    styles: Sequence[str] | None = None,
    objects: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    split: str = "test",
    judge: Judge | None = None,
    cross_with_forgotten: bool = False,
    **options: Any,
) -> Rates:
    """UA, IRA and CRA of a model of the world that has forgotten a style or an object.

    Args:
        model: The model, with its edits on.
        forgotten, styles, objects, seeds, split: As for :func:`world_grid`.
        judge: Default: the oracle.
        cross_with_forgotten: As for :func:`expunge.measure.unlearncanvas.rates`.
        options: Batch, cache and options of ``model.generate``.
    """
    kind, cells = world_grid(forgotten, styles, objects, seeds, split)
    eye = judge if judge is not None else OracleJudge()
    seen = canvas(model, cells, eye, **options)
    name = entry_name(Concept(forgotten))  # it may be called by a listed phrase
    return rates(
        seen,
        name,
        kind,
        cross_with_forgotten=cross_with_forgotten,
        photo="plain",
        judge=eye.protocol,
    )
