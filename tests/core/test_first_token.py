"""The start token's row and what keys and values learn from it."""

import pytest
import torch

from expunge.core.first_token import first_token_held, starts_alike
from expunge.core.layer_choice import trainable
from expunge.testing import tiny_diffusion, tiny_layout


def gradients(model, pairs, embeddings):
    latents = model.initial_noise([0])
    condition = model.encode(["a star"]).with_embeddings(embeddings)
    loss = model.predict(latents, torch.tensor([10]), condition).value.square().mean()
    return torch.autograd.grad(loss, [p for _, p in pairs])


def test_no_gradient_comes_through_the_first_row_and_outputs_are_the_same():
    model = tiny_diffusion()
    pairs = trainable(model, "cross-attention-kv")
    rows = model.encode(["a star"]).embeddings
    alone = torch.zeros_like(rows)
    alone[:, 0] = rows[:, 0]  # a text whose only row is the first
    for _, parameter in pairs:
        parameter.requires_grad_(True)
    free = gradients(model, pairs, alone)
    before = model.predict(model.initial_noise([0]), torch.tensor([10]), model.encode(["a star"]))
    with first_token_held(model, pairs) as held:
        assert held
        kept = gradients(model, pairs, alone)
        inside = model.predict(model.initial_noise([0]), torch.tensor([10]), model.encode(["a star"]))  # fmt: skip
        assert any(g.abs().max() > 0 for g in gradients(model, pairs, rows))
    assert torch.equal(before.value, inside.value)
    assert any(g.abs().max() > 0 for g in free)
    assert all(g.abs().max() == 0 for g in kept)
    assert not any(m._forward_hooks for m in model.denoiser.modules())


HELD = {"sdxl": True, "pixart": False, "sd3": True, "flux": False}


@pytest.mark.parametrize(("name", "held"), HELD.items())
def test_only_texts_with_a_start_token_have_such_a_row(name, held):
    assert starts_alike(tiny_layout(name)) is held


def test_hooks_are_gone_after_an_exception():
    model = tiny_diffusion()
    with pytest.raises(RuntimeError), first_token_held(model, trainable(model, "full")):
        raise RuntimeError
    assert not any(m._forward_hooks for m in model.denoiser.modules())
