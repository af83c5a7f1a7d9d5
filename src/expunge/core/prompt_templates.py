"""Templates of textual inversion (arXiv 2208.01618): prompts around a word for an object, a style, or a person.

Several erasers and attacks train on prompts drawn from these lists; which one goes by the kind of the concept.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import SettingError

__all__ = ["OBJECT", "PERSON", "STYLE", "inversion_templates", "with_place"]

OBJECT = (
    "a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}",
    "a photo of a clean {}", "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}",
    "a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}",
    "a photo of the {}", "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}",
    "a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}",
    "a good photo of a {}", "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}",
    "a photo of the large {}", "a photo of a cool {}", "a photo of a small {}",
)  # fmt: skip
"""27 of them."""

STYLE = (
    "a painting in the style of {}", "a rendering in the style of {}", "a cropped painting in the style of {}",
    "the painting in the style of {}", "a clean painting in the style of {}", "a dirty painting in the style of {}",
    "a dark painting in the style of {}", "a picture in the style of {}", "a cool painting in the style of {}",
    "a close-up painting in the style of {}", "a bright painting in the style of {}",
    "a cropped painting in the style of {}", "a good painting in the style of {}",
    "a close-up painting in the style of {}", "a rendition in the style of {}", "a nice painting in the style of {}",
    "a small painting in the style of {}", "a weird painting in the style of {}",
    "a large painting in the style of {}",
)  # fmt: skip
"""19 of them; two stand there twice, as in the published list, and are drawn twice as often."""


PERSON = ("a photo portrait of {}", "a DSLR portrait of {}")
"""Both of concept inversion's (arXiv 2308.01508)."""


def inversion_templates(kind: str) -> tuple[str, ...]:
    """The list for a kind of concept: that of styles, or that of objects for all others."""
    return STYLE if kind == "style" else OBJECT


def with_place(method: str, name: str, templates: Iterable[str]) -> None:
    """Refuse templates of a setting that have no ``{}`` where the name of a concept stands.

    Raises:
        SettingError: One has none: texts made from it would not name the concept.
    """
    for template in templates:
        if "{}" not in template:
            raise SettingError(
                f"{method}: {name} holds {template!r}, which names no concept; allowed are texts with {{}} in its place"
            )
