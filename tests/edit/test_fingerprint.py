"""A fingerprint tells another precision from other weights, however light the training or few the tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar

import pytest
import torch
from torch import nn

from expunge.edit import checksums
from expunge.edit.fingerprint import Fingerprint, _places, base_digest, tensor_digest
from expunge.models.base import Model
from expunge.testing import tiny_diffusion

from .edits import make


class Network(Model):
    """A UNet alone; only its weights matter here."""

    family: ClassVar[str] = "diffusion"
    generate = None  # type: ignore[assignment]

    def __init__(self, unet: nn.Module) -> None:
        super().__init__("network")
        self.unet = unet

    def parts(self) -> Mapping[str, nn.Module]:
        return {"unet": self.unet}


def stable_diffusion_1() -> Network:
    """The names of Stable Diffusion 1.x, 686 tensors, with few values each."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(
            UNet2DConditionModel(
                sample_size=8, block_out_channels=(4, 8, 12, 12), norm_num_groups=2,
                cross_attention_dim=6, attention_head_dim=2,
            )
        )  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """The tensors that are read in full, in order."""
    read, digest = [], checksums.tensor_digest
    monkeypatch.setattr(checksums, "tensor_digest", lambda t: (read.append(t), digest(t))[1])
    return read


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


@pytest.mark.parametrize("pair", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_two_half_formats_of_one_base_agree(pair):
    one, two = (tiny_diffusion(dtype=dtype) for dtype in pair)
    assert agreement(one, two)[0] == "precision"
    tuned = tiny_diffusion()
    with torch.no_grad():
        for parameter in tuned.denoiser.parameters():
            parameter.mul_(1 + 5e-4)
    tuned.pipeline.to(pair[0])
    # Control: the room is no wider than rounding.
    assert agreement(tuned, two) == ("different", "unet")


def test_edited_keys_and_values_of_a_full_checkpoint_are_noticed():
    base, edited = stable_diffusion_1(), stable_diffusion_1()
    names = sorted(base.tensors())
    matrices = [n for n in names if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))]
    assert len(names) == 686 and len(matrices) == 32 and base.state == edited.state
    # Control: a sample of 64 tensors holds none of them.
    assert not set(names[::10][:64]) & set(matrices)
    with torch.no_grad():
        edited.tensor(matrices[0]).mul_(1.01)
    assert agreement(base, edited) == ("different", "unet")
    assert base.state.key != edited.state.key


def test_one_value_outside_the_sample_is_noticed_where_it_counts(model):
    name = model.text_projections()[0]
    other = tiny_diffusion()
    with torch.no_grad():
        flat = other.tensor(name).view(-1)
        sampled = set(_places(torch.arange(len(flat))).tolist())
        flat[next(i for i in range(len(flat)) if i not in sampled)] += 1e-3
    assert agreement(model, other)[0] == "equal"  # control: the sample alone cannot see it
    assert agreement(model, other, [name]) == ("different", name)
    assert model.state.key != other.state.key


def test_samples_of_a_strided_tensor_are_those_of_its_values():
    picture = torch.arange(3 * 4 * 5 * 6.0).reshape(3, 4, 5, 6)
    strided = picture.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous() and torch.equal(_places(picture), _places(strided))
    assert len(_places(torch.ones(()))) == 1 and len(_places(torch.ones(0))) == 0


def test_a_tensor_is_read_in_full_once_and_after_every_write(model, counted):
    own = tiny_diffusion()
    name = own.text_projections()[0]
    first, number = base_digest(own), len(own.tensors())
    assert base_digest(own) == first and len(counted) == number
    weight = own.tensor(name)
    with torch.no_grad():
        weight[0, 1] += 1  # no sampled place
    second = base_digest(own)
    assert second != first and len(counted) == number + 1
    weight.data.mul_(2)  # torch's own count of writes does not see this one
    assert base_digest(own) not in (first, second) and len(counted) == number + 2
    layer = own.denoiser.get_submodule(name.removeprefix("unet.").removesuffix(".weight"))
    layer.weight = nn.Parameter(model.tensor(name).detach().clone(), requires_grad=False)
    assert base_digest(own) == first and len(counted) == number + 3
    edit = make(own, names=[name])
    with edit.on(own):
        assert base_digest(own) == first  # the base, whatever is on it
    assert base_digest(own) == first and len(counted) < number + 7


def test_the_base_may_move_between_precisions_and_back():
    own = tiny_diffusion()
    first = own.state
    own.pipeline.to(torch.float64)
    assert own.state != first
    own.pipeline.to(torch.float32)
    assert own.state == first


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
    different = [
        base.half(),
        base.reshape(2, 2),
        -base,
        base + 1e-30,
        base.int(),
        base[:0],
        base[:3],
    ]
    digests = {tensor_digest(t) for t in (base, *different)}
    assert len(digests) == 8 and tensor_digest(base) == tensor_digest(torch.zeros(8)[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
@pytest.mark.parametrize("size", [1, 7, 8, 2**19 + 5])
def test_digest_sees_every_value_and_its_place(dtype, size):
    draw = torch.Generator().manual_seed(size)
    base = torch.randint(0, 2, (size,), generator=draw).to(dtype)
    digests = {tensor_digest(base)}
    for place in {0, size // 2, size - 1}:
        changed = base.clone()
        changed[place] = 1 - changed[place].int()
        digests.add(tensor_digest(changed))
    assert len(digests) == 1 + len({0, size // 2, size - 1})
    held = torch.cat([base[:1], base])[1:]  # the same values at an odd place of their storage
    assert tensor_digest(held) == tensor_digest(base)


def test_digest_sees_orders_and_signs():
    draw = torch.Generator().manual_seed(0)
    base = torch.randn(2**18, generator=draw)
    others = [base.flip(0), base.roll(1), base.roll(2**17), -base]
    # Signs of an even number of values, all in the same half of their words.
    for step in (1, 2, 4, 1024):
        signs = torch.ones_like(base)
        signs[::step] = -1
        others.append(base * signs)
    some = base.clone()
    some[[1, 3]] *= -1
    swapped = base.clone()
    swapped[[5, 9]] = base[[9, 5]]
    digests = {tensor_digest(t) for t in (base, *others, some, swapped)}
    assert len(digests) == len(others) + 2  # -base is there twice
    # It stands in files, so it stays what it is.
    assert tensor_digest(torch.arange(2.0**18)) == "32fadec25a0621661742b3fe224c4d0f"


def test_weights_in_inference_mode_have_digests():
    with torch.inference_mode():
        own = tiny_diffusion()
        first = base_digest(own)
        own.denoiser.conv_in.weight[0, 0, 0, 0] += 1
        assert base_digest(own) != first
