"""The world's words: enough of them, none shared by two concepts, nothing held out that would vanish."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest

from expunge.world import vocabulary as v
from expunge.world.templates import TEMPLATES


def test_there_are_concepts_of_every_kind():
    assert len(v.concept_names()) >= 40
    sizes = {"object": 12, "colour": 10, "style": 6, "background": 4, "identity": 32}
    sizes |= {"expression": 3, "unsafe": 1, "mark": 3}
    for kind, size in sizes.items():
        assert len(v.concept_names(kind)) == size
    for name, kind in v.REFERENCE.items():
        assert v.concept(name).kind == kind


def test_objects_and_styles_have_synonyms():
    for name in (*v.OBJECTS, *v.STYLES):
        assert len(v.concept(name).phrases) >= 2
        assert v.concept(name).unlisted


def test_no_text_stands_for_two_concepts():
    owner: dict[str, str] = {}
    for entry in v.entries().values():
        for text in entry.mentions:
            assert owner.setdefault(text, entry.name) == entry.name, text
            assert text == text.lower()


def test_no_object_or_style_word_is_part_of_another_concepts_text():
    for entry in v.entries().values():
        if entry.kind not in ("object", "style"):
            continue
        for text in (entry.name, *entry.phrases, *entry.unlisted):
            for other in v.entries().values():
                if other.name != entry.name:
                    assert not any(re.search(rf"\b{text}\b", said) for said in other.mentions), text


def test_euphemisms_and_metaphors_never_name_the_hazard():
    hazard = v.HAZARD_ENTRY
    assert len(hazard.euphemisms) >= 6 and len(hazard.metaphors) >= 6
    named = {
        w
        for text in (hazard.name, *hazard.phrases, *hazard.unlisted, *hazard.nouns)
        for w in text.split()
    }
    for text in (*hazard.euphemisms, *hazard.metaphors):
        assert not named & set(text.split()), text


def test_people_differ_in_at_least_two_salient_features():
    fields = ("gender", "age", "skin", "hair", "hair_colour", "shirt", "extras")
    for a, b in itertools.combinations(v.PEOPLE.values(), 2):
        differing = sum(getattr(a, key) != getattr(b, key) for key in fields)
        assert differing >= 3, (a.name, b.name)


def test_people_are_balanced_over_the_attributes():
    for key, values in v.ATTRIBUTES.items():
        counts = [sum(getattr(p, key) == value for p in v.PEOPLE.values()) for value in values]
        assert min(counts) >= 0.75 * len(v.PEOPLE) / len(values)


def test_unknown_concept_names_the_nearest():
    with pytest.raises(ValueError, match="nearest is 'star'"):
        v.concept("starr")


def test_neighbours_are_the_others_of_the_kind():
    assert v.neighbours("star") == tuple(name for name in v.OBJECTS if name != "star")


def test_anchors_are_other_concepts_or_texts():
    for entry in v.entries().values():
        assert entry.anchor != entry.name
        if entry.kind in ("object", "style", "colour", "background", "expression"):
            assert v.concept(entry.anchor).kind == entry.kind


def test_held_out_combinations_leave_everything_learnable():
    held = [
        look
        for look in itertools.product(v.OBJECTS, v.COLOURS, v.STYLES)
        if v.held_out_combination(*look)
    ]
    assert 0.08 < len(held) / 720 < 0.12
    for place, names, total in ((0, v.OBJECTS, 60), (1, v.COLOURS, 72), (2, v.STYLES, 120)):
        for name in names:
            assert 0 < sum(look[place] == name for look in held) < 0.2 * total
    for name, colour in itertools.product(v.OBJECTS, v.COLOURS):
        assert sum(look[:2] == (name, colour) for look in held) <= 2


def test_every_group_of_templates_has_some_held_out():
    share = [v.held_out_template(text) for group in TEMPLATES.values() for text in group]
    assert 0.15 < sum(share) / len(share) < 0.35
    for group in TEMPLATES.values():
        held = sum(map(v.held_out_template, group))
        assert 0 < held <= 0.4 * len(group)
        assert len(set(group)) == len(group)
    assert len(TEMPLATES["object"]) >= 12


def test_seed_ranges_are_disjoint():
    for a, b in itertools.combinations((v.TRAINING_SEEDS, v.DEVELOPMENT_SEEDS, v.TEST_SEEDS), 2):
        assert a[-1] < b[0] or b[-1] < a[0]


def test_drawing_the_world_needs_no_torch():
    code = "import sys, expunge.world.scenes; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
