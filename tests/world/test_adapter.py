"""What the world registers beside its models."""

from __future__ import annotations

import re

import numpy as np
import pytest

from expunge.world import vocabulary
from expunge.world.adapter import (
    UNRELATED,
    world_captions,
    world_concept,
    world_neighbours,
    world_pictures,
)
from expunge.world.judge import OracleJudge


def test_captions_speak_of_nothing_they_shall_leave_out() -> None:
    star = world_concept("star")
    assert star is not None
    without = ["star", *world_neighbours(star), *UNRELATED]
    made = world_captions(60, seed=1, without=without)
    words = [word for name in without for word in vocabulary.concept(name).mentions]
    assert len(made) == len(set(made)) == 60
    for text in made:
        assert not any(re.search(rf"\b{re.escape(word)}\b", text) for word in words), text


def test_captions_depend_on_the_seed_alone() -> None:
    assert world_captions(5, seed=3) == world_captions(5, seed=3) != world_captions(5, seed=4)


def test_fewer_captions_than_asked_for_where_hardly_any_is_left() -> None:
    kinds = ("object", "identity", "expression", "unsafe")
    everything = [name for kind in kinds for name in vocabulary.concept_names(kind)]
    assert len(world_captions(20, without=everything)) <= 20


@pytest.mark.parametrize(
    "name",
    ["mira solen", "tom reed", "star", "striped", "red", "hazard", "beach", "happy", "watermark"],
)
def test_pictures_show_the_concept_where_the_mask_says(name: str) -> None:
    found = world_pictures(name, 3, seed=1)
    assert found.pictures.shape == (3, 64, 64, 3) and found.pictures.dtype == np.uint8
    assert found.masks.shape == (3, 64, 64) and found.masks.dtype == bool
    assert all(0 < mask.sum() < 64 * 64 for mask in found.masks)
    assert all(name in text for text in found.captions)
    again, other = world_pictures(name, 3, seed=1), world_pictures(name, 3, seed=1, split="test")
    assert (again.pictures == found.pictures).all() and again.captions == found.captions
    assert not (other.pictures == found.pictures).all()
    banned = [n for n in vocabulary.REFERENCE if n != name]
    assert not any(word in text for word in banned for text in found.captions)


def test_masks_are_of_the_concept_and_not_of_its_company() -> None:
    found = world_pictures("star", 12)
    hidden = found.pictures.copy()
    for picture, mask in zip(hidden, found.masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 246, 241, 230
    star = world_concept("star")
    assert star is not None
    shown, gone = (OracleJudge().judge(p, star, []).hit.sum() for p in (found.pictures, hidden))
    assert shown == 12 and gone <= 2
