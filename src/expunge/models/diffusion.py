"""The adapter around a diffusers text-to-image pipeline.

``model.pipeline`` stays the user's diffusers object.  The adapter adds identity, row-wise conditions,
typed predictions, per-picture noise, counted rows, and a sampling loop in which edits and controls
act.  How a pipeline takes text is its layout (:mod:`expunge.models.layouts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..edit.tokens import PARTS, Vocabulary
from ..errors import MissingCapability, ModelError, PromptError
from ..method import Prompt
from . import autoencoder
from .attention import dispatching
from .base import Model, noise_generator
from .branches import apart, together
from .hidden_states import heard, showing
from .layouts import layout_of
from .remembered import RememberedTexts
from .samplers import Sampler, alpha_sigma, prediction_kind
from .types import Condition, Context, Prediction, PredictionKind, TextInput
from .walks import Source, walk

__all__ = ["DiffusionModel"]

BATCH = 32
"""Pictures at a time: with guidance 64 rows a pass, which a CPU does 6 % faster than 128."""


class DiffusionModel(Model):
    """A text-to-image pipeline of diffusers.

    Args:
        pipeline: Any pipeline of a covered layout: SD 1.x and 2.x, SDXL, PixArt, Sana, SD3, Flux, classes.
        name: What the user asked for.
        steps: Sampling steps unless asked otherwise; default: those of the stock pipeline.
        guidance: Guidance unless asked otherwise; default: that of the stock pipeline.

    Raises:
        UnsupportedModel: The pipeline is of no covered layout, or lacks a part.
    """

    family = "diffusion"
    capabilities = frozenset({"generate", "score", "embed", "activations", "gradients", "controls"})
    decisive: tuple[str, ...] = ("scheduler", "tokenizer", "steps", "guidance")

    def __init__(
        self,
        pipeline: Any,
        name: str = "pipeline",
        *,
        steps: int | None = None,
        guidance: float | None = None,
    ):
        super().__init__(name)
        self.pipeline = pipeline
        self.layout = layout_of(name, pipeline, self.cost)
        self.steps = self.layout.steps if steps is None else steps
        self.guidance = self.layout.guidance if guidance is None else guidance
        if len(self.layout.tokenizers) > 1 or self.layout.part != "unet":
            more = tuple(t for t in self.layout.tokenizers[1:] if getattr(pipeline, t) is not None)
            self.decisive = (*type(self).decisive, *more, "conditioning")
        for module in self.parts().values():
            module.eval()
            module.requires_grad_(False)
        self._texts = RememberedTexts()

    # -- parts ---------------------------------------------------------------------------------

    def parts(self) -> Mapping[str, nn.Module]:
        """The denoiser (``unet`` or ``transformer``), the text encoders and the ``vae``."""
        return self.layout.parts()

    def vocabularies(self) -> Mapping[str, Vocabulary]:
        """The pipeline's tokenizers, each with its text encoder."""
        owner, found = self.pipeline, self.parts()
        return {
            name: Vocabulary(owner, name, PARTS[name], found[PARTS[name]], self.layout.prepared)
            for name in self.layout.tokenizers
            if PARTS[name] in found and getattr(owner, name, None) is not None
        }

    @property
    def denoiser(self) -> nn.Module:
        """The network that is asked for a prediction."""
        return self.layout.denoiser

    # The text towers, their tokenizers and the autoencoder, as the pipeline has them now.
    text_encoder = property(lambda self: getattr(self.pipeline, "text_encoder", None))
    tokenizer = property(lambda self: getattr(self.pipeline, "tokenizer", None))
    tokenizer_2 = property(lambda self: getattr(self.pipeline, "tokenizer_2", None))
    tokenizer_3 = property(lambda self: getattr(self.pipeline, "tokenizer_3", None))
    vae = property(lambda self: getattr(self.pipeline, "vae", None))
    conditioning = property(lambda self: self.layout.settings())

    @property
    def scheduler(self) -> Any:
        """A fresh scheduler: samplers keep state, so no two runs share one."""
        return type(self.pipeline.scheduler).from_config(self.pipeline.scheduler.config)

    @property
    def device(self) -> torch.device:
        """Where the denoiser stands."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser."""
        return next(self.denoiser.parameters()).dtype

    def text_projections(self) -> tuple[str, ...]:
        """Canonical names of the matrices that are linear in the text, those of all groups.

        Raises:
            MissingPart: None was found (an edit of nothing would look like success).
        """
        return tuple(name for group in self.text_inputs() for name in group.names)

    def text_inputs(self) -> tuple[TextInput, ...]:
        """The matrices of :meth:`text_projections` in groups that take the same rows, with those rows."""
        found = self.layout.text_inputs(self.tensors())
        return tuple(dataclasses.replace(g, segments=heard(self, g.segments)) for g in found)

    # -- text ----------------------------------------------------------------------------------

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids ``(n, tokens)``, padded and truncated as the pipeline does.

        Raises:
            MissingCapability: The layout has several text encoders, or one that is no CLIP; so for all
                that follows about tokens.
        """
        return self.layout.token_ids(texts)

    def content_length(self, texts: Sequence[str]) -> list[int]:
        """Content tokens of each text: without start, end and padding."""
        return self.layout.content_length(texts)

    def token_table(self) -> Tensor:
        """The token embeddings ``(vocabulary, width)``, detached."""
        return self.layout.token_table()

    def encode_tokens(self, ids: Tensor, vectors: Tensor | None = None) -> Condition:
        """Text embeddings of token ids ``(n, tokens)``.

        Args:
            ids: Token ids; with ``vectors`` they only fix the length and the place of the end token.
            vectors: ``(n, tokens, width)`` in place of the rows of the token table, before positions
                are added; gradients reach them.
        """
        return heard(self, self.layout.encode_tokens)(ids, vectors)

    def encode(self, texts: str | Sequence[str]) -> Condition:
        """The condition of texts, ``n`` rows; remembered while gradients are off."""
        listed = [texts] if isinstance(texts, str) else list(texts)
        return dataclasses.replace(self._texts.encode(self, listed), texts=tuple(listed))

    def unconditional(self, text: str = "") -> Condition:
        """One row: the unconditional branch of guidance; unlike :meth:`encode` no control is shown the text."""
        with torch.no_grad():
            own = self.layout.unconditional(text)
        found = self._texts.encode(self, [text], shown=False) if own is None else own
        return dataclasses.replace(found, texts=(text,))

    @property
    def two_branches(self) -> bool:
        """Whether guidance runs an unconditional branch; if not, it is an input of the denoiser."""
        return self.layout.two_branches

    def with_guidance(self, condition: Condition, guidance: float | Tensor) -> Condition:
        """The condition for a denoiser that takes guidance as an input; one value or one a row."""
        weight = torch.as_tensor(guidance, device=self.device, dtype=self.dtype)
        extra = {**condition.extra, "guidance": weight.expand(condition.rows)}
        return dataclasses.replace(condition, extra=extra)

    # -- pictures and latents ------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the latents of one picture."""
        return self.layout.latent_shape

    def initial_noise(self, seeds: Sequence[int], purpose: str = "initial noise") -> Tensor:
        """Noise ``(n, c, h, w)``, a private generator per seed: independent of batch and device."""
        rows = [
            torch.randn(self.latent_shape, generator=noise_generator(s, purpose)) for s in seeds
        ]
        return torch.stack(rows).to(self.device, self.dtype)

    def latents_of(self, pictures: np.ndarray, generator: torch.Generator | None = None) -> Tensor:
        """Scaled means of the autoencoder's posterior, or draws of it, ``(n, c, h, w)``, of uint8 ``(n, H, W, 3)``."""
        self.cost.add("autoencoder", len(pictures))
        return autoencoder.latents_of(self.vae, pictures, self.device, self.layout.wide, generator)

    def pictures_of(self, latents: Tensor) -> np.ndarray:
        """Decoded pictures, uint8 ``(n, H, W, 3)``."""
        self.cost.add("autoencoder", len(latents))
        return autoencoder.pictures_of(
            self.vae, latents, self.name, self.layout.wide, self.layout.scale_factor
        )

    # -- noise schedule and prediction -----------------------------------------------------------

    def alpha_sigma(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """``(alpha, sigma)`` with ``x_t = alpha x_0 + sigma noise``, each ``(n, 1, 1, 1)``."""
        alpha, sigma = alpha_sigma(self.pipeline.scheduler, timesteps.to(self.device))
        shape = (-1, 1, 1, 1)
        return alpha.to(self.dtype).reshape(shape), sigma.to(self.dtype).reshape(shape)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """``x_t`` of clean latents, as the denoiser sees it, whatever space the scheduler walks in."""
        alpha, sigma = self.alpha_sigma(timesteps)
        return alpha * latents + sigma * noise

    def timesteps(self, steps: int) -> Tensor:
        """The sampler's timesteps, descending."""
        return self.sampler(steps).times

    def sampler(self, steps: int, generators: Sequence[torch.Generator] = ()) -> Sampler:
        """A fresh run of the pipeline's scheduler, one generator a row, or of what a control puts in its place."""
        for control in reversed(self.acting):
            own = control.sampler(self, steps, generators)
            if own is not None:
                return own
        scheduler = self.scheduler
        options = self.layout.schedule(scheduler, steps)
        return Sampler(scheduler, steps, self.device, generators, options)

    @property
    def prediction_kind(self) -> PredictionKind:
        """What the denoiser predicts."""
        return prediction_kind(self.pipeline.scheduler)

    def predict(
        self,
        noised: Tensor,
        timesteps: Tensor,
        condition: Condition,
        context: Context | None = None,
    ) -> Prediction:
        """One pass of the denoiser over ``n`` rows; counted; differentiable when gradients are on."""
        rows = len(noised)
        context = context or Context()
        timesteps = timesteps.to(self.device).expand(rows)
        context.timestep, context.condition, context.rows = timesteps, condition, rows
        for control in self.acting:
            condition = control.condition(context, condition)
            noised = control.latents(context, noised)
        context.condition = condition
        if not self.two_branches and "guidance" not in condition.extra:
            condition = self.with_guidance(condition, self.guidance)
        self._can_show_attention()
        noised, timesteps, condition, owners = together(
            self.acting, context, noised, timesteps, condition
        )
        self.cost.add("denoiser", len(noised))
        shown = showing({self.layout.part: self.denoiser}, self.acting, context)
        with dispatching(self.denoiser, self.acting, context), shown:
            value = self.layout.predict(noised, timesteps, condition)
        made = Prediction(self.prediction_kind, value, *self.alpha_sigma(timesteps))
        prediction = apart(made, context, owners)
        for control in self.acting:
            prediction = control.prediction(context, prediction)
        return prediction

    def _can_show_attention(self) -> None:
        if self.layout.shows_attention:
            return
        for control in self.acting:
            if "attention" in control.hooks():
                raise MissingCapability(
                    f"{self.name}: {type(control).__name__} works on attention probabilities, which are shown for "
                    f"UNets and PixArt; this is {self.layout.title}"
                )

    # -- sampling ------------------------------------------------------------------------------

    def generate(  # type: ignore[override]  # the options of the base class, named
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        *,
        seeds: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        condition: Condition | None = None,
        batch: int = BATCH,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Pictures, uint8 ``(n, H, W, 3)``.

        Args:
            prompts: One or several texts, or :class:`Prompt` with their own seeds.
            seeds: Seed of each picture's initial noise; default: the prompts' own, or 0, 1, 2, ...
            steps, guidance: Default: the model's own; a prompt's guidance wins; all 1 runs one branch only.
            negative: Text of the unconditional branch, where there is one; at guidance 1 there is none.
            condition: Row-wise condition used in place of the texts.
            batch: Pictures at a time; halve it when memory runs out.
            progress: Called with the number of pictures finished since the last call.
        """
        listed = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
        texts = [p.text if isinstance(p, Prompt) else p for p in listed]
        if seeds is None:
            seeds = [p.seed if isinstance(p, Prompt) else i for i, p in enumerate(listed)]
        seeds = [seeds] * len(texts) if isinstance(seeds, int) else list(seeds)
        if len(seeds) != len(texts):
            raise PromptError(
                f"{len(texts)} prompts but {len(seeds)} seeds; one seed a prompt is needed"
            )
        if condition is not None and condition.rows != len(texts):
            raise PromptError(f"{len(texts)} prompts but a condition of {condition.rows} rows")
        shared = self.guidance if guidance is None else guidance
        own = [p.guided(shared) if isinstance(p, Prompt) else shared for p in listed]
        if negative and self.two_branches and all(weight == 1.0 for weight in own):
            raise PromptError(
                f"{self.name}: a negative text has no part at guidance 1, where its branch does not run; "
                "ask for another guidance, or for no negative text"
            )
        made = []
        with torch.no_grad():
            for first in range(0, len(texts), batch):
                part = slice(first, first + batch)
                rows = self.encode(texts[part]) if condition is None else condition.select(part)
                weight = torch.tensor(own[part], dtype=torch.float64)
                latents = self.sample(
                    rows, seeds[part], steps=steps, guidance=weight, negative=negative
                )
                made.append(self.pictures_of(latents))
                if progress is not None:
                    progress(len(made[-1]))
        height, width = (side * self.layout.scale_factor for side in self.latent_shape[1:])
        return np.concatenate(made) if made else np.zeros((0, height, width, 3), np.uint8)

    def sample(
        self,
        condition: Condition,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        stop: int | None = None,
        guidance: float | Tensor | None = None,
        negative: str = "",
        source: Source | None = None,
    ) -> Tensor:
        """Latents ``(n, c, h, w)`` of ``steps`` steps; one guidance or one a row.

        With ``stop`` below the number of timesteps: what the denoiser is to be given at ``timesteps[stop]``.
        With ``source`` the walk sets out from pictures (see :mod:`expunge.models.walks`).
        """
        return walk(
            self,
            condition,
            seeds,
            steps=self.steps if steps is None else steps,
            stop=stop,
            guidance=self.guidance if guidance is None else guidance,
            negative=negative,
            source=source,
        )

    def partial(
        self, condition: Condition, seeds: Sequence[int], *, steps: int, stop: int, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """``x_t`` at ``timesteps[stop]`` of ``steps`` guided steps, as the denoiser sees it, and that timestep."""
        times = self.timesteps(steps)
        if not 0 <= stop < len(times):
            raise ModelError(f"stop is {stop}; allowed is 0 to {len(times) - 1} for {steps} steps")
        with torch.no_grad():
            latents = self.sample(condition, seeds, steps=steps, stop=stop, guidance=guidance)
        return latents, times[stop]
