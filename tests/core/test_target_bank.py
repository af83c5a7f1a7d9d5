"""Targets of an unrestricted model, drawn once."""

from __future__ import annotations

import pytest
import torch

from expunge.core.target_bank import TargetBank
from expunge.models.base import noise_generator

TEXTS, KEYS = ["a red star", "star"], ["x", "y"]


def bank(model, which=(0, 1), **options):
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, *model.latent_shape, generator=generator)[list(which)]
    settings = {"seed": 4, "steps": 20, "size": 6, "chunk": 4, **options}
    return TargetBank(
        model, [TEXTS[i] for i in which], latents, keys=[KEYS[i] for i in which], **settings
    )


@torch.no_grad()
def test_targets_are_the_models_predictions_of_noised_pictures(model):
    weight = torch.tensor([3.0, 4.0])
    for guidance in (None, weight):
        made = bank(model, guidance=guidance)
        time, noised, noise, target = made.draw(0)
        assert 0 <= time < 1000
        times = torch.full((2,), time)
        assert torch.allclose(noised, model.noised(made.latents, noise, times))
        prompt = model.predict(noised, times, model.encode(TEXTS)).value
        if guidance is None:
            assert torch.allclose(target, prompt, atol=1e-5) and made.rows == 1
        else:
            empty = model.predict(noised, times, model.encode(["", ""])).value
            mixed = empty + weight.reshape(2, 1, 1, 1) * (prompt - empty)
            assert torch.allclose(target, mixed, atol=1e-4) and made.rows == 2


def test_a_bank_is_asked_once_and_fresh_draws_each_step(model):
    made, before = bank(model), model.cost.snapshot()
    drawn = [made.draw(step) for step in range(20)]
    assert made.drawn == 6 and model.cost.since(before)["denoiser.forward"] == 12
    assert len({id(entry) for entry in drawn}) <= 6
    fresh, before = bank(model, size=0, steps=7), model.cost.snapshot()
    drawn = [fresh.draw(step) for step in range(7)]
    assert fresh.drawn == 7 and model.cost.since(before)["denoiser.forward"] == 14
    assert len({float(entry[2].sum()) for entry in drawn}) == 7
    free, before = bank(model, asked=False), model.cost.snapshot()
    _, _, noise, target = free.draw(0)
    assert free.rows == 0 and "denoiser.forward" not in model.cost.since(before)
    assert torch.equal(noise, target)


def test_draws_do_not_depend_on_the_batch(model):
    both, one = bank(model), bank(model, which=(1,))
    for step in range(5):
        a, b = both.draw(step), one.draw(step)
        assert a[0] == b[0] and torch.equal(a[2][1], b[2][0])
        assert torch.allclose(a[3][1], b[3][0], atol=1e-5)
    number = int(torch.randint(6, (), generator=noise_generator(4, "bank order", 0)))
    expected = torch.randn(
        model.latent_shape, generator=noise_generator(4, f"bank noise {number}", "y")
    )
    assert torch.equal(bank(model).draw(0)[2][1], expected)


@pytest.mark.parametrize("edited", [True, False])
def test_the_original_is_asked_without_its_edits(model, edited):
    from expunge import Concept
    from expunge.erase.diffusion.uce import UCE

    plain = bank(model).draw(0)[3]
    with (
        UCE.configured("2023", ridge=0.02).erase(model, Concept("star", anchor="circle")).on(model)
    ):
        assert torch.equal(bank(model).draw(0)[3], plain)
        assert len(model.edits) == 1
