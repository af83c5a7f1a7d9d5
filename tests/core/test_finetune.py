"""The training loop: exact restoring, exact resume after a real kill, groups, hooks, failures."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from expunge.concept import Concept
from expunge.core import finetune
from expunge.core.finetune import Loop, Optimiser, Step, Task, fit
from expunge.errors import NonFiniteError, ResumeMismatch, RunError, SettingError
from expunge.method import Method
from expunge.models.base import noise_generator
from expunge.testing.models import tiny_language

SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
from test_finetune import Regression, network, LOOP
from expunge.core.finetune import fit
net = network()
fit(Regression(net, pause=0.02), LOOP, seed=3, modules=[net], run=sys.argv[1])
"""

LOOP = Loop(
    steps=40, optimiser=Optimiser(lr=5e-2, name="adamw", warmup=5, schedule="cosine", clip=1.0)
)


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=noise_generator(0, "net", name)))
    return net.to(dtype)


class Regression(Task):
    """Random inputs to zero, fresh at every step; keeps a state of its own."""

    def __init__(self, net: nn.Module, pause: float = 0.0) -> None:
        self.net, self.pause = net, pause
        self.memory = torch.zeros(3)

    def parameters(self) -> finetune.Groups:
        return {
            "weights": [(n, p) for n, p in self.net.named_parameters() if not n.startswith("0.")]
        }

    def step(self, step: Step) -> dict[str, torch.Tensor]:
        time.sleep(self.pause)
        dtype = next(self.net.parameters()).dtype
        out = self.net(torch.randn(16, 6, generator=step.generator("inputs")).to(dtype)).float()
        self.memory = 0.9 * self.memory + 0.1 * out.detach().mean(0)
        return {"weights": (out - self.memory).square().mean()}

    def state(self) -> dict[str, torch.Tensor]:
        return {"memory": self.memory}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        self.memory = state["memory"]


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_training_changes_the_values_it_returns_and_leaves_the_model_as_it_was() -> None:
    net = network().train()
    net[0].weight.requires_grad_(False)
    net[3].bias.grad = torch.ones(3)
    before, state = values(net), torch.random.get_rng_state()
    trained = fit(Regression(net), LOOP, seed=0, modules=[net])
    assert equal(values(net), before)
    assert not torch.equal(trained.values["3.weight"], before["3.weight"])
    assert set(trained.values) == {"3.weight", "3.bias"}
    assert trained.losses["weights"][-1] < trained.losses["weights"][0] / 2
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert net.training and net[2].training and torch.equal(net[3].bias.grad, torch.ones(3))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_one_step_of_adam_is_that_of_the_formula() -> None:
    net = network()
    task = Regression(net)
    trained = fit(task, Loop(1, Optimiser(lr=0.01)), seed=5, modules=[net])
    task.memory = torch.zeros(3)
    net.eval()
    loss = task.step(Step(0, 1, 5))["weights"]
    (gradient,) = torch.autograd.grad(loss, [net[3].weight])
    # At the first step both moments are bias-corrected to g and g^2.
    expected = net[3].weight - 0.01 * gradient / (gradient.abs() + 1e-8)
    torch.testing.assert_close(trained.values["3.weight"], expected.detach())


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    script = SCRIPT.format(here=str(Path(__file__).parent))
    child = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], env=dict(os.environ))
    checkpoint = tmp_path / "training.safetensors"
    limit = time.monotonic() + 200
    try:
        while not checkpoint.exists() and child.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        child.send_signal(signal.SIGKILL)
        code = child.wait()
    assert code == -signal.SIGKILL and checkpoint.exists()
    net = network()
    resumed = fit(Regression(net), LOOP, seed=3, modules=[net], run=tmp_path)
    whole = fit(Regression(net), LOOP, seed=3, modules=[net])
    assert 0 < resumed.resumed < 40 and whole.resumed == 0
    assert equal(resumed.values, whole.values) and resumed.losses == whole.losses
    # Control: one step short differs, so equality is not an accident.
    short = fit(_StopAt(net, 39), LOOP, seed=3, modules=[net])
    assert short.steps == 39 and short.stopped and not equal(short.values, whole.values)
    # A finished run is only read.
    again = fit(_Refuses(net), LOOP, seed=3, modules=[net], run=tmp_path)
    assert equal(again.values, whole.values) and again.resumed == 40


