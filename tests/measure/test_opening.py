"""CLIPs and vision models from folders: the same numbers as the opened model, under the folder's name."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, ResNetConfig, ResNetModel, ViTConfig, ViTModel

from expunge.core.features import clip_features, open_features, vision_features
from expunge.core.vision import model_name
from expunge.errors import ModelError
from expunge.measure.clip_score import ClipScore, open_clip_score
from expunge.method import Prompt
from expunge.world.adapter import companions, world_pictures

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

VIT = ViTConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
RESNET = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The world's CLIP as a library folder, with the pixels it was trained on."""
    place = tmp_path_factory.mktemp("models") / "small-clip"
    own = companions().clip()
    own.model.save_pretrained(place)
    own.tokenizer.save_pretrained(place)
    (place / "preprocessor_config.json").write_text(json.dumps(HALF))
    return place


def test_a_clip_in_a_folder_scores_as_the_opened_one(folder) -> None:
    own, opened = companions().clip(), open_clip_score(str(folder))
    assert re.fullmatch("clip-score/100-cosine/small-clip#[0-9a-f]{8}", opened.protocol)
    found = world_pictures("heart", 5)
    prompts = [Prompt(text) for text in found.captions]
    np.testing.assert_allclose(
        opened.scores(found.pictures, prompts), own.scores(found.pictures, prompts), atol=1e-3
    )
    # Without the file, CLIP's usual pixels are taken.
    (folder / "preprocessor_config.json").unlink()
    try:
        plain = open_clip_score(str(folder)).scores(found.pictures, prompts)
    finally:
        (folder / "preprocessor_config.json").write_text(json.dumps(HALF))
    usual = ClipScore(own.model, own.tokenizer, "usual").scores(found.pictures, prompts)
    np.testing.assert_allclose(plain, usual, atol=1e-3)


def test_two_folders_of_one_name_are_not_the_same_model(tmp_path) -> None:
    names = set()
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.random.manual_seed(seed)
            ViTModel(VIT).save_pretrained(tmp_path / str(seed) / "vit")
        names.add(open_features(str(tmp_path / str(seed) / "vit")).name)
    assert len(names) == 2
    assert model_name("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"


def test_features_of_folders_are_those_of_their_models(folder, tmp_path) -> None:
    pictures = world_pictures("moon", 4).pictures
    own = companions().clip()
    features = open_features(str(folder))
    assert features.name.startswith("small-clip#")
    expected = clip_features(own.model, "x", SimpleNamespace(**HALF))
    np.testing.assert_allclose(features(pictures), expected(pictures), atol=1e-4)
    with torch.random.fork_rng():
        torch.random.manual_seed(0)
        models = {"vit": ViTModel(VIT), "resnet": ResNetModel(RESNET)}
    for name, model in models.items():
        model.eval().save_pretrained(tmp_path / name)
        opened = open_features(str(tmp_path / name))
        assert opened.name.startswith(f"{name}#")
        np.testing.assert_allclose(
            opened(pictures), vision_features(model, name)(pictures), atol=1e-4
        )


def test_what_is_no_vision_model_is_refused_in_words(tmp_path) -> None:
    with torch.random.fork_rng():
        words = BertModel(
            BertConfig(
                vocab_size=9,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=8,
            )
        )
    words.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="reads no pictures"):
        open_features(str(tmp_path / "bert"))
    for opener in (open_features, open_clip_score):
        with pytest.raises(ModelError, match="nothing-here"):
            opener(str(tmp_path / "nothing-here"))
