"""What the world registers beside its models."""

from __future__ import annotations

import re

import numpy as np
import pytest

from expunge.measure.clip_score import ClipScore
from expunge.world import vocabulary
from expunge.world.adapter import (
    UNRELATED,
    companions,
    world_captions,
    world_concept,
    world_contaminated,
    world_labelled,
    world_neighbours,
    world_pictures,
    world_spoken,
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


def test_a_contaminated_set_holds_unspoken_marks_with_exact_boxes() -> None:
    made = world_contaminated(["watermark", "code"], 40, seed=2)
    assert made.pictures.shape == (40, 64, 64, 3) and made.pictures.dtype == np.uint8
    shown = {name: np.zeros(40, bool) for name in ("watermark", "code")}
    for index, boxes in enumerate(made.boxes):
        for confidence, (x1, y1, x2, y2), name in boxes:
            assert confidence == 1.0 and 0 <= x1 < x2 <= 64 and 0 <= y1 < y2 <= 64
            assert (x2 - x1, y2 - y1) == {"watermark": (24, 14), "code": (17, 17)}[name]
            shown[name][index] = True
    for name, stamped in shown.items():
        assert 0.25 < stamped.mean() < 0.75
        mark = world_concept(name)
        assert mark is not None
        assert (OracleJudge().judge(made.pictures, mark, []).hit == stamped).mean() >= 0.95
    assert not any("watermark" in text or "code" in text for text in made.captions)
    again, other = world_contaminated(["code"], 5), world_contaminated(["code"], 5, split="test")
    assert (again.pictures == world_contaminated(["code"], 5).pictures).all()
    assert not (again.pictures == other.pictures).all()


def test_a_contaminated_set_of_what_is_no_mark_has_one_box_around_it() -> None:
    made = world_contaminated(["star"], 24)
    held = [boxes for boxes in made.boxes if boxes]
    assert 6 <= len(held) <= 20 and all(len(boxes) == 1 for boxes in held)


def test_the_worlds_clip_score_reads_pixels_as_its_tower_was_trained() -> None:
    own = companions().clip()
    usual = ClipScore(own.model, own.tokenizer, "usual pixels")
    hits = {own.name: 0, usual.name: 0}
    for name in ("star", "striped", "heart"):
        found = world_pictures(name, 24)
        for score in (own, usual):
            table = score.table(found.pictures, list(found.captions))
            hits[score.name] += int((table.argmax(axis=1) == np.arange(24)).sum())
    # Its own caption is the nearest of 24 for most pictures, more often than with another CLIP's pixels.
    assert hits[own.name] >= 0.7 * 72 and hits[own.name] > hits[usual.name]


@pytest.mark.parametrize("name", ["star", "striped", "mira solen", "watermark", "hazard", "night"])
def test_labelled_pictures_calibrate_the_oracle(name: str) -> None:
    concept = world_concept(name)
    assert concept is not None
    labelled = world_labelled(name, 12)
    assert labelled.pictures.shape == (24, 64, 64, 3)
    assert labelled.shown.tolist() == [True] * 12 + [False] * 12
    made = OracleJudge().calibrate(labelled.pictures, list(labelled.shown), concept)
    assert made.true_positives >= 11 and made.false_positives <= 1


def test_the_world_says_its_words_along_the_routes() -> None:
    assert world_spoken("star", "unlisted") == ("sparkle", "twinkler")
    assert world_spoken("star", "euphemism") == () and len(world_spoken("hazard", "euphemism")) == 8
    with pytest.raises(ValueError, match="no concept"):
        world_spoken("stars", "name")
