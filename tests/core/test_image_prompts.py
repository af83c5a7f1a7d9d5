"""Image prompts: the diffusers processors as oracle, the text-only path, clean-up, gradients, files."""

import numpy as np
import pytest
import torch

from expunge.core.image_prompts import (
    ImagePrompts,
    cross_attentions,
    refined,
    text_only,
    with_image,
)
from expunge.errors import ModelError, UnsupportedModel
from expunge.models.types import Condition
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout


def branch_for(model, seed=3, embedding=6):
    layers = cross_attentions(model.denoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inner = [layer.to_q.out_features for layer in layers]
        return ImagePrompts(embedding, 4, layers[0].to_k.in_features, inner)


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def branch(model):
    return branch_for(model)


def asked(model, rows=3):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(rows, *model.latent_shape, generator=draw)
    return x, torch.tensor([500]), model.encode(["a red star", "a circle", "blue"][:rows])


def embeddings(rows=3):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))


def test_equals_the_processors_of_diffusers(model, branch):
    x, t, text = asked(model)
    with torch.no_grad(), branch.attached(model):
        ours = model.predict(x, t, with_image(text, branch.tokens(embeddings()))).value
    other = tiny_diffusion()
    state = {"image_proj": {}, "ip_adapter": {}}
    for name, value in branch.state_dict().items():
        part, _, rest = name.partition(".")
        state[part][rest] = value
    unet = other.pipeline.unet
    unet._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    with torch.no_grad():
        theirs = unet(
            x, t, encoder_hidden_states=text.embeddings,
            added_cond_kwargs={"image_embeds": [embeddings()[:, None]]},
        ).sample  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    taken = ImagePrompts.of(other.pipeline)
    assert all(torch.equal(v, branch.state_dict()[n]) for n, v in taken.state_dict().items())


def test_text_only_rows_take_the_text_only_path(model, branch):
    x, t, text = asked(model)
    tokens = branch.tokens(embeddings())
    with torch.no_grad():
        plain = model.predict(x, t, text).value
        with branch.attached(model):
            assert torch.equal(model.predict(x, t, text).value, plain)
            assert torch.equal(model.predict(x, t, text_only(text, tokens)).value, plain)
            mixed = Condition.concatenate(
                [text_only(text.select([0]), tokens), with_image(text, tokens).select([1, 2])]
            )
            both = model.predict(x, t, mixed).value
            whole = model.predict(x, t, with_image(text, tokens)).value
    torch.testing.assert_close(both[:1], plain[:1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(both[1:], whole[1:], atol=1e-6, rtol=1e-5)
    assert (whole - plain).abs().amax() > 1e-4
    with pytest.raises(UnsupportedModel):
        Condition.concatenate([text, with_image(text, tokens)])


def test_nothing_is_left_behind(model, branch):
    processors = dict(model.denoiser.attn_processors)
    with pytest.raises(RuntimeError, match="here"), branch.attached(model):
        with pytest.raises(ModelError, match="already"), branch.attached(model):
            pass
        raise RuntimeError("here")
    after = model.denoiser.attn_processors
    assert all(after[name] is value for name, value in processors.items())
    assert model.controls == ()
    for module in model.denoiser.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_gradients_reach_the_denoiser_and_not_the_branch(model, branch):
    x, t, text = asked(model)
    layer = cross_attentions(model.denoiser)[0]
    layer.to_q.weight.requires_grad_(True)
    try:
        with branch.attached(model):
            tokens = branch.tokens(embeddings())
            model.predict(x, t, with_image(text, tokens)).value.square().mean().backward()
        assert layer.to_q.weight.grad.abs().amax() > 0
        assert all(p.grad is None and not p.requires_grad for p in branch.parameters())
    finally:
        layer.to_q.weight.requires_grad_(False)
        layer.to_q.weight.grad = None


def test_refined_tokens_are_means_of_text_rows():
    draw = torch.Generator().manual_seed(2)
    q = torch.randn(2, 4, 8, generator=draw, dtype=torch.float64)
    text = torch.randn(5, 8, generator=draw, dtype=torch.float64)
    made = refined(q, text)
    for row in range(2):
        for token in range(4):
            scores = [float(q[row, token] @ text[j]) / 8**0.5 for j in range(5)]
            weights = np.exp(scores) / np.exp(scores).sum()
            wanted = sum(w * text[j] for j, w in enumerate(weights))
            torch.testing.assert_close(made[row, token], wanted)
    assert torch.equal(refined(q, text[:1]), text[:1].expand(2, 4, 8))


def test_files(tmp_path, branch):
    from safetensors.torch import save_file

    state = dict(branch.state_dict())
    save_file(state, tmp_path / "a.safetensors")
    again = ImagePrompts.load(tmp_path / "a.safetensors")
    assert all(torch.equal(v, state[n]) for n, v in again.state_dict().items())
    (tmp_path / "a.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="safetensors"):
        ImagePrompts.load(tmp_path / "a.bin")
    with pytest.raises(ModelError, match=r"image_proj\.proj\.bias"):
        ImagePrompts.from_state({n: v for n, v in state.items() if n != "image_proj.proj.bias"})
    with pytest.raises(ModelError, match="no known"):
        ImagePrompts.from_state({**state, "more": torch.zeros(1)})


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sana"])
def test_other_layouts(name):
    model = tiny_layout(name)
    branch = branch_for(model)
    text = model.encode(["a red star", "a circle"])
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), branch.attached(model):
        plain = model.predict(x, torch.tensor([500]), text).value
        seen = model.predict(x, torch.tensor([500]), with_image(text, branch.tokens(embeddings(2))))
    assert (seen.value - plain).abs().amax() > 1e-6


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_joint_attention_is_refused(name, branch):
    model = tiny_layout(name)
    with pytest.raises(UnsupportedModel, match="cross-attention"), branch.attached(model):
        pass
