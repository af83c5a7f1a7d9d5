"""CLIP score on a small random CLIP: scale, protocol, batches, and the shape of inputs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from expunge.concept import Concept
from expunge.errors import ProtocolError, SettingError
from expunge.measure.clip_score import ClipScore, ClipZeroShot
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
