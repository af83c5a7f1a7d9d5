"""Pictures with captions, and what a detector sees in them: the user's, a world's, or the model's own.

What a user gives is a mapping:

    pictures   uint8 (n, height, width, 3); left out, the model draws the captions
    captions   n texts; left out with the pictures, a world's captions are drawn
    boxes      n lists of (confidence, (x1, y1, x2, y2) in pixels or None, name or phrase of a concept)
    detector   in place of boxes: pictures -> such lists

A box of ``None`` says that something is in the picture, not where.  Without boxes and detector the judge is
asked, who also only says whether.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..concept import Concept
from ..errors import InputError, nearest
from ..method import Judge, Prompt
from ..models.base import noise_generator
from .examples import as_pictures, check_size, texts_of

if TYPE_CHECKING:
    from ..models.diffusion import DiffusionModel

__all__ = ["KEYS", "Detected", "Detection", "detected"]

KEYS = ("pictures", "captions", "boxes", "detector")


class Detection(NamedTuple):
    """One thing that a detector sees.

    Attributes:
        confidence: 0 to 1.
        box: ``(x1, y1, x2, y2)`` in pixels, right and lower edge exclusive; ``None`` where it is not known.
        name: Of the concept.
    """

    confidence: float
    box: tuple[float, float, float, float] | None
    name: str


class Detected(NamedTuple):
    """Pictures and what is seen in them.

    Attributes:
        pictures: uint8 ``(n, height, width, 3)``.
        captions: A text for each, which need not name what is seen.
        boxes: A list of detections for each.
        origin: ``data``, ``world`` or ``model``: whose pictures they are.
        seer: ``boxes``, ``detector`` or ``judge``: who says what is in them.
    """

    pictures: np.ndarray
    captions: tuple[str, ...]
    boxes: tuple[tuple[Detection, ...], ...]
    origin: str
    seer: str

    @property
    def digest(self) -> str | None:
        """Names everything in it; ``None`` where the model itself drew and nobody but the judge looked."""
        if self.origin == "model" and self.seer == "judge":
            return None
        record = [self.pictures.shape, self.captions, self.boxes]
        found = hashlib.sha256(json.dumps(record).encode())
        found.update(np.ascontiguousarray(self.pictures).tobytes())
        return found.hexdigest()


def detected(
    model: DiffusionModel,
    concepts: Sequence[Concept],
    data: Any,
    judge: Judge | None,
    *,
    count: int,
    seed: int,
    steps: int | None = None,
    guidance: float | None = None,
) -> Detected:
    """The pictures to learn from, and where the concepts are in them.

    Args:
        model: Sampled as it is now where there are no pictures.
        concepts: What is looked for.
        data: The user's mapping, or ``None``.
        judge: Asked where there are neither boxes nor a detector.
        count: Pictures to take where the user gives none.
        seed: Seed of those pictures.
        steps, guidance: Of the model's sampling; default: its own.

    Raises:
        InputError: The mapping is not as above, or there is nobody to look at the pictures.
    """
    given = _given(data)
    companions = model.companions
    if not given and companions is not None and companions.contaminated is not None:
        known = [companions.concept(concept.name) for concept in concepts]
        names = {(k or c).name: c.name for k, c in zip(known, concepts, strict=True)}
        made = companions.contaminated(list(names), count, seed=seed, split="development")
        boxes = [[(p, box, names.get(n, n)) for p, box, n in listed] for listed in made.boxes]
        seen = _checked(boxes, len(made.pictures), concepts)
        return Detected(made.pictures, tuple(made.captions), seen, "world", "boxes")
    if "boxes" not in given and "detector" not in given and judge is None:
        raise InputError(
            f"nobody says where {concepts[0].name!r} is in the pictures; give data with 'boxes' or a 'detector', "
            "or a judge, or a model with a world that has such pictures"
        )
    captions = _captions(model, concepts, given, count, seed)
    if "pictures" in given:
        pictures, origin = given["pictures"], "data"
        check_size(model, pictures, "data: the pictures")
    else:
        pictures, origin = _drawn(model, captions, seed, steps, guidance), "model"
    if "boxes" in given:
        own = _checked(given["boxes"], len(captions), concepts)
        return Detected(pictures, captions, own, origin, "boxes")
    if "detector" in given:
        own = _checked(given["detector"](pictures), len(captions), concepts)
        return Detected(pictures, captions, own, origin, "detector")
    assert judge is not None
    return Detected(
        pictures, captions, _judged(judge, concepts, pictures, captions), origin, "judge"
    )


def _given(data: Any) -> dict[str, Any]:
    """The user's mapping, checked as far as its own parts go."""
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise InputError(
            f"data is {type(data).__name__}; allowed is a mapping with {', '.join(map(repr, KEYS))}"
        )
    for key in data:
        if key not in KEYS:
            raise InputError(f"data: unknown key {key!r}{nearest(str(key), KEYS)}")
    found = dict(data)
    if "captions" in found:
        found["captions"] = texts_of(found["captions"], "data: 'captions'")
    if "boxes" in found and ("detector" in found or "pictures" not in found):
        raise InputError("data: 'boxes' need 'pictures', and take the place of a 'detector'")
    if "detector" in found and not callable(found["detector"]):
        raise InputError(
            "data: 'detector' is not callable; allowed is a function pictures -> boxes"
        )
    if "pictures" in found:
        pictures = found["pictures"] = as_pictures(found["pictures"], "data: the pictures")
        n = len(found.get("captions", ()))
        fits = pictures.ndim == 4 and pictures.shape[-1] == 3 and pictures.dtype == np.uint8
        if not fits or not 0 < n == len(pictures):
            raise InputError(
                f"data: the pictures have shape {pictures.shape} and type {pictures.dtype} for {n} captions; "
                "allowed is uint8 (n, height, width, 3) with a caption each"
            )
    return found


