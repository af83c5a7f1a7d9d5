"""Guided predictions outside a sampling: those of a sampling with its controls, and gradients through all of it."""

from __future__ import annotations

import pytest
import torch

from expunge import Concept
from expunge.core.guided_steps import GuidedSteps
from expunge.erase.diffusion.sld import SLD
from expunge.erase.diffusion.uce import UCE
from expunge.testing import tiny_diffusion

STAR = Concept("star", anchor="circle")
TIMES = torch.tensor([700, 450, 200])
# Steep enough to be open in places, not everywhere, at the predictions of a random model.
SAFE = SLD(safety_scale=3.0, threshold=0.0, momentum_scale=0.5, momentum_decay=0.7, warm_up=0)


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))  # fmt: skip


def by_hand(model, clean, eps, times, condition, guidance, method, negative="star"):
    """SLD's equations, one timestep after another."""
    momentum = torch.zeros_like(clean)
    for number, time in enumerate(times):
        seen = model.noised(clean, eps, time.reshape(1))
        texts = (model.unconditional(), condition, model.unconditional(negative))
        u, p, s = (model.predict(seen, time.reshape(1), own).value for own in texts)
        mu = torch.where(p - s < method.threshold, (method.safety_scale * (p - s).abs()).clamp(max=1), 0)  # fmt: skip
        gamma = mu * (s - u) + method.momentum_scale * momentum
        momentum = method.momentum_decay * momentum + (1 - method.momentum_decay) * gamma
        made = u + guidance * (p - u - (gamma if number >= method.warm_up else 0))
    return made


@pytest.mark.parametrize("graph", ["full", "last"])
def test_slds_chain_and_its_gradients_are_the_equations(graph):
    model = tiny_diffusion(dtype=torch.float64)
    edit = SAFE.erase(model, STAR)
    clean, eps = noise(1), noise(2)
    plain = model.encode("a red circle")
    leaf = plain.embeddings.detach().clone().requires_grad_(True)
    wanted = by_hand(model, clean, eps, TIMES, plain.with_embeddings(leaf), 3.0, SAFE)
    (full,) = torch.autograd.grad(wanted.square().sum(), leaf)
    with edit.on(model):
        steps = GuidedSteps(model, guidance=3.0, steps=4)
        other = plain.embeddings.detach().clone().requires_grad_(True)
        before = model.cost.snapshot()
        found = steps.defended(clean, eps, TIMES, plain.with_embeddings(other), graph=graph)
        (slope,) = torch.autograd.grad(found.value.square().sum(), other)
        spent = model.cost.since(before)
        assert steps.branches() == 3
    torch.testing.assert_close(found.value, wanted.detach())
    assert spent == {"denoiser.forward": 9, "denoiser.backward": 9 if graph == "full" else 3} | {
        k: v for k, v in spent.items() if k.startswith("encoder")
    }
    if graph == "full":
        torch.testing.assert_close(slope, full)
    else:
        assert not torch.allclose(slope, full)


def test_a_warm_up_counts_the_steps_of_a_sampling_or_what_it_is_told():
    model = tiny_diffusion(dtype=torch.float64)
    late = SLD(**{**SAFE.settings(), "warm_up": 2})
    condition = model.encode("a red circle")
    with late.erase(model, STAR).on(model), torch.no_grad():
        steps = GuidedSteps(model, guidance=3.0, steps=4)
        # Timesteps of the sampling are 751, 501, 251, 1.
        assert [steps.step_of(torch.tensor(t)) for t in (900, 751, 750, 300, 1, 0)] == [0, 0, 1, 2, 3, 3]  # fmt: skip
        one = [torch.tensor([t]) for t in (700, 300)]
        plain = [_bare(steps, noise(1), noise(2), t, condition) for t in one]
        told = [steps.defended(noise(1), noise(2), t, condition).value for t in one]
        assert torch.equal(told[0], plain[0]) and not torch.equal(told[1], plain[1])
        first = steps.defended(noise(1), noise(2), one[1], condition, step=0).value
        assert torch.equal(first, plain[1])


def _bare(steps, clean, eps, time, condition):
    with steps.model.lifted():
        return steps.defended(clean, eps, time, condition).value


def test_a_negative_text_takes_the_place_of_the_empty_one():
    model = tiny_diffusion(dtype=torch.float64)
    condition, time = model.encode("a red circle"), torch.tensor([300])
    with torch.no_grad():
        found = GuidedSteps(model, guidance=3.0, steps=4, negative="star").defended(
            noise(1), noise(2), time, condition
        )
        seen = model.noised(noise(1), noise(2), time)
        n, p = (model.predict(seen, time, c).value for c in (model.encode("star"), condition))
    torch.testing.assert_close(found.value, n + 3.0 * (p - n))


def test_the_undefended_step_is_the_bare_models():
    model = tiny_diffusion()
    clean, eps, time = noise(1).float(), noise(2).float(), torch.tensor(300)
    steps = GuidedSteps(model, guidance=3.0, steps=4, negative="circle")
    wanted = steps.undefended(clean, eps, time, ["star"]).value
    with UCE().erase(model, STAR).on(model):
        assert torch.equal(steps.undefended(clean, eps, time, ["star"]).value, wanted)
    with torch.no_grad():
        seen = model.noised(clean, eps, time.reshape(1))
        u, c = (model.predict(seen, time.reshape(1), model.encode(t)).value for t in ("", "star"))
    torch.testing.assert_close(wanted, u + 3.0 * (c - u), rtol=1e-4, atol=1e-5)
