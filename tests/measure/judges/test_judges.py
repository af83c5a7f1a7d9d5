"""Judges on stand-ins: verdicts by hand, what they refuse, and the specification they are opened by."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from expunge.concept import Concept
from expunge.errors import InputError, JudgeError, MissingExtra, ModelError, SettingError
from expunge.measure import judges
from expunge.measure.judges import open_judge
from expunge.measure.judges.classifier import IMAGENETTE, PictureClassifier, open_classifier
from expunge.measure.judges.either import Either
from expunge.measure.judges.imageguard import ImageGuard
from expunge.measure.judges.nudenet import EXPOSED, NudeNet, standard_label
from expunge.measure.judges.q16 import Q16, read_prompts
from expunge.measure.judges.vision_language import VisionLanguage, read_answer
from expunge.method import Prompt

PICTURES = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)
PROMPTS = [Prompt("a tench", i) for i in range(4)]
NUDITY = Concept("nudity", kind="unsafe")


# -- classifiers -----------------------------------------------------------------------------------

LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8]]))
LABELS = {"Tench": (0,), "church": (1,), "either": (0, 1)}


def classifier(**options):
    return PictureClassifier(lambda pictures: LOGITS[: len(pictures)], LABELS, "hand", **options)


def test_a_hit_is_a_first_class_and_the_score_its_probability():
    found = classifier().judge(PICTURES, Concept("tench"), PROMPTS)
    assert found.hit.tolist() == [True, False, True, False] and found.recognisable.all()
    np.testing.assert_allclose(found.score, [0.7, 0.2, 0.4, 0.1])
    both = classifier().judge(PICTURES, Concept("either"), PROMPTS)
    assert both.hit.tolist() == [True, True, True, False]
    np.testing.assert_allclose(both.score, [0.9, 0.7, 0.75, 0.2])


@pytest.mark.parametrize("pictures", [PICTURES / 255, PICTURES[..., :1], PICTURES[0]])
def test_float_and_grey_pictures_are_refused(pictures):
    """Values from 0 to 1 would pass for black."""
    from expunge.world.judge import OracleJudge

    for judge, concept in (
        (classifier(), Concept("tench")), (nudenet(), NUDITY), (OracleJudge(), Concept("star")),
    ):  # fmt: skip
        with pytest.raises(InputError, match="pictures must be uint8"):
            judge.judge(pictures, concept, PROMPTS)


def test_more_classes_a_threshold_and_a_floor_change_verdict_and_protocol():
    first, second = classifier(), classifier(top=2)
    assert first.judge(PICTURES, Concept("church"), PROMPTS).hit.tolist() == [
        False,
        True,
        False,
        False,
    ]
    # The last one's two smaller classes are equals: the concept asked about is ranked before its equal.
    assert second.judge(PICTURES, Concept("church"), PROMPTS).hit.tolist() == [True] * 4
    strict = classifier(threshold=0.45).judge(PICTURES, Concept("tench"), PROMPTS)
    assert strict.hit.tolist() == [True, False, False, False]
    sure = classifier(floor=0.45).judge(PICTURES, Concept("tench"), PROMPTS)
    assert sure.recognisable.tolist() == [True, True, False, True] and not sure.hit[2]
    kinds = (first, second, classifier(threshold=0.45), classifier(floor=0.45))
    assert len({judge.protocol for judge in kinds}) == 4


def test_phrases_are_looked_up_and_an_unknown_concept_is_refused():
    named = Concept("doctor fish", phrases=("tench",))
    assert classifier().judge(PICTURES, named, PROMPTS).hit[0]
    with pytest.raises(SettingError, match="did you mean 'church'"):
        classifier().judge(PICTURES, Concept("churches"), PROMPTS)
    with pytest.raises(InputError, match="a row each with at least"):
        PictureClassifier(lambda p: np.zeros((len(p), 1)), LABELS, "hand").judge(
            PICTURES, Concept("church"), PROMPTS
        )
    assert not len(classifier().judge(PICTURES[:0], Concept("tench"), []).hit)


@pytest.mark.parametrize("places", [(), (-1,)])
def test_a_label_without_a_class_is_refused(places):
    with pytest.raises(SettingError, match="at least one class from 0 on"):
        PictureClassifier(lambda p: LOGITS, {"tench": places}, "hand")


def test_imagenettes_classes_are_ten_places_among_a_thousand():
    places = sorted(place for (place,) in IMAGENETTE.values())
    assert places == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small ViT of three classes, saved with its image processor."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    place = tmp_path_factory.mktemp("classifier") / "small-vit"
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16,
        patch_size=8, id2label={0: "tench, Tinca tinca", 1: "church", 2: "gas pump"},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(place)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(place)
    return place


def test_a_classifier_of_transformers_opens_from_a_folder(network, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 255, (5, 20, 24, 3), np.uint8)
    made = open_judge(f"classifier:model={network},batch=2")
    names = ("tench", "Tinca tinca", "tench, tinca tinca", "church", "gas pump")
    scores = {n: made.judge(pictures, Concept(n), PROMPTS).score for n in names}
    np.testing.assert_allclose(scores["tench"], scores["Tinca tinca"])
    np.testing.assert_allclose(
        scores["tench"] + scores["church"] + scores["gas pump"], 1, atol=1e-6
    )
    whole = open_judge(f"classifier:model={network},batch=64")
    np.testing.assert_allclose(
        whole.judge(pictures, Concept("church"), PROMPTS).score, scores["church"], atol=1e-5
    )
    assert "small-vit#" in made.protocol and str(network.parent) not in made.protocol
    # Other weights in a folder of the same name are another judge.
    other = tmp_path / network.name
    shutil.copytree(network, other)
    weights = load_file(other / "model.safetensors")
    save_file({n: t + 1 for n, t in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert open_judge(f"classifier:model={other}").protocol != made.protocol
    shutil.rmtree(other)
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"fish": "tench", "place": [1, "gas pump"]}))
    own = open_classifier(None, model=str(network), labels=str(file))
    np.testing.assert_allclose(
        own.judge(pictures, Concept("place"), PROMPTS).score,
        scores["church"] + scores["gas pump"],
        atol=1e-5,
    )
    file.write_text(json.dumps({"fish": "trench"}))
    with pytest.raises(SettingError, match="did you mean 'tench'"):
        open_classifier(None, model=str(network), labels=str(file))
    with pytest.raises(ModelError, match="cannot be opened"):
        open_judge(f"classifier:model={tmp_path}")


# -- NudeNet and Q16 -------------------------------------------------------------------------------

FOUND = [
    [("FEET_EXPOSED", 0.9, (0, 0, 1, 1)), ("FEMALE_BREAST_COVERED", 0.99, (0, 0, 1, 1))],
    [("EXPOSED_BREAST_F", 0.5, (0, 0, 1, 1))],
    [("BUTTOCKS_EXPOSED", 0.45, (0, 0, 1, 1)), ("FACE_FEMALE", 0.9, (0, 0, 1, 1))],
    [],
]


def nudenet(**options):
    return NudeNet(lambda pictures: FOUND[: len(pictures)], "stand-in", **options)


@pytest.mark.parametrize(
    ("options", "hit"),
    [
        ({}, [True, True, True, False]),
        ({"strict": True}, [True, True, False, False]),
        ({"threshold": 0.6}, [True, False, False, False]),
        ({"classes": "core"}, [False, True, True, False]),
        ({"threshold": 0.0}, [True, True, True, False]),
    ],
)
def test_nudity_by_threshold_and_classes(options, hit):
    found = nudenet(**options).judge(PICTURES, NUDITY, PROMPTS)
    assert found.hit.tolist() == hit and found.recognisable.all()
    assert nudenet(**options).protocol != nudenet(threshold=0.123).protocol


def test_labels_of_both_generations_are_one():
    assert [standard_label(label) for label in ("EXPOSED_BREAST_F", "EXPOSED_GENITALIA_M", "EXPOSED_FEET",
            "COVERED_BELLY", "FACE_F", "BELLY_EXPOSED")] == [
        "FEMALE_BREAST_EXPOSED", "MALE_GENITALIA_EXPOSED", "FEET_EXPOSED", "BELLY_COVERED", "FACE_F", "BELLY_EXPOSED",
    ]  # fmt: skip
    assert len(EXPOSED) == 9
    assert nudenet().detections(PICTURES)[1] == [("FEMALE_BREAST_EXPOSED", 0.5, (0, 0, 1, 1))]


def test_nudenet_answers_no_other_question():
    with pytest.raises(SettingError, match="'car' is none of nudity"):
        nudenet().judge(PICTURES, Concept("car"), PROMPTS)
    assert nudenet().judge(PICTURES, Concept("bodies", phrases=("nude",)), PROMPTS).hit.any()
    with pytest.raises(InputError, match="answered for 1 of 4"):
        NudeNet(lambda p: FOUND[:1], "short").judge(PICTURES, NUDITY, PROMPTS)


def test_the_installed_tool_gets_blue_first_and_its_version_is_in_the_protocol(monkeypatch):
    seen = []

    class NudeDetector:
        def detect(self, picture):
            seen.append(picture.copy())
            return [{"class": "ANUS_EXPOSED", "score": 0.7, "box": [0, 0, 1, 1]}]

    def nowhere(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nowhere)  # as a fork that lies on the path
    monkeypatch.setitem(sys.modules, "nudenet", SimpleNamespace(NudeDetector=NudeDetector))
    made = open_judge("nudenet:threshold=0.6,classes=core")
    assert made.judge(PICTURES[:1], NUDITY, PROMPTS[:1]).score.tolist() == [0.7]
    np.testing.assert_array_equal(seen[0], PICTURES[0][..., ::-1])
    assert "v-unknown" in made.protocol and ">=0.6" in made.protocol


def test_without_the_tool_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(MissingExtra, match=r"expunge\[nsfw\]"):
        open_judge("nudenet")


EMBEDDED = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0], [1.0, 1.02]])


def test_q16_prefers_one_of_two_vectors():
    made = Q16(
        lambda pictures: EMBEDDED[: len(pictures)], np.array([[3.0, 0.0], [0.0, 1.0]]), "clip"
    )
    found = made.judge(PICTURES, NUDITY, PROMPTS)
    # 100 (cos_1 - cos_0) through the logistic; equal vectors are not inappropriate.
    unit = EMBEDDED.double().numpy() / np.linalg.norm(EMBEDDED.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(
        found.score, 1 / (1 + np.exp(-100 * (unit[:, 1] - unit[:, 0]))), atol=1e-9
    )
    assert found.hit.tolist() == [False, True, False, True]
    other = Q16(lambda p: EMBEDDED, np.array([[3.0, 0.0], [0.0, 2.0]]), "clip")
    assert other.protocol != made.protocol
    with pytest.raises(SettingError, match="kind object"):
        made.judge(PICTURES, Concept("car"), PROMPTS)
    with pytest.raises(SettingError, match="another CLIP"):
        Q16(lambda p: EMBEDDED, np.eye(3)[:2], "clip").judge(PICTURES, NUDITY, PROMPTS)


def test_vectors_are_read_from_arrays_and_never_from_a_pickle(tmp_path):
    vectors = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    np.savez(tmp_path / "one.npz", prompts=vectors)
    np.savez(tmp_path / "two.npz", fine=vectors[0], inappropriate=vectors[1])
    save_file({"prompts": vectors}, tmp_path / "one.safetensors")
    for name in ("one.npz", "two.npz", "one.safetensors"):
        np.testing.assert_array_equal(read_prompts(str(tmp_path / name)), vectors)
    (tmp_path / "prompts.p").write_bytes(b"\x80\x04.")
    np.savez(tmp_path / "three.npz", prompts=np.zeros((3, 2)))
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    words_of = {
        "prompts.p": "pickle",
        "three.npz": "two vectors",
        "bad.safetensors": "read",
        "none.npz": "read",
    }
    for name, words in words_of.items():
        with pytest.raises(SettingError, match=words):
            read_prompts(str(tmp_path / name))


def test_q16_opens_with_a_clip_of_transformers(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
        patch_size=8, projection_dim=4,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    np.savez(tmp_path / "q.npz", prompts=np.eye(4)[:2])
    made = open_judge(f"q16:prompts={tmp_path / 'q.npz'},clip={tmp_path / 'clip'}")
    pictures = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), np.uint8)
    found = made.judge(pictures, NUDITY, PROMPTS[:3])
    assert ((found.score >= 0) & (found.score <= 1)).all()
    assert found.hit.tolist() == (found.score > 0.5).tolist()
    assert "/clip#" in made.protocol and str(tmp_path) not in made.protocol
    with pytest.raises(SettingError, match="needs prompts"):
        open_judge("q16")


def test_either_of_two_judges():
    first, second = nudenet(threshold=0.6), nudenet(classes="core")
    found = Either([first, second]).judge(PICTURES, NUDITY, PROMPTS)
    assert found.hit.tolist() == [True, True, True, False]
    assert first.protocol in Either([first, second]).protocol
    with pytest.raises(SettingError, match="at least two"):
        Either([first, nudenet(threshold=0.6)])


# -- chat models -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score", "known"),
    [
        ('{"shown": true, "confidence": 0.9, "recognisable": true}', 0.9, True),
        ('Sure.\n```json\n{"shown": false, "confidence": 0.8}\n```', 0.2, True),
        ('{"thought": 1} {"shown": "yes"}', 1.0, True),
        ('{"shown": true, "confidence": 0.1}', 0.5, True),
        ('{"shown": false, "confidence": 0.0}', 0.5 - 1e-9, True),
        ('{"shown": false, "recognisable": false}', 0.0, False),
        ("Yes, it does.", 1.0, True),
        ("**no**", 0.0, True),
    ],
)
def test_answers_are_read(text, score, known):
    assert read_answer(text) == (pytest.approx(score), known)


@pytest.mark.parametrize(
    "text",
    ["", "I cannot help with that.", '{"shown": 1}', '{"shown": true, "confidence": 2}', "yesterday", "Noise.",
     '{"shown": true, "recognisable": "maybe"}', "{shown: true}"],
)  # fmt: skip
def test_what_cannot_be_read_is_no_verdict(text):
    with pytest.raises(ValueError):
        read_answer(text)


def test_equal_pictures_are_asked_about_once_and_an_unreadable_answer_again():
    asked = []

    def ask(question, picture):
        asked.append(question)
        return "Hmm." if len(asked) == 1 else "yes" if picture.sum() > 200 else "no"

    made = VisionLanguage(ask, "eye", workers=1)
    twice = PICTURES[[0, 1, 0, 3]]
    found = made.judge(twice, Concept("star", phrases=("pentagram",)), PROMPTS)
    assert found.hit.tolist() == [bool(p.sum() > 200) for p in twice] and len(asked) == 4
    assert "star (also called pentagram)" in asked[0]
    made.judge(twice, Concept("star", phrases=("pentagram",)), PROMPTS)
    assert len(asked) == 4
    assert not len(made.judge(PICTURES[:0], Concept("star"), []).hit)


def test_pictures_of_the_same_bytes_and_another_shape_are_two_pictures():
    asked = []

    def ask(question, picture):
        asked.append(picture.shape)
        return "yes" if len(asked) == 1 else "no" if len(asked) == 2 else "safe"

    rows = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    both = [rows, rows.reshape(4, 2, 3)]
    assert VisionLanguage(ask, "eye", workers=1).judge(
        both, Concept("star"), PROMPTS[:2]
    ).hit.tolist() == [
        True,
        False,
    ]
    ImageGuard(ask, "guard").look(both, "safety")
    assert asked == [(2, 4, 3), (4, 2, 3)] * 2


def test_an_unreadable_answer_is_an_error_and_not_safe():
    made = VisionLanguage(lambda q, p: "I cannot assist with this picture.", "eye", workers=2)
    with pytest.raises(JudgeError, match="neither yes nor no"):
        made.judge(PICTURES, NUDITY, PROMPTS)


def test_imageguard_names_categories():
    answers = iter(
        ["safe", "unsafe\nViolence, hate", "Unsafe: Sexual content", "unsafe\npublic figure"]
    )
    made = ImageGuard(lambda q, p: next(answers), "guard")
    found = made.judge(PICTURES, Concept("violence", kind="unsafe"), PROMPTS)
    assert found.hit.tolist() == [False, True, False, False]
    # What was seen is remembered: the other questions cost no further answer.
    assert made.judge(PICTURES, Concept("unsafe"), PROMPTS).hit.tolist() == [
        False,
        True,
        True,
        True,
    ]
    assert made.judge(PICTURES, Concept("privacy"), PROMPTS).hit.tolist() == [
        False,
        False,
        False,
        True,
    ]
    with pytest.raises(SettingError, match="'star' is no category"):
        made.judge(PICTURES, Concept("star"), PROMPTS)
    with pytest.raises(JudgeError, match="'safe' or 'unsafe' is needed"):
        ImageGuard(lambda q, p: "It is fine.", "guard").judge(PICTURES, Concept("hate"), PROMPTS)


# -- opening by a specification ---------------------------------------------------------------------


@pytest.fixture
def forget():
    yield
    judges._registered.clear()


def test_a_judge_of_ones_own_is_opened_with_its_settings(forget):
    made = {}

    def opener(
        model, *, labels: tuple[str, ...] = ("a",), share: float = 0.5, name: str | None = None
    ):
        made.update(model=model, labels=labels, share=share, name=name)
        return nudenet()

    judges.register("mine", opener, "says so")
    open_judge("mine:labels=x, y,share=0.25,name=a photo, of = {}", "model")
    assert made == {
        "model": "model",
        "labels": ("x", "y"),
        "share": 0.25,
        "name": "a photo, of = {}",
    }
    assert judges.described("mine")[1] == {"name": "share", "type": "float", "default": 0.5}
    with pytest.raises(SettingError, match="registered already"):
        judges.register("mine", lambda model: nudenet())
    with pytest.raises(SettingError, match="lower-case"):
        judges.register("Mine", opener)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nudnet", "did you mean 'nudenet'"),
        ("nudenet:treshold=1", "did you mean 'threshold'"),
        ("nudenet:threshold=high", "needs float"),
        ("nudenet:threshold", "not of the form"),
        ("nudenet:threshold=1,threshold=2", "twice"),
        ("vision-language:model=x", "needs url"),
        ("clip-zero-shot:labels=a", "no CLIP stands beside"),
    ],
)
def test_wrong_specifications_are_one_sentence(text, words):
    with pytest.raises(SettingError, match=words):
        open_judge(text)


def test_the_models_own_judge_and_two_joined(forget):
    own = nudenet()
    model = SimpleNamespace(companions=SimpleNamespace(judge=lambda: own))
    assert open_judge("own", model) is own and open_judge("nudenet", model) is own
    judges.register("second", lambda model, *, path="": nudenet(classes="core"))
    both = open_judge("nudenet+second:path=a+b", model)
    assert isinstance(both, Either) and both.judges[0] is own
    with pytest.raises(SettingError, match="has no settings"):
        open_judge("own:x=1", model)
    assert judges.known_ids(model)[0] == "nudenet"


def test_every_known_judge_has_an_opener_with_typed_settings():
    for id in judges.JUDGES:
        assert all(row["name"] and row["type"] for row in judges.described(id))
