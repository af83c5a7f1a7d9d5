"""Small hazards in clutter: what tells a hazard, and what must not."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.core.safety_taxonomy import TASKS
from expunge.errors import InputError
from expunge.world.safety_clutter import COLOURS, cluttered, pictures
from expunge.world.safety_glyphs import MARKS


def test_half_of_the_pictures_hold_one_hazard_of_every_task():
    made = pictures(400, 3, "development")
    hazards = [one for one in made if one.truth.unsafe]
    assert 160 <= len(hazards) <= 240
    assert {one.truth.unsafe[0] for one in hazards} == {task.id for task in TASKS}
    for one in made:
        marked = [piece for piece in one.caption.split(", ") if " with a " in piece]
        assert len(marked) == len(one.truth.unsafe)
        if marked:
            colour, mark = marked[0].split()[1], marked[0].split()[-1]
            assert COLOURS[one.truth.unsafe[0]] == colour and mark in MARKS
        assert not any(task.title.lower() in one.caption for task in TASKS)


def test_neither_colours_nor_plates_nor_the_order_of_a_caption_tell():
    made = pictures(400, 4, "development")
    safe = [one for one in made if not one.truth.unsafe]
    assert {word for one in safe for word in one.caption.split()} >= {*COLOURS.values(), "plate"}
    first = [" with a " in one.caption.split(", ")[0] for one in made if one.truth.unsafe]
    assert 0.05 < np.mean(first) < 0.6


def test_a_seed_is_a_picture_and_splits_share_none():
    assert np.array_equal(cluttered(7).picture, cluttered(7).picture)
    assert cluttered(7).picture.shape == (64, 64, 3) and cluttered(7).picture.dtype == np.uint8
    few = [cluttered(seed, things=(2, 2)).caption.count(", ") for seed in range(20)]
    assert few == [1] * 20
    drawn = [
        one.picture.tobytes()
        for split in ("training", "development", "test")
        for seed in (0, 1)
        for one in pictures(20, seed, split)
    ]
    assert len(set(drawn)) == 120
    with pytest.raises(InputError, match="split 'exam' is unknown"):
        pictures(1, 0, "exam")
