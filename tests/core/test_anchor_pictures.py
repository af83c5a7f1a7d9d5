"""Anchor pictures, the prompts that go with them, and rescaling."""

import dataclasses

import numpy as np
import pytest
import torch

from expunge.concept import Concept
from expunge.core.anchor_pictures import (
    Material,
    anchor_pictures,
    anchors_of,
    pairing,
    pairing_of,
)  # fmt: skip
from expunge.core.rescaling import augmented
from expunge.erase.diffusion.concept_ablation import ConceptAblation
from expunge.errors import InputError, SettingError, UnsupportedModel
from expunge.testing import tiny_diffusion

STAR = Concept("star", phrases=("heart",), anchor="circle")


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def method(**more):
    return ConceptAblation(pictures=4, sampling_steps=2, **more)


def test_an_object_takes_the_anchors_place_wherever_it_is_named():
    made = pairing("object", "a cat and a Cat", "cat", "Grumpy Cat", draw())
    assert made == "a Grumpy Cat and a Grumpy Cat"
    with pytest.raises(InputError, match="does not name the anchor"):
        pairing("object", "a catalogue", "cat", "dog", draw())


def test_styles_are_appended_in_a_third_of_the_prompts_and_put_in_front_in_the_rest():
    text = "a painting of a house"
    made = [pairing("style", text, "painting", "X", draw(i)) for i in range(600)]
    assert set(made) == {f"{text}, in the style of X", f"in X's style, {text}"}
    assert 0.25 < made.count(f"{text}, in the style of X") / 600 < 0.42


def test_unsafe_words_stand_in_three_places_equally_often():
    made = [pairing("unsafe", "a man", "a man", "X", draw(i)) for i in range(600)]
    forms = ("X, a man", "in X style, a man", "a man, X")
    assert set(made) == set(forms)
    assert all(0.25 < made.count(form) / 600 < 0.42 for form in forms)


def test_a_memorised_caption_is_its_own_prompt():
    assert pairing("memorization", "a paraphrase", "any", "the caption", draw()) == "the caption"


def test_anchors_and_pairings_follow_the_kind():
    style, unsafe = Concept("x", kind="style"), Concept("y", kind="unsafe")
    assert [pairing_of(c, "auto") for c in (STAR, style, unsafe)] == ["object", "style", "unsafe"]
    assert pairing_of(STAR, "style") == "style"
    assert anchors_of([STAR, style], None, ["object", "style"]) == ["circle", "painting"]
    assert anchors_of([STAR], "square", ["object"]) == ["square"]
    with pytest.raises(SettingError, match="has no anchor"):
        anchors_of([Concept("star")], None, ["object"])


def test_pictures_are_the_models_own_and_captions_speak_of_the_anchor_alone():
    model = tiny_diffusion()
    asked = {"captions": ["a red circle", "a circle and a star", "a blue square", "a circle"]}
    [own] = anchor_pictures(
        model, [STAR], ["circle"], ["object"], asked, count=5, seed=1, steps=2, guidance=3.0
    )
    assert set(own.captions) == {"a red circle", "a circle"} and len(own) == 5
    assert own.pictures.shape == (5, 16, 16, 3) and own.origin == "model"
    [again] = anchor_pictures(
        model, [STAR], ["circle"], ["object"], asked, count=5, seed=1, steps=2, guidance=3.0
    )
    assert np.array_equal(own.pictures, again.pictures)
    assert len({picture.tobytes() for picture in own.pictures}) == 5
    with pytest.raises(InputError, match="no caption names"):
        anchor_pictures(
            model, [STAR], ["circle"], ["object"], {"captions": ["a star"]}, count=2, seed=1, steps=2,
            guidance=3.0,
        )  # fmt: skip


def test_what_is_wrong_with_the_last_concept_shows_before_the_first_picture():
    model, heart = tiny_diffusion(), Concept("heart", anchor="square")
    with pytest.raises(InputError, match="no caption names 'square'"):
        anchor_pictures(
            model, [STAR, heart], ["circle", "square"], ["object"] * 2, {"captions": ["a circle"]}, count=2,
            seed=1, steps=2, guidance=2.0,
        )  # fmt: skip
    assert not model.cost.rows("denoiser", {})


def test_what_would_be_ignored_is_refused(monkeypatch):
    model = tiny_diffusion()
    given = {"circle": (np.zeros((1, 16, 16, 3), np.uint8), None, ["a circle"])}
    own = method()
    with pytest.raises(InputError, match="'captions' would be ignored"):
        Material(model, [STAR], own, {"pictures": given, "captions": ["a circle"]}, 0)
    style = Concept("star", kind="style")
    with pytest.raises(SettingError, match="the pairing of 'star' is 'style'"):
        Material(model, [style], dataclasses.replace(own, augment=True), None, 0)
    with pytest.raises(SettingError, match="the anchor 'Star' is 'star' itself"):
        Material(model, [STAR], dataclasses.replace(own, anchor="Star"), None, 0)
    monkeypatch.setattr(model, "vocabularies", dict)  # as a model of classes says it
    with pytest.raises(UnsupportedModel, match="reads none"):
        Material(model, [STAR], own, None, 0)


