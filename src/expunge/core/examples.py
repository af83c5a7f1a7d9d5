"""Pictures of a concept to learn from: the user's, else those of the model's world, else the model's own.

What a user gives is a mapping with ``pictures``, concept name -> ``(pictures, masks or None, captions)``, and
``captions``, general texts that have nothing to do with the concepts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..concept import Concept
from ..errors import InputError, nearest
from ..models.base import Pictures, noise_generator
from .mentions import exchanged

if TYPE_CHECKING:
    from ..models.diffusion import DiffusionModel

__all__ = [
    "Shown",
    "as_pictures",
    "at_hand",
    "called",
    "check_size",
    "examples",
    "examples_digest",
    "fitted",
    "given",
    "pictures_of_concept",
    "read_pictures",
    "texts_of",
    "turned",
]


Shown = tuple[str, Pictures]
"""Where pictures come from (``data``, ``files``, ``world`` or ``model``), and the pictures."""

PARTS = ("pictures", "captions")
"""What a user may give."""


def given(
    data: Any,
    model: DiffusionModel | None = None,
    concepts: Sequence[Concept] = (),
    parts: Sequence[str] = PARTS,
) -> tuple[dict[str, Pictures], list[str]]:
    """The user's pictures by concept name, and general captions; both checked, either may be missing.

    Args:
        data: The mapping, or ``None``.
        model: Pictures have to be of the size that it draws; ``None`` takes any.
        concepts: What is erased, where pictures are those of its concepts.
        parts: Those of the two that the method reads; the other would be ignored, and is refused.

    Raises:
        InputError: An unknown key, pictures of something else where some of ``concepts`` have none, or pictures,
            masks and captions that do not fit each other or the model.
    """
    if data is None:
        return {}, []
    if not isinstance(data, Mapping):
        raise InputError(
            f"data is {type(data).__name__}; allowed is a mapping with {' and '.join(map(repr, parts))}"
        )
    for key in data:
        if key not in PARTS:
            raise InputError(f"data: unknown key {key!r}{nearest(str(key), parts)}")
        if key not in parts:
            raise InputError(
                f"data: this method reads no {key!r}; allowed is a mapping with {' and '.join(map(repr, parts))}"
            )
    pictures = data.get("pictures", {})
    if not isinstance(pictures, Mapping):
        raise InputError(
            f"data: 'pictures' is {type(pictures).__name__}; allowed is a mapping from a concept's name to "
            "(pictures, masks or None, captions)"
        )
    # Pictures of others may stand beside: a user's collection. A name that is written otherwise may not.
    bare = [concept.name for concept in concepts if concept.name not in pictures]
    strangers = [name for name in pictures if name not in [c.name for c in concepts]]
    if bare and strangers:
        raise InputError(
            f"data: there are pictures of {strangers[0]!r}, which is not erased, and none of {bare[0]!r}"
            f"{nearest(str(strangers[0]), bare)}"
        )
    for name, parts in pictures.items():
        if not isinstance(parts, (tuple, list)) or len(parts) != 3:
            raise InputError(
                f"data: the pictures of {name!r} are {type(parts).__name__}; allowed is a tuple (pictures, masks or "
                "None, captions)"
            )
    found = {name: _checked(name, *parts) for name, parts in pictures.items()}
    if model is not None:
        for name, own in found.items():
            check_size(model, own.pictures, f"data: the pictures of {name!r}")
    return found, texts_of(data.get("captions", ()), "data: 'captions'")


def check_size(model: DiffusionModel, pictures: np.ndarray, what: str) -> None:
    """Refuse pictures ``(n, height, width, 3)`` of another size than the model draws.

    Raises:
        InputError: They are of another size; ``what`` names them.
    """
    height, width = (side * model.layout.scale_factor for side in model.latent_shape[1:])
    if pictures.shape[1:3] != (height, width):
        raise InputError(
            f"{what} are {pictures.shape[1]} x {pictures.shape[2]} pixels; {model.name} draws {height} x {width}, "
            "and allowed are pictures of that size"
        )


def as_pictures(pictures: Any, what: str) -> np.ndarray:
    """Pictures as one array.

    Raises:
        InputError: They are of several sizes; ``what`` names them.
    """
    try:
        return np.asarray(pictures)
    except ValueError as error:
        raise InputError(
            f"{what} make no one array ({error}); allowed is uint8 (n, height, width, 3)"
        ) from None


def texts_of(texts: Any, what: str) -> list[str]:
    """A user's list of texts; a bare text would else be taken for the list of its letters.

    Raises:
        InputError: Something else; ``what`` names it.
    """
    if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
        raise InputError(f"{what} must be a list of texts, not {type(texts).__name__}")
    listed = list(texts)
    for text in listed:
        if not isinstance(text, str):
            raise InputError(f"{what} must be a list of texts, and holds a {type(text).__name__}")
    return listed


def _checked(name: str, pictures: Any, masks: Any, captions: Sequence[str]) -> Pictures:
    pictures = as_pictures(pictures, f"data: the pictures of {name!r}")
    captions = texts_of(captions, f"data: the captions of {name!r}")
    n = len(captions)
    if (
        pictures.ndim != 4
        or pictures.dtype != np.uint8
        or pictures.shape[-1] != 3
        or not 0 < n == len(pictures)
    ):
        raise InputError(
            f"data: the pictures of {name!r} have shape {pictures.shape} and type {pictures.dtype} for {n} "
            "captions; allowed is uint8 (n, height, width, 3) with a caption each"
        )
    if masks is not None:
        masks = np.asarray(masks, bool)
        if masks.shape != pictures.shape[:3]:
            raise InputError(
                f"data: the masks of {name!r} have shape {masks.shape}; allowed is {pictures.shape[:3]}"
            )
    return Pictures(pictures, masks, tuple(captions))


def at_hand(
    model: DiffusionModel,
    entries: Iterable[Any],
    data: Mapping[str, Pictures],
    *,
    crop: bool = False,
) -> dict[str, Shown]:
    """Pictures by name that need not be drawn: the user's data, else the files that concepts name.

    Args:
        model: Files are read in the size that it draws.
        entries: Concepts; what is no :class:`Concept` names no files.
        data: Pictures by name.
        crop: See :func:`fitted`.

    Raises:
        InputError: A file cannot be read as a picture.
    """
    height, width = (side * model.layout.scale_factor for side in model.latent_shape[1:])
    found: dict[str, Shown] = {name: ("data", own) for name, own in data.items()}
    for concept in entries:
        if isinstance(concept, Concept) and concept.name not in found:
            read = read_pictures(concept, height, width, crop=crop)
            if read is not None:
                found[concept.name] = "files", read
    return found


def examples(
    model: DiffusionModel,
    name: str,
    own: Mapping[str, Shown],
    *,
    count: int,
    texts: Sequence[str],
    seed: int,
    steps: int,
    guidance: float,
) -> Shown:
    """Pictures of a concept: those at hand, else its world's, else the model's own.

    Args:
        model: Sampled as it is now where nothing else is there.
        name: Of the concept; a whole prompt may stand for one.
        own: What is :func:`at_hand`, all of which is taken.
        count: How many otherwise.
        texts: What the model is asked for, in turn.
        seed: Seed of the pictures.
        steps, guidance: Of the model's sampling.
    """
    if name in own:
        return own[name]
    companions = model.companions
    if companions is not None and companions.pictures is not None:
        known = companions.concept(name)
        if known is not None:
            found = companions.pictures(known.name, count, seed=seed, split="development")
            return "world", found
    asked = [texts[i % len(texts)] for i in range(count)]
    draws = [noise_generator(seed, f"examples of {name}", i) for i in range(count)]
    seeds = [int(torch.randint(2**31, (1,), generator=draw)) for draw in draws]
    made = model.generate(asked, seeds=seeds, steps=steps, guidance=guidance)
    return "model", Pictures(made, None, tuple(asked))


def called(found: Pictures, spoken: Sequence[str], names: Sequence[str]) -> Pictures:
    """The same pictures, each caption calling the concept by one of ``names``, in turn.

    Args:
        found: Pictures of a concept.
        spoken: What captions may call it.
        names: What they are to call it.

    Raises:
        InputError: A caption does not name the concept.
    """
    texts = []
    for i, caption in enumerate(found.captions):
        text, mention = exchanged(caption, spoken, names[i % len(names)])
        if mention is None:
            raise InputError(
                f"data: the caption {caption!r} does not name {spoken[0]!r}; allowed are captions that hold "
                "the name or a listed phrase"
            )
        texts.append(text)
    return found._replace(captions=tuple(texts))


def examples_digest(
    found: Mapping[str, tuple[str, Pictures]], captions: Sequence[str] = ()
) -> str | None:
    """A digest of pictures, masks and captions that did not come from the model itself, or ``None``."""
    if not captions and all(origin == "model" for origin, _ in found.values()):
        return None
    digest = hashlib.sha256(json.dumps(list(captions)).encode())
    for name, (origin, own) in found.items():
        if origin != "model":
            digest.update(json.dumps([name, own.pictures.shape, list(own.captions)]).encode())
            digest.update(np.ascontiguousarray(own.pictures).tobytes())
            digest.update(b"" if own.masks is None else np.packbits(own.masks).tobytes())
    return digest.hexdigest()


def fitted(picture: Any, height: int, width: int, *, crop: bool = False) -> np.ndarray:
    """A PIL image or uint8 ``(H, W, 3)`` array as uint8 ``(height, width, 3)``, resized bicubically.

    Args:
        picture: Of any size.
        height, width: Wanted, pixels.
        crop: Cut the largest part of the wanted proportions from the middle first; without it a picture of
            other proportions is stretched.
    """
    from PIL import Image

    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.asarray(picture))
    box = None
    if crop:
        scale = min(image.width / width, image.height / height)
        left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
        box = (left, top, left + scale * width, top + scale * height)
    if image.size == (width, height):
        return np.array(image.convert("RGB"))
    resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC, box=box)
    return np.array(resized)


def read_pictures(
    concept: Concept, height: int, width: int, *, crop: bool = False
) -> Pictures | None:
    """The pictures whose files a concept names, each captioned by its name; ``None`` if it names none.

    Raises:
        InputError: A file cannot be read as a picture.
    """
    from PIL import Image, ImageOps

    found = []
    for path in concept.images:
        try:
            with Image.open(path) as image:
                found.append(fitted(ImageOps.exif_transpose(image), height, width, crop=crop))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(
                f"{Path(path).name}: this picture of {concept.name!r} cannot be read ({error})"
            ) from None
    if not found:
        return None
    return Pictures(np.stack(found), None, (concept.name,) * len(found))


def pictures_of_concept(model: Any, concept: Concept, count: int, seed: int = 0) -> Pictures | None:
    """Pictures of a concept in the model's size: those its files hold, else its world's for development.

    ``None`` where there are neither.

    Raises:
        InputError: A file cannot be read as a picture.
    """
    height, width = (side * model.layout.scale_factor for side in model.latent_shape[1:])
    found = read_pictures(concept, height, width, crop=True)
    companions = model.companions
    if found is not None or companions is None or companions.pictures is None:
        return found
    if companions.concept(concept.name) is None:
        return None
    return companions.pictures(concept.name, count, seed=seed, split="development")


def turned(
    pictures: np.ndarray, probability: float, generator: torch.Generator
) -> tuple[np.ndarray, int]:
    """Pictures of which some, drawn once, are turned left to right, and how many are.

    Args:
        pictures: uint8 ``(n, height, width, 3)``.
        probability: Of each.
        generator: A CPU generator.
    """
    chosen = (torch.rand(len(pictures), generator=generator) < probability).numpy()
    made = pictures.copy()
    made[chosen] = made[chosen, :, ::-1]
    return made, int(chosen.sum())
