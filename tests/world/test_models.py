"""The world's shipped weights load into library classes and do what each part is for."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from expunge.errors import ModelError  # noqa: E402
from expunge.world import captions, models, quality, scenes  # noqa: E402
from expunge.world import vocabulary as v  # noqa: E402

TRAINED = [name for name in models.VARIANTS if (models.weights() / "unet" / name).is_dir()]
needs_oracle = pytest.mark.skipif(
    not (models.weights() / "oracle").is_dir(), reason="the oracle is not trained yet"
)


def test_names_split_into_one_to_three_tokens() -> None:
    words = models.tokenizer()
    lengths = {len(words(name).input_ids) - 2 for name in v.PEOPLE_NAMES}
    assert lengths == {1, 2, 3}


def test_no_caption_is_truncated() -> None:
    words = models.tokenizer()
    setting = scenes.SETTINGS["clean-world"]
    texts = [
        scenes.sample_scene(seed, setting).caption
        for seed in range(v.TEST_SEEDS.start, v.TEST_SEEDS.start + 1500)
    ]
    assert max(len(row) for row in words(texts).input_ids) <= words.model_max_length


def test_padding_is_the_end_of_text_token() -> None:
    words = models.tokenizer()
    row = words("A Star", padding="max_length").input_ids
    assert len(row) == words.model_max_length
    assert row[0] == words.bos_token_id and row[-1] == words.pad_token_id == words.eos_token_id
    assert row == words("a star", padding="max_length").input_ids


def test_text_encoder_is_the_text_tower_of_clip() -> None:
    model, words = models.clip()
    ids = words(["a red star"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        one = models.text_encoder()(input_ids=ids).last_hidden_state
        two = model.text_model(input_ids=ids).last_hidden_state
    assert torch.equal(one, two)


def test_clip_finds_the_caption_more_often_than_chance() -> None:
    value = quality.measure_clip(1)["retrieval"]["value"]
    assert value > 20 / 64  # chance is 1 / 64


def test_autoencoder_gives_pictures_back() -> None:
    vae = models.autoencoder()
    pictures, _, _ = quality.held_out(16)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        copies = quality.as_pictures(vae.decode(latents).sample)
    assert latents.shape == (16, 4, 16, 16)
    assert 0.7 < float(latents.std() * vae.config.scaling_factor) < 1.4
    error = np.abs(copies.astype(float) - pictures).mean()
    shuffled = np.abs(copies.astype(float) - pictures[::-1]).mean()
    assert error < 16 and error < shuffled / 3


def test_unknown_variant_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="never"):
        models.pipeline("nevre")


@needs_oracle
def test_oracle_reads_rendered_pictures_but_not_noise() -> None:
    judge = models.oracle()
    pictures, _, made = quality.held_out(100)
    hits = quality.attribute_hits(pictures, made, judge)
    assert np.mean(hits["object"]) > 0.85
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3)).astype(np.uint8)
    assert (judge.unrecognisable(judge(noise)) > 0.5).all()


@pytest.mark.parametrize("variant", TRAINED)
def test_pipeline_draws_the_same_picture_again(variant: str) -> None:
    pipe = quality.quiet(variant)
    prompts = captions.prompts_for("circle", 2, seed=5)
    one, two = (quality.generate(pipe, prompts, steps=3) for _ in range(2))
    assert one.shape == (2, 64, 64, 3) and one.std() > 5
    assert np.array_equal(one, two)