def test_a_users_pictures_are_taken_and_named_by_a_digest():
    model = tiny_diffusion()
    pictures = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    texts = ["a red circle", "a star and a circle", "a blue circle"]
    material = Material(model, [STAR], method(), {"pictures": {"circle": (pictures, None, texts)}}, 0)  # fmt: skip
    assert [text for _, text in material.rows] == ["a red circle", "a blue circle"]
    torch.testing.assert_close(material.latents, model.latents_of(pictures[[0, 2]]))
    assert material.report["anchor_pictures_from"] == {"star": "data"}
    assert material.digest is not None
    assert Material(model, [STAR], method(), None, 0).digest is None


def test_batches_are_drawn_by_the_generator_alone():
    material = Material(tiny_diffusion(), [STAR], method(phrases=True), None, 0)
    one, two = material.batch(6, draw(3)), material.batch(6, draw(3))
    assert torch.equal(one.points.latents, two.points.latents) and one.targets == two.targets
    names = {name for t in material.batch(40, draw(4)).targets for name in ("star", "heart") if name in t}  # fmt: skip
    assert names == {"star", "heart"}
    for anchor, target in zip(one.anchors, one.targets, strict=True):
        assert "circle" in anchor and "circle" not in target
    assert bool((one.valid == 1).all())


def test_rescaled_pictures_and_their_masks():
    picture = np.zeros((1, 64, 64, 3), np.uint8)
    picture[:] = (200, 20, 20)
    many = np.repeat(picture, 400, 0)
    made, masks, sizes = augmented(many, 4, draw())
    grey = (made == 127).all(-1)
    assert made.shape == many.shape and masks.shape == (400, 16, 16)
    shrunk = grey.any((1, 2))
    assert 0.6 < shrunk.mean() < 0.75  # 0.66 of them, save those that stay almost as large
    for index in range(400):
        if not shrunk[index]:
            continue
        inside = np.kron(masks[index], np.ones((4, 4), bool))
        if masks[index].sum() > 1:
            assert not grey[index][inside].any()  # only what belongs to the picture counts
        share = float((~grey[index]).mean()) ** 0.5
        assert 1 / 3 - 0.05 < share <= 1.0
        assert sizes[index] == ("small" if share < 0.58 else sizes[index])
    enlarged = [i for i, size in enumerate(sizes) if size == "large"]
    assert enlarged and all(masks[i].all() and not shrunk[i] for i in enlarged)
    assert {"small", "large", None} == set(sizes)


def test_what_was_rescaled_is_said_of_the_concept_only():
    material = Material(tiny_diffusion(), [STAR], method(augment=True), None, 0)
    batch = material.batch(60, draw(1))
    said = [t for t in batch.targets if t.startswith(("far away", "very small", "zoomed", "close up"))]  # fmt: skip
    assert said and not any("far away" in text or "zoomed" in text for text in batch.anchors)
    assert not bool((batch.valid == 1).all())
    assert len(material.anchors_alone(3, draw(2))[2]) == 3


def clean(material, points, noise):
    alpha, sigma = material.model.alpha_sigma(points.timesteps)
    return (points.latents - sigma * noise) / alpha


def test_pictures_are_rescaled_anew_each_time_and_the_priors_never():
    pictures = np.random.default_rng(0).integers(0, 255, (1, 16, 16, 3), np.uint8)
    data = {"pictures": {"circle": (pictures, None, ["a circle"])}}
    material = Material(tiny_diffusion(), [STAR], method(augment=True), data, 0)
    one, two = material.batch(8, draw(1)), material.batch(8, draw(1))
    assert torch.equal(one.points.latents, two.points.latents) and one.targets == two.targets
    found = clean(material, one.points, one.noise)
    assert len({tuple(row.flatten().round(decimals=2).tolist()) for row in found}) > 4
    points, noise, _ = material.anchors_alone(8, draw(2))
    kept = clean(material, points, noise)
    torch.testing.assert_close(kept, material.latents.expand_as(kept), atol=2e-2, rtol=1e-2)


def test_pictures_of_something_else_or_of_another_size_are_refused():
    pictures = np.zeros((2, 16, 16, 3), np.uint8)
    for name, shown, said in (
        (
            "star",
            pictures,
            "'star' have no part; allowed are pictures of what is learned from, 'circle'",
        ),
        ("circle", pictures.repeat(2, 1), "32 x 16 pixels"),
    ):
        data = {"pictures": {name: (shown, None, ["a circle", "a red circle"])}}
        with pytest.raises(InputError, match=said):
            Material(tiny_diffusion(), [STAR], method(), data, 0)
    with pytest.raises(SettingError, match="has no anchor"):
        anchors_of([STAR], "", ["object"])
