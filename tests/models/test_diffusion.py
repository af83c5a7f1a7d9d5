"""The diffusion adapter: the stock pipeline's pictures, rows that do not mix, caches and controls that restore."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch

from expunge.concept import Concept
from expunge.edit import Edit
from expunge.errors import PromptError
from expunge.method import Control, Method, Prompt
from expunge.models.diffusion import DiffusionModel
from expunge.testing import tiny_diffusion

PROMPTS = ["a red star", "a blue circle", "a photo of a heart"]


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_sampler_is_the_stock_pipelines(kind):
    model = tiny_diffusion(prediction_type=kind)
    model.pipeline.set_progress_bar_config(disable=True)
    stock = model.pipeline(
        PROMPTS, latents=model.initial_noise([0, 1, 2]), num_inference_steps=4, guidance_scale=3.0,
        output_type="np",
    ).images  # fmt: skip
    ours = model.generate(PROMPTS) / 255.0
    assert ours.shape == stock.shape and np.abs(ours - stock).max() <= 1 / 255
    other = model.generate(PROMPTS, seeds=[3, 4, 5]) / 255.0  # control
    assert np.abs(other - stock).max() > 4 / 255


def test_pictures_do_not_depend_on_batches(model):
    whole = model.generate(PROMPTS, seeds=[7, 8, 9]).astype(int)
    for batch in (1, 2):
        assert np.abs(model.generate(PROMPTS, seeds=[7, 8, 9], batch=batch) - whole).max() <= 1
    turned = model.generate(PROMPTS[::-1], seeds=[9, 8, 7])[::-1]
    assert np.abs(turned - whole).max() <= 1
    assert torch.equal(model.initial_noise([5, 6])[1:], model.initial_noise([6]))


def test_seeds_and_prompts(model):
    own = model.generate([Prompt("a star", seed=5), Prompt("a star", seed=5)])
    assert np.array_equal(own[0], own[1])
    # Some processors round a batch of one otherwise than a batch of two: a picture may differ by one of 255 steps.
    alone = model.generate("a star", seeds=5)
    assert np.abs(alone.astype(int) - own[:1]).max() <= 1
    assert np.array_equal(model.generate("a star", seeds=5), alone)
    assert model.generate([]).shape[0] == 0
    with pytest.raises(PromptError, match="2 prompts but 3 seeds"):
        model.generate(PROMPTS[:2], seeds=[1, 2, 3])
    with pytest.raises(PromptError, match="condition of 1 rows"):
        model.generate(PROMPTS[:2], condition=model.encode("x"))
    with pytest.raises(PromptError, match="20001 characters"):
        model.generate("x" * 20_001)
    with pytest.raises(PromptError, match="at least 1"):
        model.generate("x", steps=0)


def test_rows_are_counted(model):
    before = model.cost.snapshot()
    model.generate(PROMPTS, steps=3, guidance=2.0)
    model.generate(PROMPTS, steps=3, guidance=1.0)
    assert model.cost.rows("denoiser", before) == 3 * 3 * 2 + 3 * 3


def test_random_state_and_modes_are_untouched(model):
    state = torch.get_rng_state()
    model.generate(PROMPTS)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


@dataclasses.dataclass(frozen=True)
class Maker(Method):
    """Nobody's method."""

    id: ClassVar[str] = "maker"


def dense(model, name: str) -> Edit:
    delta = {f"delta.{name}": torch.full_like(model.tensor(name), 0.1)}
    return Edit.make(
        Maker(), model, (Concept("star"),), kind="dense", tensors=delta, targets=(name,)
    )


def test_remembered_embeddings_follow_the_weights():
    model = tiny_diffusion()
    name = next(n for n in model.tensors() if n.startswith("text_encoder") and "q_proj.weight" in n)
    first = model.encode("a star").embeddings.clone()
    before = model.cost.snapshot()
    assert torch.equal(model.encode("a star").embeddings, first)
    assert model.cost.rows("encoder", before) == 0  # served from memory
    parameter = model.tensor(name)
    with dense(model, name).on(model):
        assert not torch.equal(model.encode("a star").embeddings, first)
        with model.lifted():
            assert torch.equal(model.encode("a star").embeddings, first)
    assert torch.equal(model.encode("a star").embeddings, first)
    with torch.no_grad():
        parameter.add_(0.1)
    assert not torch.equal(model.encode("a star").embeddings, first)


def test_spliced_vectors_are_the_table(model):
    ids = model.token_ids(["a star"])
    vectors = model.token_table()[ids].clone().requires_grad_(True)
    plain, spliced = (
        model.encode_tokens(ids).embeddings,
        model.encode_tokens(ids, vectors).embeddings,
    )
    torch.testing.assert_close(spliced, plain)
    spliced.sum().backward()
    assert vectors.grad is not None and vectors.grad.abs().sum() > 0
    assert not model.text_encoder.get_input_embeddings()._forward_hooks


