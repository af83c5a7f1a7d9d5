"""What a concept is read from: target prompts, retained prompts, captions."""

from __future__ import annotations

import dataclasses

import pytest

from expunge import Concept
from expunge.core.concept_prompts import concept_prompts, five
from expunge.erase.diffusion.itd import ItD
from expunge.errors import InputError
from expunge.testing import tiny_diffusion
from expunge.testing.bench import bench

STAR = Concept("star", phrases=("red star",), anchor="circle")
CAPTIONS = [
    f"{a} {b}" for a in ("a plain", "a striped", "photo of a") for b in ("circle", "star", "green")
]
METHOD = ItD(templates=("a {}", "photo of a {}"))


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def test_target_and_retained_prompts(model):
    texts = concept_prompts(METHOD, model, [STAR], ["square", "a blue heart", "a star"], CAPTIONS)
    forms = ("{}", *METHOD.templates)
    assert set(texts.targets) == {f.replace("{}", n) for n in ("star", "red star") for f in forms}
    # Every target prompt with the anchor in the place of the name, and what is kept in the same templates.
    assert {f.replace("{}", n) for n in ("circle", "square") for f in forms} <= set(texts.retained)
    assert "a blue heart" in texts.retained
    assert set(CAPTIONS) - set(texts.retained) == {text for text in CAPTIONS if "star" in text}
    assert not any("star" in text for text in texts.retained)
    assert texts.captions == tuple(CAPTIONS)


def test_what_the_user_gives_joins_or_takes_the_place(model):
    plain = dataclasses.replace(METHOD, erase_phrases=False, general_prompts=0, guide="")
    given = {"captions": CAPTIONS, "targets": {"star": ["a twinkler"]}}
    texts = concept_prompts(plain, model, [STAR], [], given)
    assert set(texts.targets) == {"a twinkler", "star", "a star", "photo of a star"}
    assert set(texts.retained) == {"a", "photo of a"}
    more = concept_prompts(
        plain, model, [STAR], [], {"captions": CAPTIONS, "retained": ["green", "green star"]}
    )
    assert set(more.retained) == {"a", "photo of a", "green"}
    assert texts.digest != more.digest
    known = concept_prompts(plain, model, [STAR], [], {"retained": ["green"]}, known=True)
    assert known.captions == ()


def test_a_world_gives_captions_and_templates_go_by_kind():
    opened = bench(ItD).opens()
    texts = concept_prompts(ItD(captions=7), opened, [STAR], [], None)
    assert len(texts.captions) == 7 and "one star" in texts.targets
    style = concept_prompts(ItD(), opened, [Concept("striped", "style")], [], None)
    assert "a picture by striped" in style.targets and "a picture by art" in style.retained
    assert all(len(five(kind)) == 5 for kind in ("object", "style", "identity", "unsafe"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "give thousands of them"),
        ("star", "list of captions or a mapping with captions, retained, targets as data, not str"),
        ({"caption": []}, "unknown key 'caption'.*captions"),
        ({"captions": "a star"}, "'captions' must be a list of texts"),
        ({"captions": [1]}, "'captions' must be a list of texts"),
        ({"captions": CAPTIONS, "retained": 3}, "'retained' must be a list of texts"),
        (
            {"captions": CAPTIONS, "targets": ["a star"]},
            "'targets' must be a mapping from a concept's name",
        ),
        (
            {"captions": CAPTIONS, "targets": {"star": "a star"}},
            "targets of 'star' must be a list of texts",
        ),
        ([b"a star"], "'captions' must be a list of texts"),
        ({"captions": CAPTIONS, "targets": {"stars": ["x"]}}, "'stars', which is not erased"),
    ],
)
def test_data_that_is_refused(model, data, message):
    with pytest.raises(InputError, match=message):
        concept_prompts(METHOD, model, [STAR], [], data)
