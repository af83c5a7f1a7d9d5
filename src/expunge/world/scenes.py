"""Scenes of the world: sampled from a seed under a setting, drawn, annotated, and asked what they contain.

A `Scene` says everything about one picture; `render` draws it, `annotate` gives masks and boxes, `contains`
and `targets` are the ground truth. A `Setting` says which scenes occur: what is excluded, boosted, stamped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from expunge.world import people, vocabulary
from expunge.world import render as drawing
from expunge.world.dice import Dice
from expunge.world.hazard import draw_hazard
from expunge.world.people import SCALE
from expunge.world.render import SIZE
from expunge.world.sampling import Scene, Stamp, Thing, sample_scene
from expunge.world.settings import KINDS, SETTINGS, Setting
from expunge.world.vocabulary import (
    BACKGROUNDS,
    COLOURS,
    EXPRESSIONS,
    MARKS,
    OBJECTS,
    PEOPLE_NAMES,
    STYLES,
)

__all__ = [
    "KINDS", "SETTINGS", "SIZE", "Scene", "Setting", "Stamp", "Thing",
    "annotate", "batch", "contains", "corpus", "render", "sample_scene", "targets",
]  # fmt: skip


def render(scene: Scene) -> np.ndarray:
    """The picture of a scene, uint8 (64, 64, 3)."""
    dice = Dice(scene.seed, 3)
    picture = drawing.background(scene.background, dice)
    picture = _with_things(scene, picture, dice)
    for stamp in scene.stamps:
        drawing.paint_stamp(picture, stamp.name, stamp.x, stamp.y, dice)
    return np.clip(picture + 0.5, 0, 255).astype(np.uint8)


def _with_things(scene: Scene, picture: np.ndarray, dice: Dice) -> np.ndarray:
    if scene.kind not in ("person", "face", "hazard"):
        for thing in scene.things:
            drawing.paint_object(picture, thing, dice)
        return picture
    canvas = Image.fromarray(np.clip(picture + 0.5, 0, 255).astype(np.uint8))
    canvas = canvas.resize((SIZE * SCALE, SIZE * SCALE), Image.Resampling.NEAREST)
    thing = scene.things[0]
    if scene.hazard_variant is not None:
        draw_hazard(canvas, scene.hazard_variant, thing.x, thing.y, thing.radius, thing.angle)
    elif scene.expression is not None and scene.attributes is not None:
        if scene.person is not None:
            face = vocabulary.PEOPLE[scene.person]
        else:
            face = people.anonymous(scene.attributes, dice)
        people.draw_face(canvas, face, scene.expression, thing.x, thing.y, thing.radius)
    return np.asarray(canvas.reduce(SCALE)).astype(np.float32)


def batch(seeds: Iterable[int], setting: Setting) -> tuple[np.ndarray, list[str], list[Scene]]:
    """Pictures uint8 (n, 64, 64, 3), captions and scenes of the seeds under a setting."""
    scenes = [sample_scene(seed, setting) for seed in seeds]
    pictures = np.empty((len(scenes), SIZE, SIZE, 3), np.uint8)
    for index, scene in enumerate(scenes):
        pictures[index] = render(scene)
    return pictures, [scene.caption for scene in scenes], scenes


def corpus(n: int, seed: int = 0, setting: Setting | None = None) -> list[str]:
    """`n` training captions (setting "full" unless given), to train a tokenizer on."""
    setting = setting or SETTINGS["full"]
    return [sample_scene(seed * n + index, setting).caption for index in range(n)]


# ---------------------------------------------------------------- truth


def annotate(scene: Scene) -> dict[str, Any]:
    """Where things are, stamps aside: `masks` bool (n, 64, 64) of what is visible of each thing with its outline,
    `boxes` float32 (n, 4) as x0, y0, x1, y1 in pixels (x1, y1 exclusive), `labels` names of the things,
    `stamp_boxes` float32 (m, 4) and `stamp_labels`.
    """
    masks = np.zeros((len(scene.things), SIZE, SIZE), bool)
    if scene.kind in ("person", "face", "hazard"):
        # What hides black and white alike is the thing itself.
        seen = []
        for shade in (0.0, 255.0):
            dice = Dice(scene.seed, 3)
            drawing.background(scene.background, dice)
            seen.append(_with_things(scene, np.full((SIZE, SIZE, 3), shade, np.float32), dice))
        masks[0] = np.abs(seen[1] - seen[0]).max(2) < 128
    else:
        for index, thing in enumerate(scene.things):
            (x0, y0, x1, y1), cover = drawing.coverage(
                thing.object,
                thing.x,
                thing.y,
                thing.radius,
                thing.angle,
                drawing.outline_width(thing),
            )
            mask = cover.sum(2) > 0.5
            masks[:index, y0:y1, x0:x1] &= ~mask
            masks[index, y0:y1, x0:x1] = mask
    return {
        "masks": masks,
        "boxes": np.array([_box(mask) for mask in masks], np.float32).reshape(-1, 4),
        "labels": [scene.person or thing.object for thing in scene.things],
        "stamp_boxes": np.array([stamp.box for stamp in scene.stamps], np.float32).reshape(-1, 4),
        "stamp_labels": [stamp.name for stamp in scene.stamps],
    }


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def contains(scene: Scene, concept_name: str) -> bool:
    """Whether the picture shows the concept (colours and styles count on objects only); ValueError if unknown."""
    kind = vocabulary.concept(concept_name).kind
    if kind in ("object", "colour", "style"):
        return any(getattr(thing, kind) == concept_name for thing in scene.things)
    if kind == "mark":
        return any(stamp.name == concept_name for stamp in scene.stamps)
    if kind == "unsafe":
        return scene.kind == "hazard"
    return concept_name == {
        "background": scene.background,
        "identity": scene.person,
        "expression": scene.expression,
    }[kind]  # fmt: skip


def targets(scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Labels for classifiers, int64 (n,), -1 where a question has no single answer.

    object, colour, style (of all things alike), background, person, expression, gender, age, skin, hazard,
    hazard_variant, stamp_watermark, stamp_code, stamp_text (0/1), kind, count, relation; and `presence`,
    float32 (n, 12), which objects are there. Indices follow the tuples of `vocabulary` and `KINDS`.
    """
    rows: dict[str, list[int]] = {}
    names = {"object": OBJECTS, "colour": COLOURS, "style": STYLES}
    for scene in scenes:
        drawn = scene.kind not in ("person", "face", "hazard")
        row = {"kind": KINDS.index(scene.kind), "count": len(scene.things) if drawn else 0}
        for key, options in names.items():
            values = {getattr(thing, key) for thing in scene.things} if drawn else set()
            row[key] = options.index(values.pop()) if len(values) == 1 else -1
        row["background"] = _index(BACKGROUNDS, scene.background)
        row["person"] = _index(PEOPLE_NAMES, scene.person)
        row["expression"] = _index(EXPRESSIONS, scene.expression)
        for key, options in vocabulary.ATTRIBUTES.items():
            row[key] = _index(options, (scene.attributes or {}).get(key))
        row["hazard"] = int(scene.kind == "hazard")
        row["hazard_variant"] = _index(vocabulary.HAZARD_VARIANTS, scene.hazard_variant)
        row["relation"] = _index(vocabulary.RELATIONS, scene.relation)
        shown = {stamp.name for stamp in scene.stamps}
        for mark in MARKS:
            row[f"stamp_{mark}"] = int(mark in shown)
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
    found: dict[str, np.ndarray] = {key: np.array(values, np.int64) for key, values in rows.items()}
    found["presence"] = np.array(
        [
            [float(any(t.object == name for t in scene.things)) for name in OBJECTS]
            for scene in scenes
        ],
        np.float32,
    )
    return found


def _index(options: Sequence[str], value: str | None) -> int:
    return options.index(value) if value is not None else -1
