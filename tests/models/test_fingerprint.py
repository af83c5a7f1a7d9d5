"""A fingerprint tells another precision from other weights, however light the training."""

from __future__ import annotations

import json

import pytest
import torch

from expunge.edit.fingerprint import SAMPLES, Fingerprint, tensor_digest
from expunge.testing import tiny_diffusion


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def agreement(one, two, names=()):
    return one.fingerprint(names).agreement(two.fingerprint(names))


def test_equal_weights_agree_and_survive_json(model):
    other = tiny_diffusion()
    assert agreement(model, other) == ("equal", "")
    mine = model.fingerprint(model.text_projections())
    again = Fingerprint.from_dict(json.loads(json.dumps(mine.to_dict())))
    assert again == mine and again.agreement(mine) == ("equal", "") and model.state == other.state


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_told_from_fine_tuning(model, dtype):
    half = tiny_diffusion(dtype=dtype)
    assert agreement(model, half)[0] == agreement(half, model)[0] == "precision"
    # A light fine-tune moves weights by less than bfloat16 rounds; it must not pass for a precision.
    tuned = tiny_diffusion()
    with torch.no_grad():
        for parameter in tuned.denoiser.parameters():
            parameter.mul_(1 + 2e-4)
    assert agreement(model, tuned) == ("different", "unet")
    assert agreement(tuned, half)[0] == "different"


def test_one_touched_value_outside_the_sample_is_noticed(model):
    name = model.text_projections()[0]
    other = tiny_diffusion()
    with torch.no_grad():
        flat = other.tensor(name).view(-1)
        sampled = set(
            torch.linspace(0, len(flat) - 1, SAMPLES, dtype=torch.float64).long().tolist()
        )
        flat[next(i for i in range(len(flat)) if i not in sampled)] += 1e-3
    assert agreement(model, other)[0] == "equal"  # control: the sample alone cannot see it
    assert agreement(model, other, [name]) == ("different", name)


def test_structure_and_components(model):
    from expunge.testing import tiny_language

    mine, other = model.fingerprint(), tiny_language().fingerprint()
    assert mine.agreement(other) == ("structure", "no common component")
    changed = mine.to_dict()
    changed["components"] = {**changed["components"]}
    changed["components"]["unet"] = {**changed["components"]["unet"], "structure": "0"}
    assert mine.agreement(Fingerprint.from_dict(changed)) == ("structure", "unet")
    assert set(model.fingerprint(model.text_projections()).components) == {"unet"}


def test_digest_sees_dtype_shape_and_sign_of_zero():
    base = torch.zeros(4)
    different = [base.half(), base.reshape(2, 2), -base, base + 1e-30, base.int()]
    digests = {tensor_digest(t) for t in (base, *different)}
    assert len(digests) == 6 and tensor_digest(base) == tensor_digest(torch.zeros(8)[::2])
