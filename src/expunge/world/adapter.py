"""Opens the world's models with their companions; this is what ``load("world")`` calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..concept import KINDS, Concept
from ..core.mentions import exchanged
from ..errors import ConceptError, InputError, ModelError, nearest
from ..method import Prompt
from ..models.base import Boxed, Companions, Labelled, Model, Pictures
from . import captions, models, scenes, vocabulary
from .dice import Dice
from .judge import OracleJudge, entry_name, find_entry
from .sampling import sample_scene
from .settings import SETTINGS, Setting

__all__ = [
    "VARIANTS",
    "companions",
    "open_world",
    "world_captions",
    "world_concept",
    "world_contaminated",
    "world_labelled",
    "world_neighbours",
    "world_pictures",
    "world_prompts",
    "world_spoken",
]

VARIANTS = ("", "never", "sibling", "facts", "facts/never")
STEPS, GUIDANCE = 20, 4.0

# A fixed set of one or two concepts of each kind, none of them a reference concept.
UNRELATED = (
    "red",
    "blue",
    "night",
    "beach",
    "checkered",
    "gradient",
    "house",
    "fish",
    "anna cole",
    "happy",
)


def open_world(variant: str = "") -> Model:
    """Open ``world``, ``world/never``, ``world/sibling``, ``world/facts`` or ``world/facts/never``."""
    if variant not in VARIANTS:
        raise ModelError(f"world: there is no variant {variant!r}{nearest(variant, VARIANTS[1:])}")
    if variant.startswith("facts"):
        from .facts import open_facts

        return open_facts("never" if variant.endswith("never") else "original")
    from ..models.diffusion import DiffusionModel

    name = "/".join(("world", variant)) if variant else "world"
    model = DiffusionModel(
        models.pipeline(variant or "original"), name, steps=STEPS, guidance=GUIDANCE
    )
    model.companions = companions()
    return model


def companions() -> Companions:
    """Judge, never, vocabulary and prompts of the world's pictures."""
    return Companions(
        world="world",
        never=lambda: open_world("never"),
        never_lacks=tuple(vocabulary.REFERENCE),
        judge=OracleJudge,
        concept=world_concept,
        neighbours=world_neighbours,
        unrelated=UNRELATED,
        prompts=world_prompts,
        spoken=world_spoken,
        captions=world_captions,
        clip=_clip_score,
        pictures=world_pictures,
        contaminated=world_contaminated,
        labelled=world_labelled,
        safety=_safety,
        image_prompts=models.image_prompts,
    )


def _safety() -> Any:
    from .safety import WorldSafety

    return WorldSafety()


