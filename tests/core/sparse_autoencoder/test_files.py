"""Folders of ours and of SAELens: round trips, older forms, damage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge.core.sparse_autoencoder import (
    SparseAutoencoder,
    fit,
    load_sae_lens,
    quality,
    save_sae_lens,
)
from expunge.errors import EditFormatError, MissingPart, NonFiniteError, SettingError

from .helpers import VARIANTS, normal, scrambled

X = normal(30, 6) * 3


def measured(**changes: Any) -> SparseAutoencoder:
    model = scrambled(**changes)
    model.scale.fill_(0.4 if changes.get("normalise", "mean-square") == "mean-square" else 1.0)
    model.quality = quality(model, X)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_folder_of_ours_is_read_as_it_was(variant: str, tmp_path: Path) -> None:
    model = measured(variant=variant, normalise="mean-square", site="text.layers.8")
    assert model.save(tmp_path) == tmp_path
    found = SparseAutoencoder.load(tmp_path)
    assert found.config == model.config and found.config.site == "text.layers.8"
    assert found.quality == model.quality
    own = found.state_dict()
    assert all(torch.equal(v, own[n]) for n, v in model.state_dict().items())
    assert torch.equal(found(X), model(X))
    said = json.loads((tmp_path / "autoencoder.json").read_text())
    assert said["scale"] == pytest.approx(0.4) and said["settings"]["variant"] == variant
    assert said["theta"] == (pytest.approx(0.4) if model.config.sparse else None)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "autoencoder.json",
        "autoencoder.safetensors",
    ]


def test_archetypal_and_bfloat16_are_stored_as_they_are(tmp_path: Path) -> None:
    model = measured(dictionary="relaxed-archetypal").half_encoder()
    model.save(tmp_path)
    found = SparseAutoencoder.load(tmp_path)
    assert found.encoder.dtype == torch.bfloat16
    assert torch.equal(found.dictionary(), model.dictionary()) and torch.equal(found(X), model(X))


def test_what_fit_gives_can_be_saved(tmp_path: Path) -> None:
    from .helpers import config

    model = fit(X, config(), seed=0, held_out=X)
    found = SparseAutoencoder.load(model.save(tmp_path))
    assert found.quality == model.quality and found.trained == model.trained


def test_nothing_is_saved_without_a_quality_table(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no quality table"):
        scrambled().save(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damage_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(EditFormatError, match=r"autoencoder\.json is missing"):
        SparseAutoencoder.load(tmp_path)
    measured().save(tmp_path)
    weights, text = tmp_path / "autoencoder.safetensors", tmp_path / "autoencoder.json"
    plain = load_file(weights)
    save_file({**plain, "offset": plain["offset"] + 1}, weights)
    with pytest.raises(EditFormatError, match="does not agree with its digest"):
        SparseAutoencoder.load(tmp_path)
    save_file({**plain, "offset": plain["offset"] / 0}, weights)
    with pytest.raises(NonFiniteError, match="'offset'"):
        SparseAutoencoder.load(tmp_path)
    weights.write_bytes(b"x")
    with pytest.raises(EditFormatError, match="missing or damaged"):
        SparseAutoencoder.load(tmp_path)
    for broken, said in (
        ("{", "not valid JSON"),
        ("[]", "one mapping"),
        ('{"format": 9}', "format 9"),
    ):
        text.write_text(broken)
        with pytest.raises(EditFormatError, match=said):
            SparseAutoencoder.load(tmp_path)


# -- SAELens ---------------------------------------------------------------------------------------


def theirs(folder: Path, x: torch.Tensor) -> torch.Tensor:
    """What SAELens computes from its folder, written down from its documentation."""
    cfg, t = (
        json.loads((folder / "cfg.json").read_text()),
        load_file(folder / "sae_weights.safetensors"),
    )
    if cfg["normalize_activations"] == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = (x - mean).std(-1, keepdim=True)
        seen = (x - mean) / (std + 1e-5)
    else:
        assert cfg["normalize_activations"] == "none"
        seen = x
    u = (seen - t["b_dec"] * cfg["apply_b_dec_to_input"]) @ t["W_enc"] + t["b_enc"]
    if cfg["architecture"] == "topk":
        assert cfg["rescale_acts_by_decoder_norm"] is False
        best = u.topk(cfg["k"], -1)
        z = torch.zeros_like(u).scatter(-1, best.indices, best.values.relu())
    else:
        z = u.relu() * (u > t["threshold"]) if cfg["architecture"] == "jumprelu" else u.relu()
    made = z @ t["W_dec"] + t["b_dec"]
    return made * (std + 0) + mean if cfg["normalize_activations"] == "layer_norm" else made


CASES = {
    **{variant: ({"variant": variant, "normalise": "mean-square"}, arch) for variant, arch in zip(
        VARIANTS, ("standard", "topk", "jumprelu", "jumprelu", "topk"), strict=True)},
    "without pre-bias": ({"pre_bias": False, "normalise": "mean-square"}, "topk"),
    "rescaled": ({"dictionary": "free", "rescale_by_norm": True, "normalise": "mean-square"}, "topk"),
    "normalised": ({"dictionary": "normalised"}, "topk"),
    "archetypal": ({"dictionary": "relaxed-archetypal"}, "topk"),
    "learned threshold": ({"threshold_inference": True}, "jumprelu"),
    "layer norm": ({"normalise": "layer-norm"}, "topk"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_sae_lens_folder_computes_what_ours_does(case: str, tmp_path: Path) -> None:
    changes, architecture = CASES[case]
    model = measured(**changes)
    assert (
        save_sae_lens(model, tmp_path, hook_name="blocks.3.hook_mlp_out", model_name="m")
        == tmp_path
    )
    cfg, tensors = (
        json.loads((tmp_path / "cfg.json").read_text()),
        load_file(tmp_path / "sae_weights.safetensors"),
    )
    assert (cfg["architecture"], cfg["d_in"], cfg["d_sae"]) == (architecture, 6, 12)
    assert cfg["metadata"]["hook_name"] == "blocks.3.hook_mlp_out"
    assert tensors["W_enc"].shape == (6, 12) and tensors["W_dec"].shape == (12, 6)
    assert ("threshold" in tensors) == (architecture == "jumprelu")
    torch.testing.assert_close(theirs(tmp_path, X), model(X), rtol=1e-4, atol=1e-4)
    for found in (load_sae_lens(tmp_path), SparseAutoencoder.load(tmp_path)):
        torch.testing.assert_close(found(X), model(X), rtol=1e-4, atol=1e-4)
        assert found.quality == model.quality and found.config.site == "blocks.3.hook_mlp_out"
        assert torch.equal(found.encode(X) > 0, model.encode(X) > 0)


def test_a_threshold_that_is_not_calibrated_is_not_written(tmp_path: Path) -> None:
    model = scrambled(variant="batch-topk")
    model.theta.fill_(-1.0)
    with pytest.raises(SettingError, match="not calibrated"):
        save_sae_lens(model, tmp_path)


def lens(folder: Path, cfg: dict[str, Any], **changes: Any) -> Path:
    """A folder as SAELens writes it, with changes; ``None`` takes a tensor away."""
    tensors = {
        "W_enc": normal(6, 12),
        "b_enc": normal(12),
        "W_dec": normal(12, 6),
        "b_dec": normal(6),
    }
    tensors = {n: t for n, t in {**tensors, **changes}.items() if t is not None}
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps({"d_in": 6, "d_sae": 12, **cfg}))
    return folder


def test_older_folders_are_read(tmp_path: Path) -> None:
    made = load_sae_lens(lens(tmp_path, {"activation_fn_str": "relu", "hook_point": "blocks.1"}))
    assert (made.config.variant, made.config.pre_bias, made.config.site) == (
        "vanilla",
        True,
        "blocks.1",
    )
    old = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "apply_b_dec_to_input": False,
    }
    made = load_sae_lens(
        lens(tmp_path, {**old, "normalize_activations": False}, scaling_factor=torch.ones(12))
    )
    assert (made.config.variant, made.config.kept, made.config.pre_bias) == ("topk", 4, False)
    made = load_sae_lens(lens(tmp_path, {"architecture": "jumprelu"}, log_threshold=normal(12)))
    torch.testing.assert_close(made.thresholds(), normal(12).exp())
    made = load_sae_lens(lens(tmp_path, {"architecture": "jumprelu"}, threshold=normal(12)))
    torch.testing.assert_close(made.thresholds(), normal(12).relu())  # SAELens never goes below 0
    batch = {"architecture": "batchtopk", "k": 3.0, "rescale_acts_by_decoder_norm": True}
    made = load_sae_lens(
        lens(tmp_path, batch, topk_threshold=torch.tensor(0.5, dtype=torch.double))
    )
    assert made.config.rescale_by_norm and float(made.theta) == 0.5
    half = {"architecture": "topk", "k": 2, "normalize_activations": "constant_norm_rescale"}
    made = load_sae_lens(lens(tmp_path, half, W_enc=normal(6, 12).bfloat16()))
    assert made.encoder.dtype == torch.float32 and made.config.normalise == "row-norm"


def test_a_factor_that_was_not_stored_must_be_given(tmp_path: Path) -> None:
    lens(tmp_path, {"normalize_activations": "expected_average_only_in"})
    with pytest.raises(SettingError, match="give it as activation_scale"):
        load_sae_lens(tmp_path)
    plain = load_sae_lens(tmp_path, activation_scale=1.0)
    scaled = load_sae_lens(tmp_path, activation_scale=0.5)
    torch.testing.assert_close(scaled(2 * X), 2 * plain(X))


@pytest.mark.parametrize(
    ("cfg", "changes", "error", "said"),
    [
        ({"architecture": "gated"}, {}, SettingError, "architecture 'gated'"),
        ({"architecture": "topk"}, {}, EditFormatError, "lacks d_in, d_sae or k"),
        ({"normalize_activations": "batch"}, {}, SettingError, "normalize_activations is 'batch'"),
        ({}, {"b_enc": None}, MissingPart, "'b_enc' differs"),
        ({}, {"extra": normal(3)}, MissingPart, "'extra' differs"),
        ({}, {"W_enc": normal(12, 6)}, EditFormatError, r"W_enc has shape \(12, 6\)"),
        ({}, {"scaling_factor": 2 * torch.ones(12)}, SettingError, "finetuning factors"),
    ],
)
def test_what_is_not_read_is_named(
    cfg: dict, changes: dict, error: type, said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        load_sae_lens(lens(tmp_path, cfg, **changes))