def _captions(
    model: DiffusionModel,
    concepts: Sequence[Concept],
    given: Mapping[str, Any],
    count: int,
    seed: int,
) -> tuple[str, ...]:
    """One text a picture; fewer texts than pictures to draw are taken in turn."""
    listed = [str(text) for text in given.get("captions", ())]
    if "pictures" in given:
        return tuple(listed)
    companions = model.companions
    if not listed and companions is not None and companions.captions is not None:
        known = [c.name for c in concepts if companions.concept(c.name) is not None]
        listed = list(companions.captions(count, seed=seed, without=known))
    if not listed:
        raise InputError("there are no captions to draw pictures of; give data with 'captions'")
    return tuple(listed[index % len(listed)] for index in range(count))


def _drawn(
    model: DiffusionModel,
    captions: Sequence[str],
    seed: int,
    steps: int | None,
    guidance: float | None,
) -> np.ndarray:
    draws = [noise_generator(seed, "pictures to look at", i) for i in range(len(captions))]
    seeds = [int(torch.randint(2**31, (1,), generator=draw)) for draw in draws]
    return model.generate(list(captions), seeds=seeds, steps=steps, guidance=guidance)


def _judged(
    judge: Judge, concepts: Sequence[Concept], pictures: np.ndarray, captions: Sequence[str]
) -> tuple[tuple[Detection, ...], ...]:
    """What the judge finds, each without a place."""
    asked = [Prompt(text) for text in captions]
    hits = {concept.name: judge.judge(pictures, concept, asked).hit for concept in concepts}
    return tuple(
        tuple(Detection(1.0, None, name) for name, found in hits.items() if found[index])
        for index in range(len(captions))
    )


def _checked(
    boxes: Any, count: int, concepts: Sequence[Concept]
) -> tuple[tuple[Detection, ...], ...]:
    """Lists of ``(confidence, box or None, name)``, one a picture, as detections.

    A name or phrase of a concept, however it is written, becomes the concept's name.
    """
    if not hasattr(boxes, "__len__"):
        raise InputError(
            f"data: the boxes are {type(boxes).__name__}; allowed is a list for each of {count} pictures"
        )
    if len(boxes) != count:
        raise InputError(
            f"data: {len(boxes)} lists of boxes for {count} pictures; allowed is one each"
        )
    found = []
    names = {said.casefold(): concept.name for concept in concepts for said in concept.names}
    for index, listed in enumerate(boxes):
        try:
            seen = [_detection(*entry) for entry in listed]
        except (TypeError, ValueError):
            raise InputError(
                f"data: the boxes of picture {index} are {listed!r}; allowed is a list of "
                "(confidence, (x1, y1, x2, y2) or None, name)"
            ) from None
        found.append(tuple(d._replace(name=names.get(d.name.casefold(), d.name)) for d in seen))
    return tuple(found)


def _detection(confidence: Any, box: Any, name: Any) -> Detection:
    corners = None
    if box is not None:
        x1, y1, x2, y2 = (float(edge) for edge in box)
        corners = (x1, y1, x2, y2)
    if not 0 <= float(confidence) <= 1 or not isinstance(name, str):
        raise ValueError
    return Detection(float(confidence), corners, name)