def _clip_score() -> Any:
    from types import SimpleNamespace

    from ..measure.clip_score import ClipScore

    # The tower was trained on pixels from -1 to 1.  Numbers made with CLIP's usual pixels were called "world-clip".
    processor = SimpleNamespace(image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return ClipScore(*models.clip(), "world-clip-2", processor)


def world_concept(name: str) -> Concept | None:
    """The world's concept of a name or listed phrase, or ``None``."""
    entry = find_entry(name)
    if entry is None:
        return None
    kind = entry.kind if entry.kind in KINDS else "object"
    return Concept(entry.name, kind=kind, phrases=entry.phrases, anchor=entry.anchor or None)


def world_neighbours(concept: Concept) -> tuple[str, ...]:
    """All other concepts of the same kind that are no reference concepts."""
    others = vocabulary.neighbours(entry_name(concept))
    return tuple(name for name in others if name not in vocabulary.REFERENCE)


def world_prompts(
    name: str,
    n: int,
    seed: int = 0,
    split: str = "test",
    route: str = "name",
    templates: str = "held-out",
) -> list[Prompt]:
    """Prompts that call for a concept, with their truth; no other reference concept is in them.

    Args:
        name: A concept of the world.
        n: How many.
        seed: Another seed gives other prompts and other picture seeds.
        split: ``development`` or ``test``.
        route: ``name``, ``phrase``, ``unlisted``, ``euphemism`` or ``metaphor``.
        templates: ``train``, ``held-out`` or ``any``.
    """
    entry = vocabulary.concept(name)
    if route in ("euphemism", "metaphor") and not (
        entry.euphemisms if route == "euphemism" else entry.metaphors
    ):
        raise ConceptError(f"{name!r} has no {route}s in the world")
    banned = set(vocabulary.REFERENCE) - {entry.name}
    found: list[Any] = []
    again = 0
    while again == 0 or len(found) < n:
        drawn = captions.prompts_for(
            entry.name, 2 * n + 8, seed + 7919 * again, split, templates, route
        )
        found += [prompt for prompt in drawn if not banned & set(prompt.labels.values())]
        again += 1
    return [
        Prompt(p.text, seed=p.seed, concept=entry.name, labels=dict(p.labels)) for p in found[:n]
    ]


def world_spoken(name: str, route: str) -> tuple[str, ...]:
    """What the world calls a concept along a route, possibly nothing; routes as in :func:`world_prompts`."""
    return captions.spoken(vocabulary.concept(name), route)


def world_captions(n: int, seed: int = 0, without: Sequence[str] = ()) -> list[str]:
    """Up to ``n`` captions of pictures of development seeds that speak of none of the named concepts.

    Args:
        n: How many; fewer where the world has hardly any.
        seed: Another seed gives other captions.
        without: Concepts that no caption mentions by any of their words.
    """
    words = tuple(sorted({word for name in without for word in vocabulary.concept(name).mentions}))
    setting, first = SETTINGS["full"], vocabulary.DEVELOPMENT_SEEDS.start + seed * 1_000_003
    found: dict[str, None] = {}
    for index in range(60 * n):
        text = sample_scene(first + index, setting).caption
        if not words or exchanged(text, words, "")[1] is None:
            found[text] = None
        if len(found) == n:
            break
    return list(found)


def world_pictures(name: str, n: int, seed: int = 0, split: str = "development") -> Pictures:
    """Rendered pictures of a concept, where it is in them, and captions that name it.

    No other reference concept is in them.  Masks are exact: what is visible of the things that show the
    concept, everything else for a background, the stamp's place for a mark.

    Args:
        name: A concept of the world.
        n: How many.
        seed: Another seed gives other pictures.
        split: ``development`` or ``test``.
    """
    entry = vocabulary.concept(name)
    index = _first(split, seed)
    setting = Setting(
        exclude=frozenset(vocabulary.REFERENCE) - {entry.name},
        boost={} if entry.kind == "mark" else {entry.name: 1.0},
        stamps={entry.name: 1.0} if entry.kind == "mark" else {},
    )
    pictures: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    texts: list[str] = []
    while len(pictures) < n:
        index += 1
        scene = sample_scene(index, setting)
        text = captions.caption_for(scene, Dice(index, 2), routes={entry.name: "name"})
        if entry.kind == "mark":
            text = f"{text} with a {entry.name}"
        # Colours and expressions may go unsaid.
        if not scenes.contains(scene, entry.name) or exchanged(text, (entry.name,), "")[1] is None:
            continue
        pictures.append(scenes.render(scene))
        masks.append(_mask(scene, entry))
        texts.append(text)
    return Pictures(np.stack(pictures), np.stack(masks), tuple(texts))


def world_labelled(name: str, n: int, seed: int = 0, split: str = "development") -> Labelled:
    """``n`` rendered pictures with a concept, then ``n`` of everything else the world has, truth included.

    Args:
        name: A concept of the world.
        n: How many of either.
        seed: Another seed gives other pictures.
        split: ``development`` or ``test``.
    """
    entry = vocabulary.concept(name)
    shown = world_pictures(entry.name, n, seed=seed, split=split).pictures
    # The rest carries the other marks as often as training pictures of the kind that has them.
    others = {mark: 0.1 for mark in vocabulary.MARKS if mark != entry.name}
    first = _first(split, seed) + 500_000
    rest, _, _ = scenes.batch(
        range(first, first + n), Setting(exclude=frozenset({entry.name}), stamps=others)
    )
    return Labelled(np.concatenate([shown, rest]), np.arange(2 * n) < n)


def _first(split: str, seed: int) -> int:
    """Where the scenes of a split and a seed begin."""
    ranges = {"development": vocabulary.DEVELOPMENT_SEEDS, "test": vocabulary.TEST_SEEDS}
    if split not in ranges:
        raise InputError(f"a split is 'development' or 'test', not {split!r}")
    return ranges[split].start + (seed * 1_000_003) % 100_000_000


def world_contaminated(
    names: Sequence[str], n: int, seed: int = 0, split: str = "development", share: float = 0.5
) -> Boxed:
    """Pictures as in training, of which a share holds each named concept, with exact boxes of them.

    A mark is stamped on its share of the pictures, and captions say nothing of it; other marks are on none.
    What is no mark takes an equal part of the share, and captions speak of it as they always do.

    Args:
        names: Concepts of the world.
        n: How many pictures.
        seed: Another seed gives other pictures.
        split: ``development`` or ``test``.
        share: Share of the pictures that hold each mark.
    """
    entries = [vocabulary.concept(name) for name in names]
    others = [entry.name for entry in entries if entry.kind != "mark"]
    setting = Setting(
        stamps={entry.name: share for entry in entries if entry.kind == "mark"},
        boost=dict.fromkeys(others, share / max(1, len(others))),
    )
    first = _first(split, seed)
    pictures, texts, drawn = scenes.batch(range(first, first + n), setting)
    boxes = [
        [(1.0, box, entry.name) for entry in entries for box in _boxes(scene, entry)]
        for scene in drawn
    ]
    return Boxed(pictures, tuple(texts), boxes)


def _boxes(scene: scenes.Scene, entry: vocabulary.Entry) -> list[tuple[float, float, float, float]]:
    """Boxes of a concept in pixels: one for each stamp, or one around all else that shows it."""
    if entry.kind == "mark":
        return [tuple(map(float, s.box)) for s in scene.stamps if s.name == entry.name]  # type: ignore[misc]
    if not scenes.contains(scene, entry.name):
        return []
    rows, columns = np.nonzero(_mask(scene, entry))
    if not len(rows):
        return []
    edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return [tuple(map(float, edges))]  # type: ignore[list-item]


def _mask(scene: scenes.Scene, entry: vocabulary.Entry) -> np.ndarray:
    """Pixels that show the concept, bool ``(64, 64)``."""
    truth = scenes.annotate(scene)
    if entry.kind == "background":
        return ~truth["masks"].any(0)
    if entry.kind == "mark":
        mask = np.zeros((scenes.SIZE, scenes.SIZE), bool)
        for (x0, y0, x1, y1), label in zip(
            truth["stamp_boxes"], truth["stamp_labels"], strict=True
        ):
            mask[int(y0) : int(y1), int(x0) : int(x1)] |= label == entry.name
        return mask
    shown = [
        entry.kind not in ("object", "colour", "style") or getattr(thing, entry.kind) == entry.name
        for thing in scene.things
    ]
    found: np.ndarray = truth["masks"][np.array(shown)].any(0)
    return found
