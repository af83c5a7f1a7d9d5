"""How far rows of texts have moved: shares of their norm, group by group."""

import pytest
import torch

from expunge.core.text_drift import TextDrift, filled
from expunge.testing import tiny_diffusion


def test_templates_and_names_go_together():
    assert filled(("a {}", "the {}"), ["star"]) == ["a star", "the star"]
    assert filled(("a {}",), ["star", "moon"]) == ["a star", "a moon"]
    assert filled(("a {}",), []) == []


def test_a_shift_of_all_rows_is_a_share_of_their_norm():
    model = tiny_diffusion()
    drift = TextDrift(model, {"concept": ["a star"], "bare": [""], "kept": ["a heart", "a circle"]})
    assert set(drift.texts) == {"concept", "kept"}
    drift.measure()
    rows = model.encode(["a star"]).embeddings
    with torch.no_grad():
        model.tensor("text_encoder.final_layer_norm.bias").add_(0.5)
    drift.measure()
    wanted = 0.5 * rows.numel() ** 0.5 / float(rows.norm())
    assert drift.values["concept"] == pytest.approx([0.0, wanted], rel=1e-5)
    other = TextDrift(model, {"concept": ["a star"], "kept": ["a heart", "a circle"]})
    other.restore(drift.state())
    assert other.values == drift.values
