"""Score identity Distillation (SiD): a denoiser becomes a generator that answers in one step, without any picture.

Three networks of one architecture take part: the frozen teacher ``p``, the generator ``theta`` and the fake network
``psi``, which is kept at the score of what the generator draws by now.  They take turns; nobody sees data.

Sources: Zhou et al., ICML 2024 (arXiv 2404.04057); Score Forgetting Distillation, ICLR 2025 (arXiv 2409.11219), whose
code asks teacher and fake network about conditions that may differ; Diff-Instruct (arXiv 2305.18455).

    generator   x_T = sigma_init n,  n ~ N(0, I);   x_g = x0( theta(x_T, t_init, c) )
    noising     x_t = alpha_t x_g + sigma_t e
    fake        L_psi = w || e - eps_psi(x_t, t, c) ||^2                                    x_g without gradient
    generator   R = sum (x0_p - x0_psi) [ (x0_p - x_g) - alpha (x0_p - x0_psi) ] / omega
                omega = mean |x0_p - x_g|, without gradient, at least 1e-5
    L_theta = w R

Sums run over the elements of a picture's latents ``(c, h, w)``, losses are means over the pictures of a batch.  The
gradient of ``L_theta`` goes through ``x_t`` into both networks.  Diff-Instruct takes both as constants: what is left is
``- (x0_p - x0_psi) / omega``, whatever ``alpha`` is.

The three networks share one module: their tensors take turns in its places, so every layout serves.  Odd steps of the
training loop train the generator, even ones the fake network: an iteration is two.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..method import Control
from ..models.diffusion import DiffusionModel
from ..models.types import Condition, Prediction, PredictionKind
from .tasks import Groups, Step, Task

__all__ = [
    "Asked", "Distillation", "OneStep", "OneStepSampling", "Relabelling", "dropping", "generator_loss", "in_place",
    "losses_by_turn", "one_step",
]  # fmt: skip

FLOOR = 1e-5
"""omega is at least this."""

FAR = 1e5
"""What stands for an infinite entry of a half-precision gradient before it is clipped."""


def generator_loss(clean: Tensor, teacher: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """``R`` of each picture, ``(n,)``.

    Args:
        clean: ``x_g``, ``(n, c, h, w)``.
        teacher, fake: ``x0_p`` and ``x0_psi``.
        alpha: Weight of the term that SiD takes away; 1 leaves ``(x0_p - x0_psi)(x0_psi - x_g) / omega``.
    """
    axes = tuple(range(1, clean.ndim))
    omega = (teacher - clean).detach().abs().mean(axes).clamp_min(FLOOR)
    apart = teacher - fake
    return (apart * ((teacher - clean) - alpha * apart)).sum(axes) / omega


# -- sampling in one step ------------------------------------------------------------------------------


class OneStep:
    """The walk of a one-step generator, in the form of :class:`~expunge.models.samplers.Sampler`.

    Args:
        kind: What the denoiser predicts.
        alpha, sigma: Noise level at ``t_init``.
        time: ``t_init``, ``(1,)``.
    """

    guided = False

    def __init__(self, kind: PredictionKind, alpha: Tensor, sigma: Tensor, time: Tensor) -> None:
        self.kind, self.alpha, self.sigma, self.times = kind, alpha, sigma, time
        self.stops = range(1)

    def start(self, noise: Tensor) -> Tensor:
        """``x_T``: noise of the size it has at ``t_init``, and no picture in it."""
        return self.sigma * noise

    def seen(self, latents: Tensor, time: Tensor) -> Tensor:
        """The latents as they are."""
        return latents

    def step(self, value: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        """``x_g``."""
        return Prediction(self.kind, value, self.alpha, self.sigma).x0(latents)


def one_step(model: DiffusionModel, t_init: int) -> OneStep:
    """The walk of a generator that was distilled at ``t_init``."""
    time = torch.tensor([t_init], device=model.device)
    return OneStep(model.prediction_kind, *model.alpha_sigma(time), time)


class OneStepSampling(Control):
    """The denoiser is a generator: one pass from noise to picture, without guidance, whatever steps are asked for."""

    def __init__(self, t_init: int) -> None:
        self.t_init = t_init

    def sampler(self, model: Any, steps: int, generators: Sequence[Any]) -> OneStep:
        """The walk of one step."""
        return one_step(model, self.t_init)


class Relabelling(Control):
    """A multi-step model asked for something else in the place of certain texts or classes; nothing is learnt.

    What a distilled generator is to draw for them, drawn by its teacher: the control that stands beside it.

    Args:
        model: Encodes what is asked for instead.
        instead: Text -> text that takes its place; rows of other texts stay as they are.
    """

    def __init__(self, model: DiffusionModel, instead: Mapping[str, str]) -> None:
        self.model, self.instead = model, dict(instead)

    def condition(self, context: Any, condition: Condition) -> Condition:
        """The condition with the rows of these texts exchanged, on the conditional branch."""
        texts = condition.texts or ()
        wanted = [self.instead.get(text) if text is not None else None for text in texts]
        if context.conditional is not None:
            pairs = zip(wanted, context.conditional.tolist(), strict=True)
            wanted = [text if own else None for text, own in pairs]
        if not any(text is not None for text in wanted):
            return condition
        rows = [condition.select([i]) for i in range(len(wanted))]
        for index, text in enumerate(wanted):
            if text is not None:
                own = self.model.encode([text])
                rows[index] = dataclasses.replace(own, extra={**rows[index].extra, **own.extra})
        return Condition.concatenate(rows)


# -- training ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_place(module: nn.Module, named: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside the block other tensors stand in the places of a module's parameters; graphs keep what they used.

    Args:
        module: Its submodules are searched, shared parameters included.
        named: Parameter -> the tensor in its place.
    """
    places = [
        (inner._parameters, key, parameter)
        for inner in module.modules()
        for key, parameter in inner._parameters.items()
        if parameter is not None and parameter in named
    ]
    try:
        for held, key, parameter in places:
            held[key] = named[parameter]  # type: ignore[assignment]  # a plain tensor serves in a forward pass
        yield
    finally:
        for held, key, parameter in places:
            held[key] = parameter