class _StopAt(Regression):
    def __init__(self, net: nn.Module, steps: int) -> None:
        super().__init__(net)
        self.steps = steps

    def after(self, step: Step, losses: object) -> bool:
        return step.index + 1 == self.steps


class _Refuses(Regression):
    def step(self, step: Step) -> dict[str, torch.Tensor]:
        raise AssertionError("a finished run took a step")


class _Interrupted(Regression):
    def step(self, step: Step) -> dict[str, torch.Tensor]:
        if step.index == 7:
            raise KeyboardInterrupt
        return super().step(step)


def test_an_interrupt_writes_a_checkpoint_of_the_last_whole_step(tmp_path: Path) -> None:
    net = network()
    before = values(net)
    rare = Loop(40, LOOP.optimiser, checkpoint_every=1000)
    with pytest.raises(KeyboardInterrupt):
        fit(_Interrupted(net), rare, seed=3, modules=[net], run=tmp_path)
    assert equal(values(net), before)
    resumed = fit(Regression(net), rare, seed=3, modules=[net], run=tmp_path)
    assert resumed.resumed == 7
    assert equal(resumed.values, fit(Regression(net), LOOP, seed=3, modules=[net]).values)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 4}, "seed"),
        ({"loop": Loop(41, LOOP.optimiser)}, "loop.steps"),
        ({"loop": Loop(40, Optimiser(lr=0.5))}, "loop.optimiser"),
        ({"settings": {"eta": 2.0}}, "settings.eta"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path: Path, change: dict, field: str) -> None:
    net = network()
    asked = {"loop": LOOP, "seed": 3, "settings": {"eta": 1.0}, "modules": [net], "run": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        fit(_Interrupted(net), **asked)
    with pytest.raises(ResumeMismatch, match=field.replace(".", r"\.")):
        fit(Regression(net), **{**asked, **change})
    assert fit(Regression(net), **asked).resumed == 7


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    net = network()
    (tmp_path / "training.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(RunError, match="damaged"):
        fit(Regression(net), LOOP, seed=3, modules=[net], run=tmp_path)


class _Explodes(Regression):
    def __init__(self, net: nn.Module, what: str) -> None:
        super().__init__(net)
        self.what = what

    def step(self, step: Step) -> dict[str, torch.Tensor]:
        loss = super().step(step)["weights"]
        if step.index == 4 and self.what == "loss":
            loss = loss * math.nan
        if step.index == 4 and self.what == "gradient":
            # The value is finite; the derivative of the root at 0 is not.
            loss = loss + (self.net[3].bias - self.net[3].bias).square().sum().sqrt()
        return {"weights": loss}


@pytest.mark.parametrize(("what", "words"), [("loss", "step 5"), ("gradient", r"3\.bias.*step 5")])
def test_nan_stops_with_step_and_tensor_and_restores(what: str, words: str) -> None:
    net = network()
    before = values(net)
    with pytest.raises(NonFiniteError, match=words):
        fit(_Explodes(net, what), LOOP, seed=3, modules=[net])
    assert equal(values(net), before)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


class _Game(Task):
    """Two players with opposite losses of one graph; each may move its own parameters only."""

    def __init__(self) -> None:
        self.a, self.b = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))

    def parameters(self) -> finetune.Groups:
        return {"a": [("a", self.a)], "b": [("b", self.b)]}

    def step(self, step: Step) -> dict[str, torch.Tensor]:
        product = (self.a * self.b).sum()
        return {"a": product, "b": -product} if step.index % 2 == 0 else {"a": product}


def test_groups_have_their_own_losses_optimisers_and_rests() -> None:
    sgd = Optimiser(lr=0.1, name="sgd", betas=(0.0, 0.0))
    loop = Loop(2, sgd, groups={"b": Optimiser(lr=0.5, name="sgd", betas=(0.0, 0.0))})
    trained = fit(_Game(), loop, seed=0)
    # a: 2 - 0.1*3 = 1.7, b: 3 + 0.5*2 = 4; then a alone: 1.7 - 0.1*4 = 1.3
    assert trained.values["a"].item() == pytest.approx(1.3)
    assert trained.values["b"].item() == pytest.approx(4.0)
    assert math.isnan(trained.losses["b"][1]) and trained.report()["losses"]["b"] == [-6.0, None]


