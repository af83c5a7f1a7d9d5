"""Masks by saliency: exact thresholds against a sort, ties, gradients by finite differences, bits, resuming."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from expunge.core import saliency
from expunge.errors import NonFiniteError, ResumeMismatch, SettingError
from expunge.testing import bench, tiny_diffusion

DRAW = torch.Generator()


def gradients(seed=0, ties=False):
    draw = torch.Generator().manual_seed(seed)
    found = {
        name: torch.randn(shape, generator=draw) * scale
        for name, shape, scale in (("a", (7, 5), 1.0), ("b", (11,), 1e-4), ("c", (3, 2, 2), 30.0), ("d", (), 1.0))
    }  # fmt: skip
    return {n: g.mul(2).round() for n, g in found.items()} if ties else found


def sorted_mask(found, count):
    """The same by a stable sort of everything together."""
    flat = torch.cat([g.flatten() for g in found.values()]).abs()
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    parts = mask.split([g.numel() for g in found.values()])
    return {n: part.reshape(g.shape) for (n, g), part in zip(found.items(), parts, strict=True)}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.37, 0.5, 0.999, 1.0])
def test_the_global_threshold_is_that_of_a_stable_sort(ratio, ties):
    for seed in range(4):
        found = gradients(seed, ties)
        count = sum(g.numel() for g in found.values())
        wanted = sorted_mask(found, int(ratio * count))
        assert equal(saliency.salient(found, ratio), wanted)
        least = saliency.salient(found, ratio, choice="least")
        assert sum(int(m.sum()) for m in least.values()) == int(ratio * count)
        rest = sorted_mask(found, count - int(ratio * count))
        assert equal(least, {n: ~m for n, m in rest.items()})


def test_each_tensor_by_itself_keeps_half_rounded_down():
    found = gradients(1, ties=True)
    masks = saliency.salient(found, 0.5, scope="tensor")
    assert {n: int(m.sum()) for n, m in masks.items()} == {"a": 17, "b": 5, "c": 6, "d": 0}
    for name, gradient in found.items():
        assert equal({name: masks[name]}, sorted_mask({name: gradient}, gradient.numel() // 2))
    assert not equal(masks, saliency.salient(found, 0.5))


def test_wrong_choices_are_refused():
    for settings in (
        {"ratio": 1.2},
        {"ratio": 0.5, "scope": "layer"},
        {"ratio": 0.5, "choice": "none"},
    ):
        with pytest.raises(SettingError):
            saliency.salient(gradients(), **settings)


@pytest.mark.parametrize("shape", [(), (1,), (8,), (3, 7), (2, 3, 5)])
def test_bits_come_back(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) > 0.5
    bits = saliency.packed(mask)
    assert bits.dtype == torch.uint8 and len(bits) == -(-mask.numel() // 8)
    assert torch.equal(saliency.unpacked(bits, shape), mask)


class _Model:
    name = "net"

    def __init__(self, net):
        self.net = net

    def parts(self):
        return {"net": self.net}


def test_summed_gradients_keep_signs_and_agree_with_finite_differences():
    torch_state = torch.get_rng_state()
    net = nn.Linear(3, 2).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).reshape(parameter.shape))
    inputs = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, -0.4]]).double()
    parts = [lambda i=i: net(inputs[i]).square().sum() * (-1) ** i for i in range(2)]
    found = saliency.summed_gradients(_Model(net), [("weight", net.weight)], parts)
    assert set(found) == {"weight"}
    step = 1e-5
    for row in range(2):
        for column in range(3):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    net.weight[row, column] += sign * step
                    values.append(sum(float(part()) for part in parts))
                    net.weight[row, column] -= sign * step
            slope = (values[0] - values[1]) / (2 * step)
            assert float(found["weight"][row, column]) == pytest.approx(slope, abs=1e-4)
    torch.set_rng_state(torch_state)


def test_nothing_is_left_behind_by_gradients():
    model = tiny_diffusion()
    model.denoiser.train()
    name = model.text_projections()[0]
    model.tensors()[name].requires_grad_(True)
    before = bench.trace(model)
    pairs = [(n, model.tensors()[n]) for n in model.text_projections()]

    def loss():
        assert not model.denoiser.training and torch.is_grad_enabled()
        assert sum(p.requires_grad for p in model.tensors().values()) == len(pairs)
        condition = model.encode(["a star"]).detach()
        latents = torch.ones(1, *model.latent_shape)
        return model.predict(latents, torch.tensor([100]), condition).value.square().mean()

    with torch.no_grad():
        found = saliency.summed_gradients(model, pairs, [loss, loss])
        once = saliency.summed_gradients(model, pairs, [loss])
    assert bench.trace(model) == {**before, "grad mode": True}
    for n in found:
        torch.testing.assert_close(found[n], 2 * once[n])
    with pytest.raises(ZeroDivisionError):
        saliency.summed_gradients(model, pairs, [lambda: 1 / 0])
    assert bench.trace(model) == before
    with pytest.raises(NonFiniteError, match="to_"):
        saliency.summed_gradients(model, pairs, [lambda: loss() * float("nan")])


def test_intersections_resume_after_the_last_whole_map(tmp_path):
    maps = [saliency.salient(gradients(seed), 0.7) for seed in range(4)]
    whole, shares = saliency.intersected([lambda m=m: m for m in maps])
    assert equal(whole, {n: maps[0][n] & maps[1][n] & maps[2][n] & maps[3][n] for n in maps[0]})
    assert len(shares) == 4 and shares == sorted(shares, reverse=True) and shares[-1] > 0
    assert saliency.density(whole) == shares[-1]
    assert saliency.report(whole)["density"] == shares[-1]
    made = []

    def makers(stop):
        def maker(i):
            if i == stop:
                raise KeyboardInterrupt
            made.append(i)
            return maps[i]

        return [lambda i=i: maker(i) for i in range(4)]

    with pytest.raises(KeyboardInterrupt):
        saliency.intersected(makers(2), run=tmp_path, settings={"seed": 1})
    again, later = saliency.intersected(makers(None), run=tmp_path, settings={"seed": 1})
    assert made == [0, 1, 2, 3] and equal(again, whole) and later == shares
    with pytest.raises(ResumeMismatch, match="seed"):
        saliency.intersected(makers(None), run=tmp_path, settings={"seed": 2})
