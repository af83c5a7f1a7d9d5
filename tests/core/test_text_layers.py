"""Tensors of text encoders by role and layer: numbers of layers, not beginnings of names."""

import pytest
import torch

from expunge.core.text_layers import ROLES, text_layer_count, trainable_text
from expunge.errors import MissingPart, SettingError, UnsupportedModel
from expunge.testing import tiny_diffusion, tiny_layout

LAYOUTS = ("sd", "sdxl", "pixart", "sana", "sd3", "flux")


def opened(name):
    return tiny_diffusion() if name == "sd" else tiny_layout(name)


def deep(layers):
    """A CLIP encoder of many narrow layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = tiny_diffusion()
    given = model.text_encoder.config.to_dict() | {"num_hidden_layers": layers}
    model.pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**given))
    return model


def names(model, *roles, **more):
    return [n for n, _ in trainable_text(model, roles, **more)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roles_split_every_tensor_that_is_read(layout):
    model = opened(layout)
    towers = [name for name in model.parts() if name.startswith("text_encoder")]
    whole = set(names(model, *ROLES))
    parts = [set(names(model, r, towers=[t])) for t in towers for r in ROLES if _has(model, r, t)]
    assert set().union(*parts) == whole and sum(map(len, parts)) == len(whole)
    rest = {n for n in model.tensors() if n.startswith("text_encoder")} - whole
    unread = ("text_encoder.encoder.layers.1.", "text_encoder.final_layer_norm.")
    assert all(n.startswith(unread) for n in rest) and bool(rest) == (layout == "sdxl")


def _has(model, role, tower):
    try:
        return bool(trainable_text(model, [role], towers=[tower]))
    except MissingPart:
        return False


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_a_prediction_reach_every_chosen_tensor(layout):
    model = opened(layout)
    pairs = [
        (n, p)
        for n, p in trainable_text(model, ("feed-forward", "attention", "norms", "final-norm"))
        # A bias of the keys shifts all scores of a query alike, which changes nothing.
        if not n.endswith("k_proj.bias")
    ]
    for _, parameter in pairs:
        parameter.requires_grad_(True)
    noise = model.initial_noise([0, 1])
    made = model.predict(noise, torch.tensor([500, 500]), model.encode(["a red star", "a heart"]))
    found = torch.autograd.grad(made.value.square().sum(), [p for _, p in pairs])
    assert all(bool(g.any()) for g in found)


def test_layers_are_counted_not_compared_by_name():
    model = deep(12)
    assert text_layer_count(model) == 12

    def layers(**more):
        return {int(n.split(".")[3]) for n in names(model, "attention", **more)}

    assert layers(layers="last") == {11} and layers() == set(range(12))
    for count in range(1, 13):
        assert layers(layers=count) == set(range(count))  # two layers are 0 and 1, not 1, 10 and 11
    assert {n.split(".")[-2] for n in names(model, "attention", layers="last")} == {
        "q_proj", "k_proj", "v_proj", "out_proj",
    }  # fmt: skip
    assert len(names(model, *ROLES)) == 196  # 12 layers of 16 tensors, two tables, the final norm
    assert len(names(model, "feed-forward")) == 48
    assert len(names(model, "feed-forward", "final-norm", layers=1)) == 6


def test_the_last_layer_of_sdxl_is_the_last_that_is_read():
    model = opened("sdxl")
    own = names(model, "feed-forward", layers="last")
    assert {n.rpartition(".mlp.")[0] for n in own} == {
        "text_encoder.encoder.layers.0", "text_encoder_2.encoder.layers.1",
    }  # fmt: skip
    assert text_layer_count(model) == 1 and text_layer_count(model, "text_encoder_2") == 2
    before = model.encode(["a star"])
    with torch.no_grad():
        for name, parameter in model.tensors().items():
            if name.startswith(
                ("text_encoder.encoder.layers.1.", "text_encoder.final_layer_norm.")
            ):
                parameter.add_(1)
    after = model.encode(["a star"])
    assert torch.equal(before.embeddings, after.embeddings)
    assert torch.equal(before.pooled, after.pooled)


def test_one_tower_of_several():
    model = opened("sd3")
    own = names(model, "attention", towers=["text_encoder_3"])
    assert own and all(n.startswith("text_encoder_3.") for n in own)
    assert (
        "text_encoder_3.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight" in own
    )
    with pytest.raises(MissingPart, match="text_encoder_4"):
        names(model, "attention", towers=["text_encoder_4"])


def test_wrong_choices_are_refused():
    model = opened("sd")
    with pytest.raises(SettingError, match="feed-forward"):
        names(model, "feed-foward")
    for layers in ("first", 0, 3, True):
        with pytest.raises(SettingError, match="allowed"):
            names(model, "attention", layers=layers)
    with pytest.raises(MissingPart, match="select nothing"):
        names(model, "projection")
    with pytest.raises(MissingPart, match="select nothing"):
        names(model)
    model.text_encoder.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match="CLIP, T5 and Gemma"):
        names(model, "attention")
