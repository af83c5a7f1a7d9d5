"""Low-rank changes while a model runs: added as merged, in float64 by hand, and gone at the end."""

from __future__ import annotations

import pytest
import torch

from expunge.core.low_rank import LowRank, adaptable
from expunge.errors import MissingPart, SettingError
from expunge.testing import tiny_diffusion


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def predicted(model):
    latents = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.predict(latents, torch.tensor([400, 10]), model.encode(["a star", ""])).value


def hooks(model):
    return sum(len(m._forward_hooks) for part in model.parts().values() for m in part.modules())


def filled(model, rank=2, scale=0.7):
    changes = LowRank(model, model.text_projections(), rank=rank, seed=3, scale=scale)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for up in changes.up.values():
            up.copy_(0.1 * torch.randn(up.shape, generator=draw))
    return changes


def test_a_fresh_change_changes_nothing_and_starts_by_name_seed_and_purpose(model):
    plain = predicted(model)
    names = model.text_projections()
    fresh = LowRank(model, names, seed=1)
    with fresh.attached():
        assert torch.equal(predicted(model), plain)
    few = LowRank(model, names[:1], seed=1)
    assert torch.equal(few.down[names[0]], fresh.down[names[0]])
    for other in (LowRank(model, names, seed=2), LowRank(model, names, seed=1, purpose="star")):
        assert not torch.equal(other.down[names[0]], fresh.down[names[0]])


def test_the_attached_change_is_the_merged_one(model):
    plain, changes = predicted(model), filled(model)
    with changes.attached():
        attached = predicted(model)
    tensors = model.tensors()
    before = {name: tensors[name].detach().clone() for name in changes.modules}
    with torch.no_grad():
        for name, (up, down) in changes.factors().items():
            tensors[name].add_(up @ down)
        merged = predicted(model)
        for name, value in before.items():
            tensors[name].copy_(value)
    torch.testing.assert_close(attached, merged, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(attached, plain, atol=1e-3)
    assert torch.equal(predicted(model), plain)
    name = next(iter(changes.modules))
    doubled = {key: 2 * value for key, value in changes.parameters()}
    up, down = changes.factors(doubled)[name]
    torch.testing.assert_close(up @ down, 4 * 0.7 * changes.up[name] @ changes.down[name])


def test_hooks_are_gone_after_an_error(model):
    changes = filled(model)
    with pytest.raises(RuntimeError, match="on purpose"), changes.attached():
        assert hooks(model) == len(model.text_projections())
        raise RuntimeError("on purpose")
    assert hooks(model) == 0


def test_kaimings_start_is_uniform_within_one_over_the_root_of_the_width(model):
    names = model.text_projections()
    made = LowRank(model, names, rank=3, start="kaiming")
    every = torch.cat([d.detach().flatten() * d.shape[1] ** 0.5 for d in made.down.values()])
    assert -1 <= float(every.min()) < -0.98 and 0.98 < float(every.max()) <= 1
    assert abs(float(every.mean())) < 0.05 and abs(float(every.std()) - 3**-0.5) < 0.02
    with pytest.raises(SettingError, match="start='zero'"):
        LowRank(model, names, start="zero")


def test_what_cannot_be_changed_is_refused(model):
    with pytest.raises(SettingError, match="rank"):
        LowRank(model, model.text_projections(), rank=0)
    with pytest.raises(MissingPart, match="linear"):
        LowRank(model, ["unet.conv_in.weight"])
    with pytest.raises(MissingPart):
        LowRank(model, ["unet.nothing.weight"])


def test_convolutions_answer_as_merged():
    """Strided, padded and pointwise ones among all layers of the denoiser; their factors make a kernel."""
    model = tiny_diffusion()
    names = [n for n in adaptable(model) if n.startswith("unet.")]
    kinds = {tuple(model.tensor(n).shape[2:]) for n in names}
    assert kinds >= {(), (3, 3), (1, 1)} and any("downsamplers" in n for n in names)
    changes, draw = LowRank(model, names, rank=2, scale=0.5, convolutions=True), torch.Generator()
    with torch.no_grad():
        for up in changes.up.values():
            up.copy_(0.05 * torch.randn(up.shape, generator=draw.manual_seed(up.shape[0])))
    with changes.attached():
        attached = predicted(model)
    plain = predicted(model)
    with torch.no_grad():
        for name, (up, down) in changes.factors().items():
            weight = model.tensor(name)
            weight.add_((up @ down).reshape(weight.shape))
    torch.testing.assert_close(attached, predicted(model), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(attached, plain, atol=1e-3)


def test_depthwise_convolutions_are_no_layers_that_can_be_changed():
    from expunge.testing import tiny_layout

    model = tiny_layout("sana")
    depthwise = [n for n in model.tensors() if n.endswith("conv_depth.weight")]
    assert depthwise and not set(depthwise) & set(adaptable(model))
    with pytest.raises(MissingPart, match="one group"):
        LowRank(model, depthwise[:1], convolutions=True)