@contextlib.contextmanager
def dropping(module: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Dropout as in training, its masks drawn from ``generator`` and not from the process's random state."""

    def drop(layer: Any, args: Any, output: Tensor) -> Tensor:
        given: Tensor = args[0]
        keep = torch.rand(given.shape, generator=generator) >= layer.p
        return given * keep.to(given.device, given.dtype) / (1 - layer.p)

    layers = [m for m in module.modules() if isinstance(m, nn.Dropout) and 0 < m.p < 1]
    handles = [layer.register_forward_hook(drop) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclasses.dataclass(frozen=True)
class Asked:
    """What is asked for in a step, ``n`` rows.

    Attributes:
        generator: What the generator draws; the fake network is trained on it under the same condition.
        teacher, fake: What teacher and fake network are asked for in the generator's step.
        fake_weights, weights: ``w`` of each row in both losses, ``(n,)``; sums of a term's rows make its mean.
        empty: Unconditional branch of the fake network, ``n`` rows; needed where it is guided.
        negative: Unconditional branch of the teacher.
    """

    generator: Condition
    teacher: Condition
    fake: Condition
    fake_weights: Tensor
    weights: Tensor
    empty: Condition | None = None
    negative: Condition | None = None


class Distillation(Task):
    """The losses above, by turns; groups ``fake`` and ``generator``.

    Args:
        model: The teacher as it is now; at ``start`` its parameters may already have other values.
        trained: Canonical names and parameters that train, in generator and fake network alike.
        teacher: Values of these parameters in the teacher.
        draw: ``draw(generator, turn)`` says what is asked for in a step, ``turn`` ``fake`` or ``generator``.
        settings: Read are ``t_init``, ``t_min``, ``t_max``, ``alpha``, ``guidance``, ``fake_guidance``, ``loss``,
            ``clip``, ``ema`` and ``dropout``.
        relabel: ``relabel(x0_psi, rows)`` gives the teacher's condition where that depends on what is drawn.
    """

    def __init__(
        self,
        model: DiffusionModel,
        trained: Sequence[tuple[str, nn.Parameter]],
        teacher: Mapping[str, Tensor],
        draw: Callable[[torch.Generator, str], Asked],
        settings: Any,
        relabel: Callable[[Tensor, Asked, torch.Generator], Condition] | None = None,
    ) -> None:
        check_times(model, settings)
        self.model, self.trained, self.settings = model, list(trained), settings
        self.draw, self.relabel = draw, relabel
        self.fakes = [(f"fake.{n}", nn.Parameter(teacher[n].clone())) for n, _ in self.trained]
        own = [parameter for _, parameter in self.trained]
        self.teacher = {p: teacher[n] for n, p in self.trained}
        self.fake: dict[nn.Parameter, Tensor] = {
            p: fake for p, (_, fake) in zip(own, self.fakes, strict=True)
        }
        self.half = model.dtype in (torch.float16, torch.bfloat16)
        self.walk = one_step(model, settings.t_init)
        self.averaged = (
            {n: p.detach().float().clone() for n, p in self.trained} if settings.ema else {}
        )

    def parameters(self) -> Groups:
        return {"fake": list(self.fakes), "generator": list(self.trained)}

    def step(self, step: Step) -> dict[str, Tensor]:
        """The loss of the network whose turn it is."""
        turn = "generator" if step.index % 2 else "fake"
        rows = self.draw(step.generator("rows"), turn)
        noise = step.generator("noise")
        loss = self._generator(rows, noise, step) if step.index % 2 else self._fake(rows, noise)
        return {turn: loss}

    def generated(self, condition: Condition, noise: torch.Generator) -> Tensor:
        """``x_g`` of fresh noise, float32 ``(n, c, h, w)``."""
        shape = (condition.rows, *self.model.latent_shape)
        drawn = torch.randn(shape, generator=noise).to(self.model.device, self.model.dtype)
        latents = self.walk.start(drawn)
        made = self.model.predict(latents, self.walk.times, condition)
        return made.wide().x0(latents.float())

    def _noised(self, clean: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """``x_t``, ``t`` and the noise that was added."""
        low, high = self.settings.t_min, self.settings.t_max
        if self.model.prediction_kind == "flow":
            times = high - (high - low) * torch.rand(len(clean), generator=noise)
        else:
            times = torch.randint(low, high, (len(clean),), generator=noise)
        added = torch.randn(clean.shape, generator=noise).to(clean.device)
        alpha, sigma = (level.float() for level in self.model.alpha_sigma(times))
        return (alpha * clean + sigma * added).to(self.model.dtype), times, added

    def _asked(
        self,
        noised: Tensor,
        times: Tensor,
        condition: Condition,
        empty: Condition | None,
        weight: float,
    ) -> Prediction:
        """The network in place about ``x_t``, guided where ``weight`` is not 1; float32."""
        if weight == 1.0:
            return self.model.predict(noised, times, condition).wide()
        assert empty is not None
        both, count = Condition.concatenate([empty, condition]), len(noised)
        made = self.model.predict(
            torch.cat([noised, noised]), torch.cat([times, times]), both
        ).wide()
        strength = torch.tensor(weight, device=noised.device)
        return made.select(slice(count, None)).guided(made.select(slice(count)), strength)

    def _fake(self, rows: Asked, noise: torch.Generator) -> Tensor:
        with torch.no_grad():
            clean = self.generated(rows.generator, noise)
            noised, times, added = self._noised(clean, noise)
        guidance = self.settings.fake_guidance
        with in_place(self.model.denoiser, self.fake):
            made = self._asked(noised, times, rows.generator, rows.empty, guidance)
        self.model.cost.add("denoiser", len(noised) * (1 if guidance == 1.0 else 2), "backward")
        errors = (added - made.epsilon(noised.float())).square().sum((1, 2, 3))
        return self._mean(errors, rows.fake_weights)

    def _generator(self, rows: Asked, noise: torch.Generator, step: Step) -> Tensor:
        settings, module = self.settings, self.model.denoiser
        drops = step.generator("dropout")
        with dropping(module, drops) if settings.dropout else contextlib.nullcontext():
            clean = self.generated(rows.generator, noise)
        noised, times, _ = self._noised(clean, noise)
        wide = noised.float()
        # Gradients pass through the networks to x_t and on to the generator, not to their own weights.
        frozen = {p: value.detach() for p, value in self.fake.items()}
        constant = settings.loss == "diff-instruct"
        with torch.no_grad() if constant else contextlib.nullcontext():
            with in_place(module, frozen):
                fake = self._asked(noised, times, rows.fake, rows.empty, settings.fake_guidance).x0(
                    wide
                )
            wanted = rows.teacher
            if self.relabel is not None:
                wanted = self.relabel(fake.detach(), rows, step.generator("labels"))
            with in_place(module, self.teacher):
                empty = rows.empty if rows.negative is None else rows.negative
                teacher = self._asked(noised, times, wanted, empty, settings.guidance).x0(wide)
        passes = (
            1
            if constant
            else 1
            + sum(
                1 if weight == 1.0 else 2 for weight in (settings.guidance, settings.fake_guidance)
            )
        )
        self.model.cost.add("denoiser", len(clean) * passes, "backward")
        alpha = 1.0 if constant else settings.alpha
        return self._mean(generator_loss(clean, teacher, fake, alpha), rows.weights)

    def _mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """Sum of weighted rows; in half precision those that are not finite are left out."""
        weights = weights.to(values.device, values.dtype)
        if self.half:
            fine = torch.isfinite(values.detach())
            values, weights = values[fine], weights[fine]
        return (weights * values).sum()

    def gradients(self, step: Step, group: str, gradients: dict[str, Tensor]) -> None:
        """Clipped entry by entry; in half precision what is not finite is replaced before."""
        for gradient in gradients.values():
            if self.half:
                torch.nan_to_num(gradient, nan=0.0, posinf=FAR, neginf=-FAR, out=gradient)
            if self.settings.clip is not None:
                gradient.clamp_(-self.settings.clip, self.settings.clip)

    def after(self, step: Step, losses: Mapping[str, float]) -> bool:
        """The average of the generator follows it."""
        if step.index % 2:
            now = step.values()
            for name, average in self.averaged.items():
                average.lerp_(now[name].float(), 1 - self.settings.ema)
        return False

    def state(self) -> dict[str, Tensor]:
        return dict(self.averaged)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self.averaged.items():
            value.copy_(state[name])


def check_times(model: DiffusionModel, settings: Any) -> None:
    """Refuse timesteps outside the model's schedule.

    Raises:
        SettingError: ``t_min < t_max`` does not hold, or a time is not on the schedule.
    """
    whole = int(model.pipeline.scheduler.config.num_train_timesteps)
    if not 0 <= settings.t_min < settings.t_max <= whole or not 0 < settings.t_init < whole:
        raise SettingError(
            f"t_min={settings.t_min}, t_max={settings.t_max}, t_init={settings.t_init}; allowed is "
            f"0 <= t_min < t_max <= {whole} and 0 < t_init < {whole}, the model's training timesteps"
        )


def losses_by_turn(
    losses: Mapping[str, Sequence[float]], points: int = 500
) -> dict[str, list[float]]:
    """Each network's losses in its own turns, evenly thinned."""
    found = {group: [v for v in values if not math.isnan(v)] for group, values in losses.items()}
    return {
        group: [round(v, 6) for v in values[:: max(1, math.ceil(len(values) / points))]]
        for group, values in found.items()
    }
