"""CLIP score on a small random CLIP: scale, protocol, batches, and the shape of inputs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from expunge.concept import Concept
from expunge.errors import InputError, ProtocolError, SettingError
from expunge.measure.clip_score import SCALES, ClipScore, ClipZeroShot
from expunge.method import Prompt


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(
        self, texts: list[str], max_length: int, **options: object
    ) -> dict[str, torch.Tensor]:
        rows = [[1, *(3 + ord(c) % 26 for c in t)][: max_length - 1] + [2] for t in texts]
        ids = [row + [2] * (max_length - len(row)) for row in rows]
        return {"input_ids": torch.tensor(ids)}


@pytest.fixture(scope="module")
def clip() -> CLIPModel:
    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        **small,
        "vocab_size": 40,
        "max_position_embeddings": 12,
        "eos_token_id": 2,
        "bos_token_id": 1,
    }
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(
        text_config={**text, "pad_token_id": 2}, vision_config=vision, projection_dim=8
    )
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        return CLIPModel(config).eval()


PICTURES = np.random.default_rng(0).integers(0, 255, (6, 16, 16, 3), np.uint8)
PROMPTS = [Prompt(text, i) for i, text in enumerate(["a", "bb", "a", "ccc", "d", "ee"])]


def test_scores_are_hundred_times_the_cosine(clip: CLIPModel) -> None:
    score = ClipScore(clip, Letters(), "small")
    values = score.scores(PICTURES, PROMPTS)
    with torch.no_grad():
        pixels = torch.from_numpy(PICTURES).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (score.mean, score.std))
        ids = Letters()([p.text for p in PROMPTS], max_length=12)["input_ids"]
        made = clip(input_ids=ids, pixel_values=(pixels - mean) / std)
    expected = 100 * (made.image_embeds * made.text_embeds).sum(-1).numpy()
    np.testing.assert_allclose(values, expected, atol=1e-3)
    assert np.abs(values).max() <= 100 and np.ptp(values) > 0


def test_batches_and_streaming_change_nothing(clip: CLIPModel) -> None:
    score = ClipScore(clip, Letters(), "small")
    np.testing.assert_allclose(
        score.scores(PICTURES, PROMPTS, batch=2), score.scores(PICTURES, PROMPTS), atol=1e-3
    )
    score.update(PICTURES[:2], PROMPTS[:2])
    score.update(PICTURES[2:], PROMPTS[2:])
    found = score.compute()
    assert found.value == pytest.approx(score.scores(PICTURES, PROMPTS).mean(), abs=1e-3)
    assert found.n == 5  # prompts, not pictures
    left, right = ClipScore(clip, Letters(), "small"), ClipScore(clip, Letters(), "small")
    left.update(PICTURES[:4], PROMPTS[:4])
    right.update(PICTURES[4:], PROMPTS[4:])
    assert left.merge(right).compute().value == pytest.approx(found.value, abs=1e-3)
    with pytest.raises(ProtocolError):
        left.merge(ClipScore(clip, Letters(), "small", scale="cosine"))
    assert found.interval[0] <= found.value <= found.interval[1]


def test_another_size_is_resized_and_another_model_is_not_compared(clip: CLIPModel) -> None:
    score = ClipScore(clip, Letters(), "small")
    large = PICTURES.repeat(2, axis=1).repeat(2, axis=2)
    assert np.isfinite(score.scores(large, PROMPTS)).all()
    score.update(PICTURES, PROMPTS)
    other = ClipScore(
        clip, Letters(), "other", SimpleNamespace(image_mean=(0, 0, 0), image_std=(1, 1, 1))
    )
    other.update(PICTURES, PROMPTS)
    assert other.compute().value != pytest.approx(score.compute().value, abs=1e-6)
    with pytest.raises(ProtocolError):
        score.compute().minus(other.compute())
    assert ClipScore(clip, Letters(), "empty").compute().value is None


def test_zero_shot_classes_are_the_softmax_of_the_scores(clip: CLIPModel) -> None:
    score = ClipScore(clip, Letters(), "small")
    judge = ClipZeroShot(score, ("woman", "man", "cat"), "a {}")
    found = {name: judge.judge(PICTURES, Concept(name), PROMPTS) for name in judge.labels}
    table = np.stack(
        [score.scores(PICTURES, [Prompt(f"a {name}")] * 6) for name in judge.labels], axis=1
    )
    np.testing.assert_allclose(
        score.table(PICTURES, [f"a {n}" for n in judge.labels]), table, atol=1e-3
    )
    shares = np.stack([verdict.score for verdict in found.values()], axis=1)
    np.testing.assert_allclose(
        shares, np.exp(table) / np.exp(table).sum(axis=1, keepdims=True), atol=1e-3
    )
    assert (shares.argmax(axis=1) == table.argmax(axis=1)).all()
    assert all((v.hit == (v.score >= 0.5)).all() and v.recognisable.all() for v in found.values())
    assert "woman|man|cat" in judge.protocol and score.protocol in judge.protocol
    assert not len(judge.judge(PICTURES[:0], Concept("man"), []).hit)
    with pytest.raises(SettingError, match="woman"):
        judge.judge(PICTURES, Concept("women"), PROMPTS)
    with pytest.raises(SettingError, match="two"):
        ClipZeroShot(score, ("woman", "woman"))
    with pytest.raises(SettingError, match="each of them once"):
        ClipZeroShot(score, ("woman", "woman", "man"))


def test_the_three_scales_of_one_score(clip: CLIPModel) -> None:
    opposed = copy.deepcopy(clip)
    with torch.no_grad():
        opposed.text_projection.weight.neg_()
    for model, sign in ((clip, 1), (opposed, -1)):
        hundred, plain, clipped = (ClipScore(model, Letters(), "small", scale=s) for s in SCALES)
        cosines = plain.scores(PICTURES, PROMPTS)
        assert (sign * cosines > 0).all()
        np.testing.assert_allclose(hundred.scores(PICTURES, PROMPTS), 100 * cosines, atol=1e-4)
        expected = 2.5 * np.maximum(cosines, 0)
        np.testing.assert_allclose(clipped.scores(PICTURES, PROMPTS), expected, atol=1e-5)
    for score in (hundred, plain, clipped):
        score.update(PICTURES, PROMPTS)
    for one, two in ((hundred, plain), (hundred, clipped), (plain, clipped)):
        with pytest.raises(ProtocolError):
            one.compute().minus(two.compute())
    with pytest.raises(SettingError, match="cosine"):
        ClipScore(clip, Letters(), "small", scale="cosin")


def test_a_prefix_is_part_of_the_text_and_of_the_id(clip: CLIPModel) -> None:
    plain, prefixed = (
        ClipScore(clip, Letters(), "small"),
        ClipScore(clip, Letters(), "small", prefix="zz "),
    )
    longer = [Prompt("zz " + prompt.text) for prompt in PROMPTS]
    np.testing.assert_allclose(
        prefixed.scores(PICTURES, PROMPTS), plain.scores(PICTURES, longer), atol=1e-4
    )
    assert prefixed.protocol == "clip-score/100-cosine/small/prefix='zz '"


def test_embeddings_come_with_the_scores(clip: CLIPModel) -> None:
    score = ClipScore(clip, Letters(), "small")
    values, rows = score.scored(PICTURES, PROMPTS)
    np.testing.assert_array_equal(values, score.scores(PICTURES, PROMPTS))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)


def test_accuracy_and_error_rate_are_of_target_against_anchor(clip: CLIPModel) -> None:
    score = ClipScore(clip, Letters(), "small")
    table = score.table(PICTURES, ["dog", "cat"])
    expected = (table[:, 0] > table[:, 1]).mean()
    accuracy = score.accuracy(PICTURES, "dog", "cat", PROMPTS)
    error = score.error_rate(PICTURES, "dog", "cat", PROMPTS)
    assert accuracy.value == pytest.approx(expected)
    assert error.value == pytest.approx(1 - expected) and accuracy.n == 5
    with pytest.raises(ProtocolError):
        accuracy.minus(error)
    with pytest.raises(ProtocolError):
        accuracy.minus(score.accuracy(PICTURES, "dog", "animal", PROMPTS))
    each = score.accuracy(PICTURES, ["dog"] * 6, ["cat"] * 6, PROMPTS)
    assert each.value == accuracy.value
    # A tie goes to the anchor.
    assert score.accuracy(PICTURES, "dog", "dog", PROMPTS).value == 0
    # Where both scores are clipped to 0, neither is closer: the scale is part of the id.
    opposed = copy.deepcopy(clip)
    with torch.no_grad():
        opposed.text_projection.weight.neg_()
    clipped = ClipScore(opposed, Letters(), "small", scale="2.5-clipped")
    both = np.maximum(-table, 0)
    assert (both == 0).all(1).any()
    assert clipped.accuracy(PICTURES, "dog", "cat", PROMPTS).value == pytest.approx(
        (both[:, 0] > both[:, 1]).mean()
    )
    for wrong in (["dog"] * 5, []):
        with pytest.raises(InputError, match="texts"):
            score.accuracy(PICTURES, wrong, "cat", PROMPTS)
    with pytest.raises(InputError, match="one each"):
        score.accuracy(PICTURES, "dog", "cat", PROMPTS[:3])


def test_maces_accuracy_is_a_mean_probability(clip: CLIPModel) -> None:
    score = ClipScore(clip, Letters(), "small")
    objects = ("cat", "dog", "ship")
    table = score.table(PICTURES, [f"a photo of the {name}" for name in objects])
    shares = np.exp(table) / np.exp(table).sum(1, keepdims=True)
    found = {name: score.probability(PICTURES, name, objects, PROMPTS) for name in objects}
    for place, name in enumerate(objects):
        assert found[name].value == pytest.approx(shares[:, place].mean(), abs=1e-4)
    assert sum(one.value for one in found.values()) == pytest.approx(1, abs=1e-6)
    assert found["cat"].value != pytest.approx((shares.argmax(1) == 0).mean(), abs=1e-3)
    with pytest.raises(InputError, match="cat"):
        score.probability(PICTURES, "cats", objects, PROMPTS)
    other = score.probability(PICTURES, "cat", ("cat", "dog"), PROMPTS)
    with pytest.raises(ProtocolError):
        found["cat"].minus(other)


def test_the_middle_is_cut_out_of_what_is_not_square(clip: CLIPModel) -> None:
    score = ClipScore(clip, Letters(), "small")
    wide = np.pad(PICTURES, ((0, 0), (0, 0), (8, 8), (0, 0)))
    np.testing.assert_allclose(
        score.scores(wide, PROMPTS), score.scores(PICTURES, PROMPTS), atol=1e-4
    )


@pytest.mark.parametrize(("pictures", "prompts"), [(1, 3), (3, 1), (0, 0)])
def test_one_picture_is_not_scored_with_every_prompt(
    clip: CLIPModel, pictures: int, prompts: int
) -> None:
    with pytest.raises(InputError, match=f"CLIP score: {pictures} pictures and {prompts} prompts"):
        ClipScore(clip, Letters(), "small").scores(PICTURES[:pictures], PROMPTS[:prompts])


@pytest.mark.parametrize(
    "pictures", [PICTURES / 255, PICTURES[..., :1], PICTURES[..., 0]], ids=["float", "grey", "flat"]
)
def test_only_coloured_bytes_are_pictures(clip: CLIPModel, pictures: np.ndarray) -> None:
    # Values from 0 to 1 were once scaled down again, so that a score of black pictures came out.
    with pytest.raises(InputError, match="must be uint8"):
        ClipScore(clip, Letters(), "small").scores(pictures, PROMPTS)
