"""One run of a diffusers scheduler over the rows of a batch, and what its noise levels mean.

The denoiser always sees ``x_t = alpha x_0 + sigma noise``.  Some schedulers (Euler, LMS, Heun) walk in
another space, ``x_0 + (sigma / alpha) noise``, and scale before the denoiser is asked: what a sampler keeps
and what the denoiser sees are two things, and methods are only ever given the second.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError, UnsupportedModel
from .types import PredictionKind

__all__ = ["Sampler", "alpha_sigma", "prediction_kind"]

KINDS: Mapping[str, PredictionKind] = {
    "epsilon": "epsilon", "v_prediction": "v", "sample": "x0", "flow_prediction": "flow",
}  # fmt: skip


def _flows(scheduler: Any) -> bool:
    """Whether noise levels are those of flow matching, also in solvers that keep a table of alphas beside."""
    return not hasattr(scheduler, "alphas_cumprod") or bool(
        scheduler.config.get("use_flow_sigmas", False)
    )


def prediction_kind(scheduler: Any) -> PredictionKind:
    """What the denoiser that goes with a scheduler predicts.

    Raises:
        UnsupportedModel: A prediction or a noise schedule that is not known.
    """
    kind = type(scheduler).__name__
    if hasattr(scheduler, "alphas_cumprod"):
        predicts = scheduler.config.get("prediction_type", "epsilon")
        if predicts not in KINDS:
            raise UnsupportedModel(f"{kind}: predictions of type {predicts!r} are not known")
        if (predicts == "flow_prediction") != _flows(scheduler):
            raise UnsupportedModel(
                f"{kind}: prediction_type {predicts!r} and use_flow_sigmas={_flows(scheduler)} do not go together; "
                "flow matching needs both"
            )
        return KINDS[predicts]
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or not 0 < float(torch.as_tensor(sigmas).max()) <= 1:
        raise UnsupportedModel(
            f"{kind}: its noise levels are not known; allowed are schedulers with alphas_cumprod and "
            "flow matching with sigmas from 0 to 1"
        )
    return "flow"


def alpha_sigma(scheduler: Any, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """``(alpha, sigma)`` in float64 with ``x_t = alpha x_0 + sigma noise``, each ``(n,)``.

    Schedulers may stand between two training timesteps; ``sigma / alpha`` is then interpolated, as they do.
    """
    if _flows(scheduler):
        prediction_kind(scheduler)
        sigma = timesteps.double() / scheduler.config.num_train_timesteps
        return 1 - sigma, sigma
    bars = scheduler.alphas_cumprod.to(timesteps.device)
    below = timesteps.floor().long()
    bar = bars[below].double()
    if timesteps.is_floating_point():
        above = bars[(below + 1).clamp_max(len(bars) - 1)].double()
        part = timesteps.double() - below
        ratio = torch.lerp(((1 - bar) / bar).sqrt(), ((1 - above) / above).sqrt(), part)
        # Not where it stands on a timestep: a last alpha of zero would turn into 0 times infinity.
        bar = torch.where(part > 0, 1 / (1 + ratio.square()), bar)
    return bar.sqrt(), (1 - bar).sqrt()


class Sampler:
    """A scheduler's walk over ``n`` rows that do not depend on one another.

    Attributes:
        times: Timesteps, descending; after ``k`` calls of :meth:`step` the rows stand at ``times[k]``.
        stops: Indices of ``times`` where a whole step begins, ``steps`` at most.  Second-order schedulers
            ask the denoiser twice a step, and PNDM begins with one call more.
        guided: Guidance has a part; a walk that a control brings may do without.

    Args:
        scheduler: A fresh scheduler; it keeps state, so no two samplers share one.
        steps: Sampling steps.
        device: Where the latents are.
        generators: One private CPU generator a row, for schedulers that draw noise in their steps.
        options: Further options of ``set_timesteps``.

    Raises:
        UnsupportedModel: The scheduler draws noise that cannot be given to it.
        SettingError: The scheduler cannot walk in so many steps.
    """

    guided = True

    def __init__(
        self,
        scheduler: Any,
        steps: int,
        device: torch.device | None = None,
        generators: Sequence[torch.Generator] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.scheduler, self.generators = scheduler, list(generators)
        takes = inspect.signature(scheduler.step).parameters
        self.takes_noise = "generator" in takes
        # As the stock pipelines ask for, whatever a scheduler's own default is.
        self.options = {"eta": 0.0} if "eta" in takes else {}
        name = type(scheduler).__name__
        restless = hasattr(scheduler, "noise_sampler") or "SDE" in name or "Ancestral" in name
        if restless and not self.takes_noise:
            raise UnsupportedModel(
                f"{name} draws noise in its steps but takes no generator, so a picture would depend on the "
                "global random state; choose a scheduler without noise or one whose step takes a generator"
            )
        try:
            scheduler.set_timesteps(steps, device=device, **(options or {}))
        except ValueError as error:  # more steps than it was trained with, for example
            raise SettingError(f"{name} cannot walk in {steps} steps ({error})") from error
        self.times: Tensor = scheduler.timesteps
        self.order: int = getattr(scheduler, "order", 1)
        self.stops = range(0, len(self.times), self.order)[:steps]

    def start(self, noise: Tensor) -> Tensor:
        """What the walk begins with."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def enter(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """What a walk holds that begins at ``times[index]`` with clean latents under noise.

        Raises:
            UnsupportedModel: The scheduler cannot noise latents.
        """
        if not any(hasattr(self.scheduler, name) for name in ("scale_noise", "add_noise")):
            raise UnsupportedModel(
                f"{type(self.scheduler).__name__} cannot begin with a picture; allowed are schedulers that can noise "
                "one to a timestep (add_noise, or scale_noise under flow matching)"
            )
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)
        return self.noised(clean, noise, index)

    def noised(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """Clean latents under noise, in the walk's own space at ``times[index]``, where it stands (:meth:`enter`)."""
        time = self.times[index].reshape(1).to(clean.device)
        if hasattr(self.scheduler, "scale_noise"):
            return self.scheduler.scale_noise(clean, time, noise)
        return self.scheduler.add_noise(clean, noise, time)

    def seen(self, latents: Tensor, time: Tensor) -> Tensor:
        """What the denoiser is to be given for latents that stand at ``time``."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, time)

    def step(self, value: Tensor, time: Tensor, latents: Tensor) -> Tensor:
        """The latents at the next timestep; ``value`` is kept by some schedulers and must not be changed."""
        options: dict[str, Any] = {**self.options, "return_dict": False}
        if self.takes_noise:
            options["generator"] = self.generators
        return self.scheduler.step(value, time, latents, **options)[0]
