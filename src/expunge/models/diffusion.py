"""The adapter around a diffusers text-to-image pipeline.

``model.pipeline`` stays the user's diffusers object.  The adapter adds identity, row-wise conditions,
typed predictions, per-picture noise, counted rows, and a sampling loop in which edits and controls
act.  Layouts with ``attn2`` cross-attention (SD 1.x and 2.x) are covered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MissingPart, ModelError, NonFiniteError, PromptError, UnsupportedModel
from ..method import Prompt
from .attention import dispatching
from .base import Model, noise_generator
from .samplers import Sampler, alpha_sigma, prediction_kind
from .types import Condition, Context, Prediction, PredictionKind, Segment, TextInput

__all__ = ["DiffusionModel"]

MAX_PROMPT = 20_000
"""Characters; a longer prompt is a mistake, and tokenising it would take seconds."""

BATCH = 32
"""Pictures at a time: with guidance 64 rows a pass, which a CPU does 6 % faster than 128."""


class DiffusionModel(Model):
    """A text-to-image pipeline of diffusers.

    Args:
        pipeline: Any pipeline with a UNet (``attn2`` cross-attention), one text encoder, tokenizer,
            autoencoder and scheduler.
        name: What the user asked for.
        steps: Sampling steps unless asked otherwise.
        guidance: Classifier-free guidance unless asked otherwise.
    """

    family = "diffusion"
    capabilities = frozenset({"generate", "score", "embed", "activations", "gradients", "controls"})
    decisive = ("scheduler", "tokenizer", "steps", "guidance")

    def __init__(
        self, pipeline: Any, name: str = "pipeline", *, steps: int = 50, guidance: float = 7.5
    ):
        super().__init__(name)
        self.pipeline = pipeline
        self.steps, self.guidance = steps, guidance
        for part in ("unet", "text_encoder", "tokenizer", "vae", "scheduler"):
            if getattr(pipeline, part, None) is None:
                raise UnsupportedModel(
                    f"{name}: {type(pipeline).__name__} has no {part}; a UNet pipeline with one text "
                    "encoder (SD 1.x or 2.x) is needed"
                )
        if getattr(pipeline, "text_encoder_2", None) is not None:
            raise UnsupportedModel(f"{name}: pipelines with two text encoders are not covered yet")
        for module in self.parts().values():
            module.eval()
            module.requires_grad_(False)
        self._texts: dict[tuple[str, int], Tensor] = {}

    # -- parts ---------------------------------------------------------------------------------

    def parts(self) -> Mapping[str, nn.Module]:
        """``unet``, ``text_encoder`` and ``vae``."""
        return {name: getattr(self.pipeline, name) for name in ("unet", "text_encoder", "vae")}

    @property
    def denoiser(self) -> nn.Module:
        """The network that is asked for a prediction."""
        return self.pipeline.unet

    # The text tower, its tokenizer and the autoencoder, as the pipeline has them now.
    text_encoder = property(lambda self: self.pipeline.text_encoder)
    tokenizer = property(lambda self: self.pipeline.tokenizer)
    vae = property(lambda self: self.pipeline.vae)

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
        """Canonical names of the matrices that map text embeddings to keys and values.

        Raises:
            MissingPart: None was found (an edit of nothing would look like success).
        """
        names = tuple(
            n for n in self.tensors() if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        )
        if not names:
            raise MissingPart(f"{self.name}: the denoiser has no attn2.to_k / attn2.to_v matrices")
        return names

    def text_inputs(self) -> tuple[TextInput, ...]:
        """The matrices of :meth:`text_projections` in groups that take the same rows, with those rows."""
        names = self.text_projections()
        width = self.tensor(names[0]).shape[1]
        return (TextInput(names, width, self._segments),)

    def _segments(self, texts: Sequence[str]) -> tuple[Segment, ...]:
        # Token ids are encoded directly: the cache of texts would hold every phrase in memory.
        ids = self.token_ids(texts)
        with torch.no_grad():
            rows = self.encode_tokens(ids).embeddings.detach()
        return (Segment(self.tokenizer, ids, rows),)

    # -- text ----------------------------------------------------------------------------------

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids ``(n, tokens)``, padded and truncated as the pipeline does."""
        for text in texts:
            if len(text) > MAX_PROMPT:
                raise PromptError(
                    f"a prompt has {len(text)} characters; at most {MAX_PROMPT} are allowed"
                )
        length = self.tokenizer.model_max_length
        made = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return made.input_ids

    def content_length(self, texts: Sequence[str]) -> list[int]:
        """Content tokens of each text: without start, end and padding."""
        room = self.tokenizer.model_max_length - 2
        made = self.tokenizer(list(texts), add_special_tokens=False, truncation=False).input_ids
        return [min(len(ids), room) for ids in made]

    def token_table(self) -> Tensor:
        """The token embeddings ``(vocabulary, width)``, detached."""
        return self.text_encoder.get_input_embeddings().weight.detach()

    def encode(self, texts: str | Sequence[str]) -> Condition:
        """Text embeddings ``(n, tokens, width)``; remembered while gradients are off."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.text_encoder.parameters()):
            return self.encode_tokens(self.token_ids(texts))
        # In-place changes of weights (edits, training) raise the version counters, so a remembered
        # embedding is never served for other weights.
        version = sum(p._version for p in self.text_encoder.parameters())
        missing = [text for text in dict.fromkeys(texts) if (text, version) not in self._texts]
        if len(self._texts) + len(missing) > 20_000:
            self._texts.clear()
            missing = list(dict.fromkeys(texts))
        with torch.no_grad():
            for first in range(0, len(missing), 256):
                part = missing[first : first + 256]
                for text, row in zip(
                    part, self.encode_tokens(self.token_ids(part)).embeddings, strict=True
                ):
                    self._texts[text, version] = row.clone()
        return Condition(torch.stack([self._texts[text, version] for text in texts]))

    def encode_tokens(self, ids: Tensor, vectors: Tensor | None = None) -> Condition:
        """Text embeddings of token ids ``(n, tokens)``.

        Args:
            ids: Token ids; with ``vectors`` they only fix the length and the place of the end token.
            vectors: ``(n, tokens, width)`` in place of the rows of the token table, before positions
                are added; gradients reach them.
        """
        ids = ids.to(self.text_encoder.device)
        self.cost.add("encoder", len(ids))
        use_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = (ids != self.tokenizer.pad_token_id).long() if use_mask else None
        with self._spliced(vectors):
            hidden = self.text_encoder(ids, attention_mask=mask)[0]
        return Condition(hidden, mask)

    @contextlib.contextmanager
    def _spliced(self, vectors: Tensor | None) -> Iterator[None]:
        if vectors is None:
            yield
            return
        table = self.text_encoder.get_input_embeddings()
        handle = table.register_forward_hook(lambda module, args, out: vectors.to(out.dtype))
        try:
            yield
        finally:
            handle.remove()

    # -- pictures and latents ------------------------------------------------------------------

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the latents of one picture."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser.config.in_channels, height, width

    def initial_noise(self, seeds: Sequence[int], purpose: str = "initial noise") -> Tensor:
        """Noise ``(n, c, h, w)``, a private generator per seed: independent of batch and device."""
        rows = [
            torch.randn(self.latent_shape, generator=noise_generator(s, purpose)) for s in seeds
        ]
        return torch.stack(rows).to(self.device, self.dtype)

    def latents_of(self, pictures: np.ndarray) -> Tensor:
        """Scaled means of the autoencoder's posterior, ``(n, c, h, w)``, of uint8 ``(n, H, W, 3)``."""
        pixels = (
            torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
        )
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        with torch.no_grad():
            parts = [
                self.vae.encode(p.to(self.device, self.vae.dtype)).latent_dist.mean
                for p in pixels.split(64)
            ]
        self.cost.add("autoencoder", len(pixels))
        return (torch.cat(parts) - shift) * config.scaling_factor

    def pictures_of(self, latents: Tensor) -> np.ndarray:
        """Decoded pictures, uint8 ``(n, H, W, 3)``."""
        config = self.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        # On a CPU, eight at a time in this layout fit its caches and take 40 % less time than 64 in the other.
        cpu = self.device.type == "cpu"
        few, layout = (8, torch.channels_last) if cpu else (64, torch.preserve_format)
        with torch.no_grad():
            scaled = latents.to(self.vae.dtype) / config.scaling_factor + shift
            parts = [part.to(memory_format=layout) for part in scaled.split(few)]
            pixels = torch.cat([self.vae.decode(part).sample for part in parts])
        self.cost.add("autoencoder", len(latents))
        if not torch.isfinite(pixels).all():
            raise NonFiniteError(f"{self.name}: decoded pictures hold NaN or infinity")
        values = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (values * 255).round().to(torch.uint8).cpu().numpy()

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
        """A fresh run of the pipeline's scheduler, one generator a row."""
        return Sampler(self.scheduler, steps, self.device, generators)

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
        for control in self.controls:
            condition = control.condition(context, condition)
            noised = control.latents(context, noised)
        context.condition = condition
        self.cost.add("denoiser", rows)
        with dispatching(self.denoiser, self.controls, context):
            value = self.denoiser(
                noised,
                timesteps,
                encoder_hidden_states=condition.embeddings.to(self.dtype),
                encoder_attention_mask=condition.mask,
            ).sample
        prediction = Prediction(self.prediction_kind, value, *self.alpha_sigma(timesteps))
        for control in self.controls:
            prediction = control.prediction(context, prediction)
        return prediction

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
            negative: Text of the unconditional branch.
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
        height = self.latent_shape[1] * 8
        return np.concatenate(made) if made else np.zeros((0, height, height, 3), np.uint8)

    def sample(
        self,
        condition: Condition,
        seeds: Sequence[int],
        *,
        steps: int | None = None,
        stop: int | None = None,
        guidance: float | Tensor | None = None,
        negative: str = "",
    ) -> Tensor:
        """Latents ``(n, c, h, w)`` of ``steps`` steps; one guidance or one a row.

        With ``stop`` below the number of timesteps: what the denoiser is to be given at ``timesteps[stop]``.
        """
        steps = self.steps if steps is None else steps
        guidance = self.guidance if guidance is None else guidance
        if steps < 1:
            raise PromptError(f"steps is {steps}; at least 1 is needed")
        sampler = self.sampler(steps, [noise_generator(s, "sampler noise") for s in seeds])
        count = len(seeds)
        latents = sampler.start(self.initial_noise(seeds))
        weight = torch.as_tensor(guidance, device=self.device, dtype=self.dtype).expand(count)
        both = bool((weight != 1.0).any())
        if both:
            condition = Condition.concatenate([self.encode([negative]).repeat(count), condition])
        conditional = torch.tensor([False] * count * both + [True] * count)
        context = Context(steps=len(sampler.times), conditional=conditional)
        for control in self.controls:
            control.start(context)
        for step, time in enumerate(sampler.times[:stop]):
            context.step = step
            scaled = sampler.seen(latents, time)
            rows = torch.cat([scaled, scaled]) if both else scaled
            prediction = self.predict(rows, time.reshape(1), condition, context)
            if both:
                prediction = prediction.select(slice(count, None)).guided(
                    prediction.select(slice(count)), weight.reshape(-1, 1, 1, 1)
                )
            latents = sampler.step(prediction.value, time, latents)
        for control in self.controls:
            latents = control.finish(context, latents)
        if stop is not None and stop < len(sampler.times):
            latents = sampler.seen(latents, sampler.times[stop])
        return latents

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
