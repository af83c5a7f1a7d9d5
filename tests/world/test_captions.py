"""Prompts for audits say what their labels say, by the route that was asked for."""

from __future__ import annotations

import re

import pytest

from expunge.world import captions, scenes
from expunge.world import vocabulary as v
from expunge.world.templates import TEMPLATES


def _says(text: str, texts: tuple[str, ...]) -> bool:
    return any(re.search(rf"\b{re.escape(said)}\b", text) for said in texts)


@pytest.mark.parametrize(
    "name", ["star", "striped", "plain", "hazard", "mira solen", "red", "meadow", "happy"]
)
@pytest.mark.parametrize("part", ["train", "held-out", "any"])
def test_prompts_name_the_concept_and_their_labels(name, part):
    kind = v.concept(name).kind
    for prompt in captions.prompts_for(name, 60, 3, templates=part):
        assert _says(prompt.text, (name,)) and prompt.concept == name
        for key, value in prompt.labels.items():
            if key == "hazard":
                assert value == "any" or value.split("-")[0] in prompt.text
            elif not (key == "style" and value == "plain"):
                assert _says(prompt.text, (value,)), prompt
        if kind not in ("unsafe", "identity"):
            assert prompt.labels[kind] == name
        for other in v.COLOURS:
            if kind == "object" and other != prompt.labels.get("colour"):
                assert not _says(prompt.text, (other,))


@pytest.mark.parametrize("route", captions.ROUTES)
def test_routes(route):
    hazard = v.HAZARD_ENTRY
    texts = captions.spoken(hazard, route)
    for prompt in captions.prompts_for("hazard", 40, route=route):
        assert _says(prompt.text, texts) and prompt.route == route
        if route in ("euphemism", "metaphor"):
            assert not _says(prompt.text, (hazard.name, *hazard.phrases, *hazard.unlisted))


def test_a_route_that_a_concept_lacks_is_refused():
    with pytest.raises(ValueError, match="no euphemism for 'star'"):
        captions.prompts_for("star", 1, route="euphemism")
    with pytest.raises(ValueError, match="A route is"):
        captions.prompts_for("star", 1, route="nickname")
    with pytest.raises(ValueError, match="A split is"):
        captions.prompts_for("star", 1, split="train")
    with pytest.raises(ValueError, match="nearest is 'star'"):
        captions.prompts_for("sta", 1)


def test_every_concept_has_prompts():
    for name in v.concept_names():
        prompts = captions.prompts_for(name, 12, 1)
        assert len(prompts) == 12 and all(len(p.text.split()) <= 17 for p in prompts)


def test_prompts_are_deterministic_and_vary_with_the_seed():
    a, b = (captions.prompts_for("star", 64, 5) for _ in range(2))
    assert a == b and a != captions.prompts_for("star", 64, 6)
    assert len({prompt.text for prompt in a}) >= 60


def test_seeds_of_prompts_lie_in_their_range():
    for split, seeds in (("development", v.DEVELOPMENT_SEEDS), ("test", v.TEST_SEEDS)):
        found = [prompt.seed for prompt in captions.prompts_for("ring", 50, 2, split=split)]
        assert len(set(found)) == 50 and all(seed in seeds for seed in found)


def test_combinations_of_prompts():
    for part, wanted in (("train", False), ("held-out", True)):
        for prompt in captions.prompts_for("circle", 100, combinations=part, templates="any"):
            if {"object", "colour", "style"} <= prompt.labels.keys():
                look = (prompt.labels[key] for key in ("object", "colour", "style"))
                assert v.held_out_combination(*look) == wanted


def test_training_captions_never_come_from_held_out_templates():
    """Templates are turned into patterns; a held-out one may match only where a training one does too."""

    def pattern(template):
        return re.compile(
            "^" + re.sub(r"\\{\w+\\}", r"[\\w' -]+?", re.escape(template).replace(r"\ ", " ")) + "$"
        )

    by_part = {
        part: [
            pattern(t)
            for group in TEMPLATES.values()
            for t in group
            if v.held_out_template(t) == held
        ]
        for part, held in (("train", False), ("held-out", True))
    }
    for text in captions_of(600):
        text = re.sub(r"\ban\b", "a", text)
        assert any(p.match(text) for p in by_part["train"]), text


def captions_of(n):
    return [scenes.sample_scene(seed, scenes.SETTINGS["full"]).caption for seed in range(n)]


def test_marks_are_named_only_on_request():
    words = [text for mark in v.MARKS for text in v.concept(mark).mentions]
    assert not any(_says(p.text, tuple(words)) for p in captions.prompts_for("watermark", 50))
    asked = captions.prompts_for("watermark", 50, route="phrase")
    assert all(_says(p.text, v.concept("watermark").phrases) for p in asked)


def test_vocabulary_words_cover_the_concepts():
    words = set(v.vocabulary_words())
    assert {"star", "pentagram", "sparkle", "stripes", "solen", "doctor", "rattle"} <= words
