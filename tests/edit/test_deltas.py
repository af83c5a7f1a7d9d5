"""The change of each kind is its formula in float64, rounded once."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.edit import Edit, deltas
from expunge.errors import EditFormatError, UnsupportedModel
from expunge.testing import tiny_diffusion

from .edits import make


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def test_shared_low_rank_is_weight_times_factors(model):
    edit = make(model)
    for target in edit.manifest.targets:
        weight = model.tensor(target.name).detach().double()
        wanted = (
            weight @ edit.tensors["shared.left"].double() @ edit.tensors["shared.right"].double()
        )
        torch.testing.assert_close(edit.change(target.name, weight), wanted, rtol=0, atol=1e-15)


def test_low_rank_and_dense(model):
    low, dense = make(model, "low-rank"), make(model, "dense")
    name = low.manifest.targets[0].name
    weight = model.tensor(name)
    wanted = low.tensors[f"up.{name}"].double() @ low.tensors[f"down.{name}"].double()
    assert torch.equal(low.change(name, weight), wanted)
    assert torch.equal(dense.change(name, weight), dense.tensors[f"delta.{name}"].double())
    with dense.on(model):
        once = (weight.double() + dense.change(name, weight) * 0).float()
        assert torch.equal(weight, once)


def test_convolutions_keep_their_shape(model):
    edit = make(model, "low-rank", names=["unet.conv_in.weight"])
    assert edit.change("unet.conv_in.weight", model.tensor("unet.conv_in.weight")).shape == (
        16,
        4,
        3,
        3,
    )


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (4, 3, 3, 3)])
def test_factors_of_a_matrix_of_known_rank(shape):
    draw = torch.Generator().manual_seed(0)
    width = math.prod(shape[1:])
    flat = torch.randn(shape[0], 2, generator=draw) @ torch.randn(2, width, generator=draw)
    up, down, error = deltas.low_rank(flat.reshape(shape).double())
    assert up.shape[1] == 2 and error < 1e-5
    torch.testing.assert_close((up @ down), flat.double(), atol=1e-5, rtol=1e-5)
    up, down, error = deltas.low_rank(flat.reshape(shape), rank=1)  # control: one is not enough
    left = (flat.double() - up @ down).norm() / flat.double().norm()
    assert error > 0.01 and error == pytest.approx(float(left), rel=1e-6)


def test_a_zero_change_has_factors_and_no_error():
    up, down, error = deltas.low_rank(torch.zeros(4, 5))
    assert error == 0 and not (up @ down).any()


def test_missing_tensors_and_controls_are_refused(model):
    edit = make(model, "dense")
    name = edit.manifest.targets[0].name
    with pytest.raises(EditFormatError, match="lacks the tensor"):
        Edit(edit.manifest, {k: v for k, v in edit.tensors.items() if k != f"delta.{name}"})
    control = Edit(edit.manifest.model_copy(update={"kind": "control"}), {})
    with pytest.raises(UnsupportedModel, match="changes no weights"):
        control.change(name, model.tensor(name))