class _Masked(Regression):
    def gradients(self, step: Step, group: str, gradients: dict[str, torch.Tensor]) -> None:
        gradients["3.weight"][0] = 0


def test_a_mask_on_gradients_holds_rows_still() -> None:
    net = network()
    loop = Loop(5, Optimiser(lr=0.1))
    moved = fit(_Masked(net), loop, seed=0, modules=[net]).values["3.weight"] - net[3].weight
    assert torch.equal(moved[0], torch.zeros(8)) and moved[1:].abs().min() > 0
    free = fit(Regression(net), loop, seed=0, modules=[net]).values["3.weight"] - net[3].weight
    assert free[0].abs().max() > 0


class _Teacher(Regression):
    """Stays at the original: the teacher's prediction of the same weights before training."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.gaps: list[float] = []
        self.first = values(net)

    def step(self, step: Step) -> dict[str, torch.Tensor]:
        inputs = torch.randn(4, 6, generator=step.generator("inputs"))
        student = self.net(inputs)
        with step.original():
            assert equal(values(self.net), self.first)
            teacher = self.net(inputs)
        assert not teacher.requires_grad
        self.gaps.append(float((student - teacher).abs().max().detach()))
        return {"weights": (student - 2 * teacher).square().mean()}


def test_the_teacher_is_the_same_weights_from_before() -> None:
    net = network()
    task = _Teacher(net)
    trained = fit(task, Loop(30, Optimiser(lr=0.05)), seed=0, modules=[net])
    assert task.gaps[0] == 0.0 and task.gaps[1] > 0
    assert trained.losses["weights"][-1] < 0.1 * trained.losses["weights"][0]


def test_half_precision_weights_move_by_less_than_their_rounding() -> None:
    net = network(torch.bfloat16)
    before = values(net)
    trained = fit(Regression(net), Loop(20, Optimiser(lr=1e-5)), seed=0, modules=[net])
    moved = (trained.values["3.weight"] - before["3.weight"].float()).abs()
    assert trained.values["3.weight"].dtype == torch.float32
    # 20 steps of 1e-5: each is lost in bfloat16, whose spacing near 1 is 0.0078.
    assert 1e-4 < moved.max() < 3e-4
    assert equal(values(net), before)


class _Beside(Task):
    """Float32 factors beside a float16 layer, and a loss whose gradients vanish in float16."""

    def __init__(self) -> None:
        self.net, self.factor = nn.Linear(4, 4).half(), nn.Parameter(torch.ones(4))

    def parameters(self) -> finetune.Groups:
        return {"changes": [("factor", self.factor)]}

    def step(self, step: Step) -> dict[str, torch.Tensor]:
        made = self.net(torch.ones(2, 4).half()) + self.factor.half()
        return {"changes": made.float().sum() * 1e-8}


@pytest.mark.parametrize("half", [True, False])
def test_float32_factors_beside_float16_weights_get_the_loss_scale(half: bool) -> None:
    task, seen = _Beside(), []
    task.gradients = lambda step, group, named: seen.append(named["factor"].clone())  # type: ignore[method-assign]
    fit(task, Loop(1, Optimiser(lr=0.1)), seed=0, modules=[task.net] if half else [])
    assert seen[0].dtype == torch.float32
    # The control, told of no float16, loses the gradient.
    wanted = torch.full((4,), 2e-8 if half else 0.0)
    torch.testing.assert_close(seen[0], wanted, rtol=0.05, atol=0.0)


class _Parts(Regression):
    def step(self, step: Step) -> dict[str, torch.Tensor]:
        inputs = torch.randn(8, 6, generator=noise_generator(0, "all"))
        part = inputs[step.micro * 4 : step.micro * 4 + 4] if self.pause else inputs
        return {"weights": self.net(part).square().mean()}


def test_accumulated_parts_equal_the_whole_batch() -> None:
    net = network()
    sgd = Optimiser(lr=0.1, name="sgd", betas=(0.0, 0.0))
    whole = fit(_Parts(net, 0), Loop(3, sgd), seed=0, modules=[net])
    parts = fit(_Parts(net, 1), Loop(3, sgd, accumulate=2), seed=0, modules=[net])
    torch.testing.assert_close(whole.values, parts.values)
    assert parts.losses["weights"] == pytest.approx(whole.losses["weights"])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Loop(0, LOOP.optimiser), "at least 1"),
        (lambda: Loop(1, LOOP.optimiser, precision="int8"), "int8"),
        (lambda: fit(_Game(), Loop(1, Optimiser(lr=1, name="lion")), seed=0), "lion"),
        (lambda: fit(_Named(), Loop(1, Optimiser(lr=1)), seed=0), "allowed: a, b"),
    ],
)
def test_wrong_settings_are_refused_in_words(make: object, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        make()


class _Named(_Game):
    def step(self, step: Step) -> dict[str, torch.Tensor]:
        return {"discriminator": self.a.sum()}


class _Quiet(Method):
    id = "quiet"


def test_an_edit_takes_the_smaller_storage_and_leaves_still_tensors_out() -> None:
    model = tiny_language()
    concept = Concept("Ada Morn", "fact")
    before = {name: p.detach().clone() for name, p in model.tensors().items()}
    name = "model.model.layers.0.mlp.up_proj.weight"
    thin = torch.randn(64, 2, generator=noise_generator(0, "up")) @ torch.randn(
        2, 32, generator=noise_generator(0, "down")
    )
    full = torch.randn(64, 32, generator=noise_generator(0, "full"))
    for change, kind in ((thin, "low-rank"), (full, "dense")):
        after = {**before, name: before[name] + change}
        edit = finetune.edit_from(_Quiet(), model, [concept], before, after, seed=3)
        assert edit.kind == kind and [t.name for t in edit.manifest.targets] == [name]
        with edit.on(model):
            torch.testing.assert_close(
                model.tensor(name).detach(), after[name], atol=1e-5, rtol=1e-5
            )
        assert torch.equal(model.tensor(name), before[name])


def test_autocast_does_not_serve_the_students_weights_to_the_teacher() -> None:
    net = network()
    seen = []

    class Both(Regression):
        def step(self, step: Step) -> dict[str, torch.Tensor]:
            inputs = torch.randn(4, 6, generator=noise_generator(0, "fixed"))
            student = self.net(inputs)
            with step.original():
                teacher = self.net(inputs)
            seen.append(teacher.float().clone())
            return {"weights": (student.float() - 2 * teacher.float()).square().mean()}

    fit(Both(net), Loop(4, Optimiser(lr=0.1), precision="bfloat16"), seed=0, modules=[net])
    assert all(torch.equal(t, seen[0]) for t in seen) and seen[0].dtype == torch.float32


# -- masks -----------------------------------------------------------------------------------------


class _Held(Regression):
    """Half of the weights may move; the bias is free."""

    def movable(self) -> dict[str, torch.Tensor]:
        return {"3.weight": torch.arange(24).reshape(3, 8) % 2 == 0}


DECAYING = Loop(
    steps=12, optimiser=Optimiser(lr=5e-2, name="adamw", weight_decay=0.3, clip=1.0), checkpoint_every=5
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_masked_entries_end_bit_for_bit_where_they_began(name: str, dtype: torch.dtype) -> None:
    net = network(dtype)
    loop = Loop(12, Optimiser(lr=5e-2, name=name, weight_decay=0.3))
    trained = fit(_Held(net), loop, seed=0, modules=[net])
    mask, value = _Held(net).movable()["3.weight"], trained.values["3.weight"]
    assert torch.equal(value[~mask], trained.before["3.weight"][~mask].float())
    assert bool((value[mask] != trained.before["3.weight"][mask].float()).all())
    assert bool((trained.values["3.bias"] != trained.before["3.bias"].float()).all())
    # Control: without the mask the same entries move.
    free = fit(Regression(net), loop, seed=0, modules=[net])
    assert bool((free.values["3.weight"][~mask] != value[~mask]).all())


def test_masked_training_is_training_of_the_free_entries_alone() -> None:
    """As if the masked entries were constants: gradient, clip and moments see the free ones only."""
    net = network()
    trained = fit(_Held(net), DECAYING, seed=4, modules=[net])
    mask = _Held(net).movable()["3.weight"]
    free = nn.Parameter(net[3].weight.detach()[mask].clone())
    fixed = net[3].weight.detach().clone()

    class Apart(Regression):
        def parameters(self) -> finetune.Groups:
            return {"weights": [("free", free), ("3.bias", net[3].bias)]}

        def step(self, step: Step) -> dict[str, torch.Tensor]:
            weight = fixed.masked_scatter(mask, free)
            inputs = torch.randn(16, 6, generator=step.generator("inputs"))
            out = nn.functional.linear(net[1](net[0](inputs)), weight, net[3].bias)
            self.memory = 0.9 * self.memory + 0.1 * out.detach().mean(0)
            return {"weights": (out - self.memory).square().mean()}

    apart = fit(Apart(net), DECAYING, seed=4, modules=[net])
    torch.testing.assert_close(trained.values["3.weight"][mask], apart.values["free"])
    torch.testing.assert_close(trained.values["3.bias"], apart.values["3.bias"])


def test_masked_runs_resume_bit_for_bit_and_refuse_another_mask(tmp_path: Path) -> None:
    net = network()

    class Stops(_Held):
        def step(self, step: Step) -> dict[str, torch.Tensor]:
            if step.index == 7:
                raise RuntimeError("on purpose")
            return super().step(step)

    with pytest.raises(RuntimeError, match="on purpose"):
        fit(Stops(net), DECAYING, seed=1, modules=[net], run=tmp_path)

    class Other(Regression):
        def movable(self) -> dict[str, torch.Tensor]:
            return {"3.weight": torch.arange(24).reshape(3, 8) % 3 == 0}

    with pytest.raises(ResumeMismatch, match="masks"):
        fit(Other(net), DECAYING, seed=1, modules=[net], run=tmp_path)
    resumed = fit(_Held(net), DECAYING, seed=1, modules=[net], run=tmp_path)
    whole = fit(_Held(net), DECAYING, seed=1, modules=[net])
    assert resumed.resumed == 5 and equal(resumed.values, whole.values)


@pytest.mark.parametrize(
    ("masks", "said"),
    [
        ({"0.weight": torch.ones(8, 6, dtype=torch.bool)}, "not trained"),
        ({"3.weight": torch.ones(3, 8)}, "bool"),
        ({"3.weight": torch.ones(8, dtype=torch.bool)}, "shape"),
    ],
)
def test_masks_that_fit_nothing_are_refused(masks: dict[str, torch.Tensor], said: str) -> None:
    net = network()
    task = Regression(net)
    task.movable = lambda: masks  # type: ignore[method-assign]
    with pytest.raises(SettingError, match=said):
        fit(task, LOOP, seed=0, modules=[net])


def test_groups_that_share_a_loss_share_a_backward_pass() -> None:
    """And are moved as by losses of their own."""
    passes = []

    class Two(Regression):
        shared = True

        def parameters(self) -> finetune.Groups:
            return {
                "weight": [("3.weight", self.net[3].weight)],
                "others": [("3.bias", self.net[3].bias), ("0.weight", self.net[0].weight)],
            }

        def step(self, step: Step) -> dict[str, torch.Tensor]:
            loss = super().step(step)["weights"]
            if loss.requires_grad:
                loss.register_hook(lambda gradient: passes.append(step.index))
            return {"weight": loss, "others": loss if self.shared else loss * 1.0}

    net, own = network(), Optimiser(lr=0.1, name="sgd")
    loop = Loop(3, Optimiser(lr=1e-2, name="adamw"), groups={"others": own})
    together = fit(Two(net), loop, seed=4, modules=[net])
    assert passes == [0, 1, 2]
    task = Two(net)
    task.shared = False
    apart = fit(task, loop, seed=4, modules=[net])
    assert passes == [0, 1, 2, 0, 0, 1, 1, 2, 2]
    assert equal(together.values, apart.values) and together.losses == apart.losses
    assert not torch.equal(together.values["0.weight"], together.before["0.weight"])
