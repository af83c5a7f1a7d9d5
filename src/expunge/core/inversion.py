"""From a picture back to the noise a model would draw it from, and forth again; and pictures cleaned that way.

    noise = invert(model, model.latents_of(pictures), model.encode(texts), steps=50)
    again = model.pictures_of(regenerate(model, noise, model.encode(texts), steps=50))
    clean = purify(model, pictures, texts)                  # model: with an edit on it

One deterministic DDIM step (arXiv 2010.02502) leads from noise level ``(alpha, sigma)`` to ``(alpha', sigma')`` by

    x' = alpha' x_0 + sigma' eps          x_0 and eps as the model sees them in  x = alpha x_0 + sigma eps

which under flow matching is an Euler step of its ODE, ``x' = x + (sigma' - sigma) v``.  Regeneration walks down
the model's own noise levels, inversion up.  Going up, the latents of a level are shown to the model with the
timestep of the level above, as diffusers' ``DDIMInverseScheduler`` does it.  Going down the model will be asked at
that timestep about other latents, so the round trip is not exact, the less so the stronger the guidance.
``refinements`` repeats each step up with the latents it arrived at (a fixed-point iteration): where that converges,
regeneration with the same model, text and guidance gives back the very latents.

All schedulers are walked this way, those that draw noise or remember earlier steps as well: only the noise
levels are theirs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, PromptError, SettingError, UnsupportedModel
from ..method import Prompt
from ..models.diffusion import DiffusionModel
from ..models.samplers import alpha_sigma
from ..models.types import Condition, Context, Prediction

__all__ = ["invert", "purify", "regenerate"]

BATCH = 32


class _Path:
    """A model's noise levels, descending, and its guided answers along them.

    Attributes:
        times: Timesteps ``(k,)``.
        alpha, sigma: ``k + 1`` levels; the last is that of finished latents.
    """

    def __init__(
        self, model: DiffusionModel, condition: Condition, count: int, steps: int, guidance: float
    ) -> None:
        if steps < 1:
            raise SettingError(f"steps is {steps}; at least 1 is needed")
        if condition.rows != count:
            raise PromptError(f"{count} latents but a condition of {condition.rows} rows")
        self.model, self.count = model, count
        scheduler = model.scheduler
        # Second-order schedulers name a timestep twice.
        self.times = model.timesteps(steps).unique().flip(0)
        alpha, sigma = alpha_sigma(scheduler, self.times)
        end = 1.0
        if model.prediction_kind != "flow":
            end = float(getattr(scheduler, "final_alpha_cumprod", 1.0))
        self.alpha = [float(a) for a in alpha] + [end**0.5]
        self.sigma = [float(s) for s in sigma] + [(1 - end) ** 0.5]
        self.both = model.two_branches and guidance != 1.0
        if self.both:
            condition = Condition.concatenate([model.unconditional().repeat(count), condition])
        elif not model.two_branches:
            condition = model.with_guidance(condition, guidance)
        self.condition, self.guidance = condition, guidance
        conditional = torch.tensor([False] * count * self.both + [True] * count)
        weight = torch.full((count,), guidance, device=model.device, dtype=model.dtype)
        # Defences that act on guidance (SLD) look at how strong it is, and do nothing where nobody says.
        self.context = Context(steps=len(self.times), conditional=conditional, guidance=weight)
        for control in model.acting:
            control.start(self.context)

    def predicted(self, latents: Tensor, number: int, level: int) -> Prediction:
        """The guided answer about float32 latents at ``times[number]``, read as of noise level ``level``."""
        seen = latents.to(self.model.dtype)
        self.context.step = number
        made = self.model.predict(
            torch.cat([seen, seen]) if self.both else seen,
            self.times[number].reshape(1), self.condition, self.context,
        )  # fmt: skip
        if self.both:
            weight = torch.full(
                (self.count, 1, 1, 1), self.guidance, device=seen.device, dtype=seen.dtype
            )
            made = made.select(slice(self.count, None)).guided(
                made.select(slice(self.count)), weight
            )
        alpha, sigma = (latents.new_tensor(v).reshape(1, 1, 1, 1) for v in self._level(level))
        return dataclasses.replace(made, value=made.value.float(), alpha=alpha, sigma=sigma)

    def _level(self, level: int) -> tuple[float, float]:
        return self.alpha[level], self.sigma[level]

    def down(self, latents: Tensor, number: int) -> Tensor:
        """From level ``number`` to the next lower one."""
        made = self.predicted(latents, number, number)
        alpha, sigma = self._level(number + 1)
        return alpha * made.x0(latents) + sigma * made.epsilon(latents)

    def up(self, latents: Tensor, number: int, refinements: int) -> Tensor:
        """From the level below ``number`` to it."""
        (a, s), (alpha, sigma) = self._level(number + 1), self._level(number)
        made = self.predicted(latents, number, number + 1)
        reached = alpha * made.x0(latents) + sigma * made.epsilon(latents)
        for _ in range(refinements):
            noise = self.predicted(reached, number, number).epsilon(reached)
            reached = alpha * (latents - s * noise) / a + sigma * noise
        return reached


@torch.no_grad()
def invert(
    model: DiffusionModel,
    latents: Tensor,
    condition: Condition,
    *,
    steps: int = 50,
    guidance: float = 1.0,
    refinements: int = 0,
) -> Tensor:
    """The noise, ``(n, c, h, w)`` float32 as the denoiser sees it, that clean latents come from.

    Args:
        model: As it is now, edits and controls included.
        latents: Scaled clean latents ``(n, c, h, w)``.
        condition: ``n`` rows.
        steps: Steps of the way up.
        guidance: Classifier-free guidance; 1 asks one branch only.
        refinements: Further passes a step that bring it nearer to the inverse of the step down.

    Raises:
        UnsupportedModel: The model predicts clean latents and its schedule ends without noise, where the
            noise it sees is not defined.
    """
    path = _Path(model, condition, len(latents), steps, guidance)
    if model.prediction_kind == "x0" and path.sigma[-1] == 0.0:
        raise UnsupportedModel(
            f"{model.name}: a model that predicts clean latents cannot be inverted from a schedule that ends "
            "without noise; allowed is set_alpha_to_one=False, or another kind of prediction"
        )
    reached = latents.to(model.device).float()
    for number in reversed(range(len(path.times))):
        reached = path.up(reached, number, refinements)
    return reached


@torch.no_grad()
def regenerate(
    model: DiffusionModel,
    noise: Tensor,
    condition: Condition,
    *,
    steps: int = 50,
    guidance: float = 1.0,
) -> Tensor:
    """Clean latents ``(n, c, h, w)`` float32 by deterministic DDIM from noise; arguments as in :func:`invert`."""
    path = _Path(model, condition, len(noise), steps, guidance)
    reached = noise.to(model.device).float()
    for number in range(len(path.times)):
        reached = path.down(reached, number)
    for control in model.acting:
        reached = control.finish(path.context, reached)
    return reached


def purify(
    model: DiffusionModel,
    pictures: np.ndarray,
    prompts: str | Prompt | Sequence[str | Prompt],
    *,
    steps: int = 50,
    guidance: float = 3.0,
    inversion_guidance: float = 1.0,
    refinements: int = 0,
    original_inverts: bool = False,
    batch: int = BATCH,
) -> np.ndarray:
    """Real pictures drawn anew by an erased model: inverted to noise, then regenerated with the same prompt.

    The idea is All but One's (arXiv 2312.12807); the details are ours.  Both ways by one model at one guidance,
    an exact round trip would return the picture, concept and all.  What the concept is lost by is the
    difference between the two ways: a guidance above that of the inversion, or the original model on the way up.
    Judge a result beside the same round trip of the original model, which loses something too.

    Args:
        model: With its edits on.
        pictures: uint8 ``(n, H, W, 3)``, of the size the model draws.
        prompts: What each picture shows, one for each or one for all, the concept named.
        steps: Steps each way.
        guidance: Of the regeneration; 1 to 3 is useful.
        inversion_guidance: Of the inversion.
        refinements: As in :func:`invert`.
        original_inverts: Lift all edits and controls on the way up.
        batch: Pictures at a time; halve it when memory runs out.

    Returns:
        uint8 ``(n, H, W, 3)``.

    Raises:
        InputError: The pictures are of another shape or type.
        PromptError: Neither one prompt nor one for each picture.
    """
    pictures = np.asarray(pictures)
    height, width = (side * model.layout.scale_factor for side in model.latent_shape[1:])
    if pictures.shape[1:] != (height, width, 3) or pictures.dtype != np.uint8:
        raise InputError(
            f"pictures have shape {pictures.shape} and type {pictures.dtype}; allowed is uint8 (n, {height}, "
            f"{width}, 3), the size that {model.name} draws"
        )
    listed = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    texts = [p.text if isinstance(p, Prompt) else p for p in listed]
    texts = texts * len(pictures) if len(texts) == 1 else texts
    if len(texts) != len(pictures):
        raise PromptError(
            f"{len(pictures)} pictures but {len(texts)} prompts; one for each or one for all is needed"
        )
    made = []
    for first in range(0, len(texts), batch):
        part = slice(first, first + batch)
        with model.lifted() if original_inverts else contextlib.nullcontext():
            noise = invert(
                model, model.latents_of(pictures[part]), model.encode(texts[part]), steps=steps,
                guidance=inversion_guidance, refinements=refinements,
            )  # fmt: skip
        latents = regenerate(
            model, noise, model.encode(texts[part]), steps=steps, guidance=guidance
        )
        made.append(model.pictures_of(latents.to(model.dtype)))
    return np.concatenate(made) if made else pictures[:0]
