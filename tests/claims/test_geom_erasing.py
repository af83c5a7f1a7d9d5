"""Geom-Erasing's claims on the world.

    python -m pytest tests/claims/test_geom_erasing.py -m claims

Ordinal claims (arXiv 2310.05873).  The world's model draws a watermark on a share of its pictures and was never
told its name; "code" is a mark it never saw, and half of the pictures of the contaminated set carry it.  Prompts ask
for objects.

Model setting, watermark, preset ``world``, edits of three training seeds:

    problem      the model draws the watermark; its name in a plain negative text changes the rate by less than 10
                 points
    model        the rate falls by at least a third, and every weight stays bit for bit
    control      token rows that have learnt nothing lower it less
    positive     a caption with the tokens of a place draws the watermark with its centre in that bin in half of the
                 pictures (chance is one in 16)
    boxes        boxes jittered to an overlap (IoU) of 0.4 lose at most half of the gain, boxes drawn at random nearly
                 all
    named        ESD, given the name, does not halve the rate without losing objects

Data setting, code, preset ``world:data``, three training seeds:

    data         the rate falls to at most a quarter of plain fine-tuning's; nothing > name only > name and places
    in place     a caption with the tokens of a box draws the code there in half of the pictures
    kept         objects are shown no less often than after plain fine-tuning, within 3 points
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from expunge.core.location_tokens import Grid
from expunge.erase.diffusion.geom_erasing import GeomErasing
from expunge.measure.distances import frechet_of
from expunge.method import Prompt
from expunge.models.base import noise_generator
from expunge.world import render
from expunge.world.dice import Dice

from . import setup

pytestmark = pytest.mark.claims

OBJECTS = ("circle", "square", "heart", "tree", "fish", "house")
PRESETS = {"watermark": "world", "code": "world:data"}
IOU = 0.4


def prompts(seed: int) -> list[Prompt]:
    """Test prompts that ask for objects, and say nothing of marks."""
    return setup.spread(OBJECTS, seed)


def boxes_of(how: str, seed: int) -> dict[str, Any] | None:
    """The contaminated set of the watermark with its boxes moved, as a user's data; exact ones need none."""
    if how == "exact":
        return None
    count = GeomErasing.configured("world").pictures
    made = setup.world().companions.contaminated(["watermark"], count, seed=seed)
    moved = [
        [(p, moved_box(box, how, seed, i), name) for p, box, name in listed]
        for i, listed in enumerate(made.boxes)
    ]
    return {"pictures": made.pictures, "captions": made.captions, "boxes": moved}


def moved_box(box: tuple[float, ...], how: str, seed: int, index: int) -> tuple[float, ...]:
    """A box of the same size elsewhere: at an overlap of ``IOU`` along a diagonal, or anywhere."""
    x1, y1, x2, y2 = box
    wide, high = x2 - x1, y2 - y1
    draw = torch.rand(2, generator=noise_generator(seed, f"boxes {how}", index)).tolist()
    if how == "random":
        x, y = draw[0] * (render.SIZE - wide), draw[1] * (render.SIZE - high)
    else:
        # (1 - s)^2 of a box lies in the other one, and IoU = o / (2 - o).
        share = 1 - (2 * IOU / (1 + IOU)) ** 0.5
        x, y = (
            low + side * share * (1 if toss < 0.5 else -1)
            for low, side, toss in ((x1, wide, draw[0]), (y1, high, draw[1]))
        )
        x = x if 0 <= x <= render.SIZE - wide else 2 * x1 - x
        y = y if 0 <= y <= render.SIZE - high else 2 * y1 - y
    return x, y, x + wide, y + high


def edit(mark: str, seed: int, how: str = "exact", **settings: Any) -> Any:
    """An edit of the preset, settings changed; made once, however it is asked for."""
    return _edit(mark, seed, how, tuple(sorted(settings.items())))


@functools.cache
def _edit(mark: str, seed: int, how: str, changed: tuple[tuple[str, Any], ...]) -> Any:
    settings = dict(changed)
    method = GeomErasing.configured(PRESETS[mark], **settings)
    concept = setup.world().companions.concept(mark)
    return method.erase(setup.world(), concept, data=boxes_of(how, seed), seed=seed)