def test_predictions_reconstruct_what_was_noised(model):
    clean, noise = model.initial_noise([1, 2]), model.initial_noise([3, 4])
    times = torch.tensor([100, 700])
    noised = model.noised(clean, noise, times)
    prediction = model.predict(noised, times, model.encode(PROMPTS[:2]))
    rebuilt = prediction.alpha * prediction.x0(noised) + prediction.sigma * prediction.epsilon(
        noised
    )
    torch.testing.assert_close(rebuilt, noised, atol=1e-5, rtol=1e-5)
    alpha, sigma = model.alpha_sigma(times)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    scheduler = model.scheduler
    torch.testing.assert_close(
        noised, scheduler.add_noise(clean, noise, times), atol=1e-6, rtol=1e-5
    )


class Looks(Control):
    """Reads attention and changes nothing."""

    def __init__(self, scale: float = 1.0, log: list | None = None, fails: bool = False):
        self.scale, self.log, self.fails = scale, [] if log is None else log, fails

    def attention(self, context, probabilities):
        self.log.append((self.scale, context.layer, tuple(probabilities.shape)))
        if self.fails:
            raise ZeroDivisionError
        return probabilities * self.scale


class Adds(Control):
    def __init__(self, amount: float, log: list):
        self.amount, self.log = amount, log

    def prediction(self, context, prediction):
        self.log.append((self.amount, context.step))
        return prediction.replace(prediction.value * 2 + self.amount)


def processors(model):
    return {name: id(p) for name, p in model.denoiser.attn_processors.items()}


def test_the_dispatcher_changes_nothing_by_itself_and_goes_again(model):
    before, plain = processors(model), model.sample(model.encode(PROMPTS), [0, 1, 2])
    looks = Looks()
    with model.controlled(looks):
        seen = model.sample(model.encode(PROMPTS), [0, 1, 2])
    torch.testing.assert_close(seen, plain, atol=1e-4, rtol=1e-4)
    assert processors(model) == before and {entry[1] for entry in looks.log} == {
        name.removesuffix(".processor") for name in before
    }
    rows, heads = looks.log[0][2][:2]
    assert rows == 6 and heads >= 1
    with model.controlled(Looks(0.5)):  # control: it can change the latents
        assert (model.sample(model.encode(PROMPTS), [0, 1, 2]) - plain).abs().max() > 1e-2


def test_processors_and_controls_come_back_after_an_exception(model):
    before = processors(model)
    with pytest.raises(ZeroDivisionError), model.controlled(Looks(fails=True)):
        model.generate("a star")
    assert processors(model) == before and model.controls == ()


def test_controls_act_in_order(model):
    log: list = []
    condition, times = model.encode("a star"), torch.tensor([300])
    noised = model.initial_noise([0])
    plain = model.predict(noised, times, condition).value
    with model.controlled(Adds(1.0, log)), model.controlled(Adds(3.0, log)):
        both = model.predict(noised, times, condition).value
        assert len(model.controls) == 2
        with model.lifted():
            assert torch.equal(model.predict(noised, times, condition).value, plain)
    torch.testing.assert_close(both, (plain * 2 + 1) * 2 + 3)
    assert [amount for amount, _ in log] == [1.0, 3.0] and model.controls == ()


def test_partial_is_the_sampler_stopped(model):
    condition = model.encode(PROMPTS)
    latents, time = model.partial(condition, [0, 1, 2], steps=4, stop=2, guidance=3.0)
    assert int(time) == int(model.timesteps(4)[2]) and latents.shape == (3, *model.latent_shape)
    start, _ = model.partial(condition, [0, 1, 2], steps=4, stop=0, guidance=3.0)
    assert torch.equal(start, model.initial_noise([0, 1, 2])) and not torch.equal(start, latents)


def test_half_precision_runs():
    half = tiny_diffusion(dtype=torch.bfloat16)
    assert isinstance(half, DiffusionModel) and half.generate("a star").dtype == np.uint8


def test_a_model_goes_where_another_one_stands():
    low, high = tiny_diffusion(dtype=torch.bfloat16), tiny_diffusion(1)
    assert high.beside(low) is high and high.dtype == torch.bfloat16
    assert all(p.dtype == torch.bfloat16 for p in high.tensors().values())


def test_a_mask_of_the_text_encoder_is_the_stock_pipelines():
    """Where an encoder asks for one, the UNet is given none, and an end token that also pads is seen once."""
    model = tiny_diffusion()
    model.text_encoder.config.use_attention_mask = True
    model.pipeline.set_progress_bar_config(disable=True)
    stock = model.pipeline(
        "a star", latents=model.initial_noise([1]), num_inference_steps=2, guidance_scale=3.0, output_type="np"
    ).images  # fmt: skip
    own = model.generate("a star", seeds=[1], steps=2, guidance=3.0)
    assert np.abs(own / 255.0 - stock).max() < 0.01
