"""What the world registers beside its models."""

from __future__ import annotations

import re

from expunge.world import vocabulary
from expunge.world.adapter import UNRELATED, world_captions, world_concept, world_neighbours


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
