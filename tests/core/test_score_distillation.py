"""SiD: losses by hand and against three separate networks, turns, averages, dropout, one-step sampling."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from expunge.core import finetune
from expunge.core.layer_choice import trainable
from expunge.core.score_distillation import (
    Asked,
    Distillation,
    OneStepSampling,
    Relabelling,
    dropping,
    generator_loss,
    in_place,
    losses_by_turn,
)
from expunge.errors import SettingError
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

TEXTS = ["a red star", "a blue circle"]


@dataclasses.dataclass
class Settings:
    t_init: int = 625
    t_min: int = 20
    t_max: int = 980
    alpha: float = 1.2
    guidance: float = 1.0
    fake_guidance: float = 1.0
    loss: str = "sid"
    clip: float | None = None
    ema: float = 0.0
    dropout: bool = False


def asked(model, other=TEXTS, weights=(0.5, 0.25)):
    own, teacher = model.encode(TEXTS), model.encode(list(other))
    empty = model.unconditional().repeat(2)
    rows = torch.tensor(weights)
    return Asked(own, teacher, own, rows, rows, empty, empty)


def task(model, other=TEXTS, relabel=None, moved=0.0, **settings):
    pairs = trainable(model, "full")
    teacher = {n: p.detach().clone() for n, p in pairs}
    rows = asked(model, other)
    made = Distillation(
        model, pairs, teacher, lambda draw, turn: rows, Settings(**settings), relabel
    )
    with torch.no_grad():
        for index, (_, parameter) in enumerate(made.fakes):
            noise = torch.Generator().manual_seed(index)
            parameter.add_(moved * torch.randn(parameter.shape, generator=noise))
    return made


def gradients(made, index, group):
    step = finetune.Step(index, 4, 0)
    parameters = [p for _, p in made.parameters()[group]]
    for parameter in parameters:
        parameter.requires_grad_(True)
    loss = made.step(step)[group]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return float(loss.detach()), torch.cat([g.flatten() for g in found if g is not None])


# -- the loss on numbers ------------------------------------------------------------------------------


def test_the_loss_by_hand():
    clean = torch.tensor([[[[0.0, 1.0]]], [[[2.0, 2.0]]]])
    teacher = torch.tensor([[[[0.5, 0.0]]], [[[2.0, 2.0]]]])
    fake = torch.tensor([[[[0.25, 0.5]]], [[[1.0, 3.0]]]])
    # First: differences 0.25, -0.5; x0_p - x_g 0.5, -1; omega 0.75.  Second: omega is its floor.
    first = (0.25 * (0.5 - 1.2 * 0.25) - 0.5 * (-1 + 1.2 * 0.5)) / 0.75
    second = (1.0 * (0 - 1.2) + -1.0 * (0 + 1.2)) / 1e-5
    torch.testing.assert_close(
        generator_loss(clean, teacher, fake, 1.2), torch.tensor([first, second])
    )
    short = (0.25 * 0.25 - 0.5 * (0.5 - 1.0)) / 0.75  # alpha 1: (x0_p - x0_psi)(x0_psi - x_g)
    assert float(generator_loss(clean, teacher, fake, 1.0)[0]) == pytest.approx(short)


def test_omega_has_no_gradient():
    clean = torch.tensor([[[[0.3, 0.7]]]], requires_grad=True)
    teacher, fake = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.5, 0.5]]]])
    (gradient,) = torch.autograd.grad(generator_loss(clean, teacher, fake, 1.2).sum(), clean)
    omega = (teacher - clean.detach()).abs().mean()
    torch.testing.assert_close(gradient, -(teacher - fake) / omega)


# -- against three networks of their own -------------------------------------------------------------


def reference(made, model, index, guidance, other=TEXTS):
    """Loss and gradient of three deep copies, written out."""
    settings, step = made.settings, finetune.Step(index, 4, 0)
    theta, teacher = copy.deepcopy(model.denoiser), copy.deepcopy(model.denoiser)
    psi = copy.deepcopy(model.denoiser)
    with torch.no_grad():
        for (_, value), parameter in zip(made.fakes, psi.parameters(), strict=True):
            parameter.copy_(value)
    bars = model.scheduler.alphas_cumprod
    draw = step.generator("noise")
    noise = torch.randn(2, 4, 8, 8, generator=draw)
    own, target = model.encode(TEXTS).embeddings, model.encode(list(other)).embeddings
    empty = model.unconditional().embeddings.repeat(2, 1, 1)

    def net(module, x, t, c, weight):
        plain = module(x, t, encoder_hidden_states=c).sample
        if weight == 1:
            return plain
        none = module(x, t, encoder_hidden_states=empty).sample
        return none + weight * (plain - none)

    theta.requires_grad_(index % 2 == 1)
    psi.requires_grad_(index % 2 == 0)
    a = bars[settings.t_init]
    x_T = (1 - a).sqrt() * noise
    init = torch.full((2,), settings.t_init)
    x_g = x_T / a.sqrt() - (1 / a - 1).sqrt() * net(theta, x_T, init, own, 1)
    t = torch.randint(settings.t_min, settings.t_max, (2,), generator=draw)
    e = torch.randn(x_g.shape, generator=draw)
    bar = bars[t].reshape(-1, 1, 1, 1)
    x_t = bar.sqrt() * x_g + (1 - bar).sqrt() * e
    weights = torch.tensor([0.5, 0.25])
    if index % 2 == 0:
        x_t = x_t.detach()
        loss = (weights * (e - net(psi, x_t, t, own, guidance)).square().sum((1, 2, 3))).sum()
        found = torch.autograd.grad(loss, list(psi.parameters()), allow_unused=True)
    else:
        p = (x_t - (1 - bar).sqrt() * net(teacher, x_t, t, target, guidance)) / bar.sqrt()
        f = (x_t - (1 - bar).sqrt() * net(psi, x_t, t, own, guidance)) / bar.sqrt()
        omega = (p - x_g).abs().mean((1, 2, 3), keepdim=True).detach().clamp_min(1e-5)
        r = (p - f) * ((p - x_g) - settings.alpha * (p - f)) / omega
        loss = (weights * r.sum((1, 2, 3))).sum()
        found = torch.autograd.grad(loss, list(theta.parameters()), allow_unused=True)
    return float(loss.detach()), torch.cat([g.flatten() for g in found if g is not None])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("index", [0, 1])
def test_loss_and_gradient_are_those_of_three_networks(index, guidance):
    model = tiny_diffusion()
    other = ["a green heart", "a blue circle"]
    made = task(model, other, moved=0.02, guidance=guidance, fake_guidance=guidance)
    loss, gradient = gradients(made, index, ("fake", "generator")[index])
    wanted, expected = reference(made, model, index, guidance, other)
    assert loss == pytest.approx(wanted, rel=1e-3)
    assert float((gradient - expected).norm() / expected.norm()) < 1e-3


def test_where_the_fake_network_is_the_teacher_there_is_nothing_to_learn_unless_something_is_forgotten():
    model = tiny_diffusion()
    loss, gradient = gradients(task(model), 1, "generator")
    assert abs(loss) < 1e-3 and gradient.abs().max() < 1e-3
    _, moved = gradients(task(model, ["a green heart", "a blue circle"]), 1, "generator")
    assert moved.norm() > 100 * gradient.norm()


def test_diff_instruct_leaves_the_direct_term_whatever_alpha_is():
    model = tiny_diffusion()
    _, one = gradients(task(model, moved=0.02, loss="diff-instruct", alpha=1.2), 1, "generator")
    _, two = gradients(task(model, moved=0.02, loss="diff-instruct", alpha=0.5), 1, "generator")
    _, sid = gradients(task(model, moved=0.02), 1, "generator")
    assert torch.equal(one, two) and not torch.allclose(one, sid)
    made = task(model, moved=0.02, loss="diff-instruct")
    step = finetune.Step(1, 4, 0)
    parameters = [p.requires_grad_(True) for _, p in made.trained]
    draw = step.generator("noise")
    clean = made.generated(model.encode(TEXTS), draw)
    noised, times, _ = made._noised(clean.detach(), draw)
    with torch.no_grad(), in_place(model.denoiser, made.fake):
        fake = model.predict(noised, times, model.encode(TEXTS)).x0(noised)
    with torch.no_grad(), in_place(model.denoiser, made.teacher):
        teacher = model.predict(noised, times, model.encode(TEXTS)).x0(noised)
    omega = (teacher - clean.detach()).abs().mean((1, 2, 3), keepdim=True)
    weights = torch.tensor([0.5, 0.25]).reshape(2, 1, 1, 1)
    found = torch.autograd.grad(
        clean, parameters, -weights * (teacher - fake) / omega, allow_unused=True
    )
    expected = torch.cat([g.flatten() for g in found if g is not None])
    assert float((one - expected).norm() / expected.norm()) < 1e-4


# -- machinery ----------------------------------------------------------------------------------------


def test_tensors_take_turns_and_graphs_keep_what_they_used():
    layer = nn.Linear(2, 2, bias=False)
    own, other = layer.weight, torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    x = torch.ones(1, 2, requires_grad=True)
    with in_place(layer, {own: other}):
        made = layer(x)
    assert layer.weight is own
    with torch.no_grad():
        own.zero_()
    (gradient,) = torch.autograd.grad(made.sum(), x)
    assert gradient.tolist() == [[4.0, 6.0]]
    with pytest.raises(ZeroDivisionError), in_place(layer, {own: other}):
        raise ZeroDivisionError
    assert layer.weight is own


def test_dropout_is_drawn_from_its_own_generator():
    layers = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.0)).eval()
    x, state = torch.ones(1000), torch.get_rng_state()
    with dropping(layers, torch.Generator().manual_seed(0)):
        one = layers(x)
    with dropping(layers, torch.Generator().manual_seed(0)):
        assert torch.equal(layers(x), one)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(layers(x), x)
    assert set(one.tolist()) == {0.0, 2.0} and 0.4 < float((one == 0).float().mean()) < 0.6


def test_turns_average_and_clipping():
    model = tiny_diffusion()
    made = task(model, ema=0.75, clip=1e-4)
    start = {n: p.detach().clone() for n, p in made.trained}
    loop = finetune.Loop(4, finetune.Optimiser(1e-3, "sgd", betas=(0.0, 0.0)))
    seen = []
    plain = made.gradients

    def watched(step, group, found):
        plain(step, group, found)
        seen.append((step.index, group, max(float(g.abs().max()) for g in found.values())))

    made.gradients = watched
    trained = finetune.fit(made, loop, seed=0, modules=tuple(model.parts().values()))
    assert [(i, g) for i, g, _ in seen] == [
        (0, "fake"),
        (1, "generator"),
        (2, "fake"),
        (3, "generator"),
    ]
    assert all(most <= 1e-4 * 1.001 for *_, most in seen)
    name = next(iter(start))
    moved = trained.values[name] - start[name]
    averaged = made.averaged[name] - start[name]
    assert float(moved.abs().max()) <= 2 * 1e-3 * 1e-4 * 1.01
    # After two turns the average holds a quarter of the last value and 3/16 of the first.
    assert averaged.norm() < 0.5 * moved.norm() + 1e-12
    found = losses_by_turn(trained.losses, 1)
    assert {group: len(values) for group, values in found.items()} == {"fake": 1, "generator": 1}


def test_rows_that_are_not_finite_are_left_out_in_half_precision_only():
    half, full = task(tiny_diffusion(dtype=torch.bfloat16)), task(tiny_diffusion())
    values, weights = torch.tensor([1.0, torch.nan]), torch.tensor([0.5, 0.5])
    assert float(half._mean(values, weights)) == 0.5
    assert torch.isnan(full._mean(values, weights))
    gradient = {"x": torch.tensor([torch.nan, torch.inf, -3.0])}
    half.settings.clip = 1.0
    half.gradients(finetune.Step(0, 1, 0), "fake", gradient)
    assert gradient["x"].tolist() == [0.0, 1.0, -1.0]


@pytest.mark.parametrize(
    "times",
    [{"t_min": 500, "t_max": 500}, {"t_max": 1001}, {"t_init": 1000}, {"t_min": -1}],
)
def test_times_off_the_schedule_are_refused(times):
    with pytest.raises(SettingError, match="training timesteps"):
        task(tiny_diffusion(), **times)


# -- one step and its control -------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_one_step_is_the_equation(prediction):
    model = tiny_diffusion(prediction_type=prediction)
    condition, plain = model.encode(TEXTS), model.sample(model.encode(TEXTS), [3, 4])
    with model.controlled(OneStepSampling(440)):
        before = model.cost.snapshot()
        made = model.sample(condition, [3, 4], guidance=7.5, steps=20)
        assert model.cost.rows("denoiser", before) == 2
        assert model.timesteps(50).tolist() == [440]
    a = model.scheduler.alphas_cumprod[440]
    x_T = (1 - a).sqrt() * model.initial_noise([3, 4])
    value = model.denoiser(x_T, 440, encoder_hidden_states=condition.embeddings).sample
    noise = value if prediction == "epsilon" else (1 - a).sqrt() * x_T + a.sqrt() * value
    wanted = x_T / a.sqrt() - (1 / a - 1).sqrt() * noise
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(model.sample(condition, [3, 4]), plain)


def test_relabelling_asks_the_multi_step_model_for_something_else():
    model = tiny_diffusion()
    swapped = model.generate(["a blue circle", "a blue circle"], seeds=[3, 4])
    plain = model.generate(TEXTS, seeds=[3, 4])
    with model.controlled(Relabelling(model, {"a red star": "a blue circle"})):
        made = model.generate(TEXTS, seeds=[3, 4])
        assert np.array_equal(model.generate("a heart", seeds=1, negative="a red star"),
                              tiny_diffusion().generate("a heart", seeds=1, negative="a red star"))  # fmt: skip
    assert np.array_equal(made, swapped) and not np.array_equal(made[0], plain[0])
    assert np.array_equal(made[1], plain[1])


def test_relabelling_in_a_layout_with_pooled_vectors():
    model = tiny_layout("sdxl")
    swapped = model.generate(["a blue circle", "a blue circle"], seeds=[3, 4])
    with model.controlled(Relabelling(model, {"a red star": "a blue circle"})):
        assert np.array_equal(model.generate(TEXTS, seeds=[3, 4]), swapped)
