"""Choices of layers: what each holds in every layout."""

import pytest
import torch
from torch import nn

from expunge.core.layer_choice import LAYERS, trainable
from expunge.errors import MissingPart, SettingError
from expunge.testing import tiny_diffusion, tiny_layout

LAYOUTS = ("sd", "sdxl", "pixart", "sana", "sd3", "flux")


def opened(name):
    return tiny_diffusion() if name == "sd" else tiny_layout(name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_choices_split_the_linear_and_convolution_modules(name):
    model = opened(name)
    chosen = {layers: {n for n, _ in trainable(model, layers)} for layers in LAYERS}
    inside, outside = chosen["cross-attention"], chosen["other"]
    assert inside and outside and inside.isdisjoint(outside)
    assert inside | outside == chosen["all"]
    assert chosen["cross-attention-kv"] < inside
    assert inside <= chosen["attention"] < chosen["all"] <= chosen["full"]
    part = model.layout.part
    assert chosen["full"] == {n for n in model.tensors() if n.startswith(f"{part}.")}
    norms = {
        id(p)
        for m in model.denoiser.modules()
        if not isinstance(m, (nn.Linear, nn.Conv2d))
        for p in m.parameters(recurse=False)
    }
    assert not any(id(p) in norms for layers in LAYERS[:-1] for _, p in trainable(model, layers))


@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_and_values_are_those_of_every_layer_that_takes_text(name):
    model = opened(name)
    names = {n for n, _ in trainable(model, "cross-attention-kv") if n.endswith(".weight")}
    kinds = {n.split(".")[-2] for n in names}
    joint = name in ("sd3", "flux")
    assert kinds == ({"add_k_proj", "add_v_proj"} if joint else {"to_k", "to_v"})
    assert len(names) % 2 == 0
    if not joint:
        layers = [n for n, m in model.denoiser.named_modules() if n.endswith(".attn2")]
        assert len(names) == 2 * len(layers)


def test_the_second_attention_of_sd35_sees_no_text():
    from diffusers import SD3Transformer2DModel

    model = tiny_layout("sd3")
    config = {k: v for k, v in model.denoiser.config.items() if not k.startswith("_")}
    model.pipeline.transformer = SD3Transformer2DModel(**config | {"dual_attention_layers": (0,)})
    chosen = {n for n, _ in trainable(model, "cross-attention")}
    second = {n for n in model.tensors() if ".attn2." in n}
    assert second and not chosen & second
    assert second & {n for n, _ in trainable(model, "other")}


def test_wrong_choices_are_refused():
    model = tiny_diffusion()
    with pytest.raises(SettingError, match="cross-attention"):
        trainable(model, "cross-atention")
    with torch.no_grad():
        model.pipeline.unet = nn.Identity()
    with pytest.raises(MissingPart, match="selects nothing"):
        trainable(model, "cross-attention")
