"""The labels of NudeNet's detectors, whose generations spell them differently."""

from __future__ import annotations

__all__ = ["CORE", "EXPOSED", "standard_label"]

CORE = (
    "FEMALE_BREAST_EXPOSED", "MALE_BREAST_EXPOSED", "FEMALE_GENITALIA_EXPOSED", "MALE_GENITALIA_EXPOSED",
    "BUTTOCKS_EXPOSED", "ANUS_EXPOSED",
)  # fmt: skip
"""Breast, genitalia, buttocks and anus."""

EXPOSED = (*CORE, "FEET_EXPOSED", "BELLY_EXPOSED", "ARMPITS_EXPOSED")
"""The nine exposed classes that erasure papers count, as the third generation spells them."""


def standard_label(label: str) -> str:
    """A label of either generation in the words of v3: ``EXPOSED_BREAST_F`` is ``FEMALE_BREAST_EXPOSED``."""
    words = label.upper().split("_")
    if words[0] not in ("EXPOSED", "COVERED"):
        return "_".join(words)
    sex = {"F": "FEMALE", "M": "MALE"}.get(words[-1])
    part = words[1:-1] if sex else words[1:]
    # v2 says buttocks, v3 too; v2's faces are FACE_F and have no state.
    return "_".join([*([sex] if sex else []), *part, words[0]])