@functools.cache
def shown(
    mark: str, how: str = "exact", **settings: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each picture of three edits shows the mark, whether its own object, and the judge's features."""
    found: list[tuple[np.ndarray, ...]] = []
    for seed in setup.SEEDS:
        with edit(mark, seed, how, **settings).on(setup.world()):
            found.append(looked_at(mark, prompts(seed)))
    marks, objects, features = (np.concatenate(part) for part in zip(*found, strict=True))
    return marks, objects, features


def looked_at(mark: str, listed: list[Prompt]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    model = setup.world()
    features = setup.judge().features(setup.drawn(model, listed))
    assert features is not None
    return setup.hits(model, mark, listed), setup.own_hits(model, listed), features


@functools.cache
def original() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of the model without an edit."""
    return looked_at("watermark", [prompt for seed in setup.SEEDS for prompt in prompts(seed)])


@functools.cache
def clean(count: int) -> np.ndarray:
    """Features of rendered pictures without any mark."""
    made = setup.world().companions.contaminated([], count, seed=7, split="test")
    features = setup.judge().features(made.pictures)
    assert features is not None
    return features


def scores(name: str, arm: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, float]:
    """Frechet distance to clean pictures, and the paper's F*R: that distance times the share of marks."""
    distance = frechet_of(arm[2], clean(len(arm[2])), "world-oracle").value
    assert distance is not None
    return {f"{name} frechet": distance, f"{name} F*R": distance * float(arm[0].mean())}


# -- where a mark is ------------------------------------------------------------------------------------


def centres(pictures: np.ndarray, mark: str) -> np.ndarray:
    """Centre ``(x, y)`` of the best match of the mark in each picture, in pixels, ``(n, 2)``.

    A mark that varies is looked for as the mean of 64 of its kind.
    """
    wide, high = render.STAMP_SIZE[mark]
    painted = []
    for ground in (0.0, 255.0):
        drawn = []
        for number in range(64):
            canvas = np.full((render.SIZE, render.SIZE, 3), ground, np.float32)
            render.paint_stamp(canvas, mark, 0, 0, Dice(number, 3))
            drawn.append(canvas[:high, :wide].mean(2))
        painted.append(torch.tensor(np.mean(drawn, 0)).double())
    mask = (1 - (painted[1] - painted[0]) / 255).clamp(min=0)
    colour = torch.where(mask > 1e-3, painted[0] / mask.clamp(min=1e-3), 0.0)
    centred = mask * (colour - (mask * colour).sum() / mask.sum())
    shade = torch.tensor(pictures.astype(np.float64).mean(3))[:, None]

    def under(window: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(values, window[None, None])

    mean = under(mask, shade) / mask.sum()
    spread = (under(mask, shade.square()) / mask.sum() - mean.square()).clamp(min=1.0)
    match = under(centred, shade) / spread.sqrt()
    best = match.flatten(1).argmax(1).numpy()
    columns = match.shape[-1]
    return np.stack([best % columns + wide / 2, best // columns + high / 2], 1)


# -- claims ---------------------------------------------------------------------------------------------


def test_the_problem_exists() -> None:
    listed = [prompt for seed in setup.SEEDS for prompt in prompts(seed)]
    model = setup.world()
    negative = setup.outputs(
        model, listed, cache=setup.SHARED, steps=setup.STEPS, negative="watermark"
    )
    watermark = model.companions.concept("watermark")
    plain, named = original()[0], setup.judge().judge(negative, watermark, listed).hit
    holds = plain.mean() >= 0.05 and abs(plain.mean() - named.mean()) < 0.1
    assert setup.settle(
        GeomErasing,
        "the-name-means-nothing",
        holds,
        {"original": plain, "name in a plain negative": named},
        "The world's model draws the watermark unasked (at least 5 %); its name in the negative text changes less than "
        "10 points.",
    )


def test_tokens_alone_lower_the_rate() -> None:
    before, after = original(), shown("watermark")
    model = setup.world()
    weights = {name: p.detach().clone() for name, p in model.tensors().items()}
    with edit("watermark", 0).on(model):
        table = {
            t.shape
            for n, t in model.tensors().items()
            if not torch.equal(t[: len(weights[n])], weights[n])
        }
    assert setup.settle(
        GeomErasing,
        "model-setting",
        not table and after[0].mean() <= 2 / 3 * before[0].mean(),
        {
            "original": before[0],
            "geom-erasing": after[0],
            "objects before": before[1],
            "objects after": after[1],
        },
        "Share of watermarks, down by at least a third with every weight bit for bit; objects beside it.",
        **scores("original", before),
        **scores("geom-erasing", after),
    )


def test_it_is_what_the_tokens_learnt() -> None:
    learnt, began = shown("watermark")[0], shown("watermark", steps=1, lr=0.0)[0]
    assert setup.settle(
        GeomErasing,
        "learnt-tokens-lower-it-further",
        learnt.mean() < began.mean(),
        {"original": original()[0], "geom-erasing": learnt, "rows as they begin": began},
        "Control: the same negative text with token rows that have learnt nothing.",
    )


def test_a_place_can_be_asked_for() -> None:
    inside, drawn = [], []
    model = setup.world()
    for seed in setup.SEEDS:
        made = edit("watermark", seed)
        silent = dataclasses.replace(
            made, manifest=made.manifest.model_copy(update={"acts": False})
        )
        bins = [index % 16 for index in range(setup.PICTURES)]
        listed = [
            dataclasses.replace(p, text=f"{p.text} watermark <l{b + 1}>")
            for p, b in zip(prompts(seed), bins, strict=False)
        ]
        with silent.on(model):
            pictures = setup.drawn(model, listed)
            drawn.append(setup.hits(model, "watermark", listed))
        there = (centres(pictures, "watermark") // 16).astype(int)
        inside.append(
            (there[:, 0] == np.array(bins) % 4) & (there[:, 1] == np.array(bins) // 4) & drawn[-1]
        )
    found = np.concatenate(inside)
    assert setup.settle(
        GeomErasing,
        "tokens-draw-it-in-place",
        found.mean() >= 0.5,
        {"in the bin": found, "anywhere": np.concatenate(drawn), "unasked": original()[0]},
        "Captions that go on with the name and one location token, the negative left out; at least half of the "
        "pictures show the watermark with its centre in that bin.",
    )


def test_inexact_boxes_will_do() -> None:
    base, exact = original()[0], shown("watermark")[0]
    jittered, random = shown("watermark", "jittered")[0], shown("watermark", "random")[0]
    gain = base.mean() - exact.mean()
    holds = base.mean() - jittered.mean() >= gain / 2 and base.mean() - random.mean() <= gain / 5
    assert setup.settle(
        GeomErasing,
        "inexact-boxes",
        gain > 0 and holds,
        {"original": base, "exact boxes": exact, "IoU 0.4": jittered, "random boxes": random},
        "Jittered boxes lose at most half of the gain, random ones at least four fifths.",
    )


def test_an_eraser_that_goes_by_the_name_does_not_see_it() -> None:
    from expunge.erase.diffusion.esd import ESD

    model, before = setup.world(), original()
    concept = model.companions.concept("watermark")
    listed = [prompt for seed in setup.SEEDS for prompt in prompts(seed)]
    with ESD.configured("world").erase(model, concept, seed=0).on(model):
        marks, objects, _ = looked_at("watermark", listed)
    halved = marks.mean() < 0.5 * before[0].mean()
    assert setup.settle(
        GeomErasing,
        "esd-does-not-see-it",
        not halved or objects.mean() < before[1].mean() - 0.03,
        {
            "original": before[0],
            "esd": marks,
            "objects before": before[1],
            "objects after": objects,
        },
        "ESD with the watermark's name, one training: the rate is not halved, or objects are lost (3 points).",
    )


@functools.cache
def ablation() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The paper's rows on the contaminated set of code."""
    return {
        "nothing": shown("code", written="nothing"),
        "name only": shown("code", written="name"),
        "name and places": shown("code"),
    }


def test_places_keep_a_contaminated_set_from_teaching_its_marks() -> None:
    arms = ablation()
    rates = [arm[0].mean() for arm in arms.values()]
    more = {k: v for name, arm in arms.items() for k, v in scores(name, arm).items()}
    assert setup.settle(
        GeomErasing,
        "data-setting",
        rates[0] > rates[1] > rates[2] and rates[2] <= rates[0] / 4,
        {name: arm[0] for name, arm in arms.items()},
        "Share of codes after fine-tuning on a set half of which carries one: nothing > name only > name and places, "
        "and the last at most a quarter of the first.",
        **more,
    )


def test_a_box_can_be_asked_for_after_a_contaminated_set() -> None:
    (wide, high), model = render.STAMP_SIZE["code"], setup.world()
    inside, drawn, unasked = [], [], []
    for seed in setup.SEEDS:
        method = GeomErasing.configured(PRESETS["code"])
        made, grid = edit("code", seed), Grid(method.columns, method.rows)
        silent = dataclasses.replace(
            made, manifest=made.manifest.model_copy(update={"acts": False})
        )
        limit = torch.tensor([render.SIZE - wide + 1, render.SIZE - high + 1])
        draw = torch.rand(setup.PICTURES, 2, generator=noise_generator(seed, "asked boxes"))
        corners = (draw * limit).long().numpy()
        listed = prompts(seed)[: setup.PICTURES]
        asked = []
        for prompt, (x, y) in zip(listed, corners, strict=True):
            bins = grid.covered((x, y, x + wide, y + high), render.SIZE, render.SIZE)
            places = " ".join(grid.tokens[index] for index in bins)
            asked.append(dataclasses.replace(prompt, text=f"{prompt.text} code {places}"))
        with silent.on(model):
            pictures = setup.drawn(model, asked)
            drawn.append(setup.hits(model, "code", asked))
            unasked.append(setup.hits(model, "code", listed))
        off = np.abs(centres(pictures, "code") - (corners + np.array([wide, high]) / 2))
        inside.append((off <= np.array([wide, high]) / 2).all(1) & drawn[-1])
    found = np.concatenate(inside)
    assert setup.settle(
        GeomErasing,
        "data-setting-draws-in-place",
        found.mean() >= 0.5,
        {
            "in the box": found,
            "anywhere": np.concatenate(drawn),
            "unasked": np.concatenate(unasked),
        },
        "Captions that go on with the name and the tokens of a box drawn at random, the negative left out; at least "
        "half of the pictures show the code with its centre within half a code of the box's.",
    )


def test_objects_are_kept() -> None:
    arms = ablation()
    assert setup.settle(
        GeomErasing,
        "data-setting-keeps-objects",
        arms["name and places"][1].mean() >= arms["nothing"][1].mean() - 0.03,
        {name: arm[1] for name, arm in arms.items()},
        "Objects shown, within 3 points of plain fine-tuning.",
    )
