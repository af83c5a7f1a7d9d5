"""Transformers in which text and picture attend to each other: Stable Diffusion 3 and Flux.

Inside the joint blocks every projection acts on a stream that was normalised, modulated and mixed with the
picture, so the only maps that are linear in the text stand at the entry: ``context_embedder`` for the token
rows, and the first layer of the pooled vector's embedder.  They take different rows, which makes two groups.
These are also what UCE's authors edit in Flux.  Biases stay.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..types import Condition, Segment, TextInput
from .base import Layout, checked, class_is, pooled_segment

__all__ = ["Flux", "StableDiffusion3"]


class _Joint(Layout):
    """What Stable Diffusion 3 and Flux share."""

    def text_inputs(self, tensors: Mapping[str, nn.Parameter]) -> tuple[TextInput, ...]:
        """The entry of the token rows and the entry of the pooled vector: two groups."""
        rows = self._named(tensors, "context_embedder.weight")
        pooled = self._named(tensors, "time_text_embed.text_embedder.linear_1.weight")
        return TextInput(*rows, self._segments), TextInput(*pooled, self._pooled, "pooled")

    def _segments(self, texts: Sequence[str]) -> tuple[Segment, ...]:
        with torch.no_grad():
            rows = self.encode(texts).embeddings
        found, first = [], 0
        for tokenizer, ids in self._tokens(texts):
            found.append(Segment(tokenizer, ids, rows[:, first : first + ids.shape[1]]))
            first += ids.shape[1]
        return tuple(found)

    @abstractmethod
    def _tokens(self, texts: Sequence[str]) -> list[tuple[Any, Tensor]]:
        """Tokenizer and ids of each stretch of the rows, in their order."""

    @abstractmethod
    def _clip_vectors(self, texts: list[str]) -> list[Tensor]:
        """Pooled vectors of each CLIP encoder; T5, which costs most, is not asked."""

    def _pooled(self, texts: Sequence[str]) -> tuple[Segment, ...]:
        checked(texts)
        with torch.no_grad():
            vectors = self._clip_vectors(list(texts))
        self.cost.add("encoder", len(texts) * len(vectors))
        return (pooled_segment(torch.cat(vectors, dim=-1)),)

    @property
    def _length(self) -> int:
        return int(self.default("max_sequence_length", 256))

    def room(self, tokenizer: str) -> int:
        """Of T5, the last tokenizer, the pipeline's own length; what that says is more."""
        return self._length if tokenizer == self.tokenizers[-1] else super().room(tokenizer)

    def settings(self) -> dict[str, Any]:
        """Also the rows of a text that T5 makes."""
        return {**super().settings(), "length": self._length}

    def _shift(self, scheduler: Any, patches: int, high: float) -> float:
        """How far the noise levels move with the number of patches: a straight line between two sizes."""
        config = scheduler.config
        short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", high)
        slope = (high - low) / (long - short)
        return patches * slope + (low - slope * short)


class StableDiffusion3(_Joint):
    """Rows of two CLIP encoders side by side, padded to the width of T5; T5 rows after them along the sequence.

    The pooled vectors of both CLIP encoders are joined.  Without T5 its rows are zeros, which no matrix can
    tell apart, so they are left out of edits.
    """

    title = "Stable Diffusion 3 (two CLIPs and T5, joint attention)"
    towers = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    optional = ("text_encoder_3", "tokenizer_3")
    steps, guidance = 28, 7.0

    @classmethod
    def covers(cls, pipeline: Any) -> bool:
        """By the class of the transformer."""
        return class_is(getattr(pipeline, "transformer", None), "SD3Transformer2DModel")

    def _encoded(self, texts: list[str]) -> Condition:
        rows, _, pooled, _ = self.pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=self._length
        )
        return Condition(rows, pooled=pooled)

    def _clip_vectors(self, texts: list[str]) -> list[Tensor]:
        get = self.pipeline._get_clip_prompt_embeds
        return [get(texts, clip_model_index=index)[1] for index in (0, 1)]

    def _tokens(self, texts: Sequence[str]) -> list[tuple[Any, Tensor]]:
        found = [(self.pipeline.tokenizer, self._clip_ids(texts))]
        if self.pipeline.text_encoder_3 is not None:
            ids = self._ids("tokenizer_3", texts, self._length)[0]
            found.append((self.pipeline.tokenizer_3, ids))
        return found

    def schedule(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """The shift of the noise levels, where the scheduler's depends on the size."""
        if not scheduler.config.get("use_dynamic_shifting", False):
            return {}
        side = self.denoiser.config.patch_size
        _, height, width = self.latent_shape
        return {"mu": self._shift(scheduler, (height // side) * (width // side), 1.16)}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One pass of the transformer."""
        assert condition.pooled is not None
        return self.denoiser(
            hidden_states=noised,
            timestep=timesteps,
            encoder_hidden_states=condition.embeddings.to(self.dtype),
            pooled_projections=condition.pooled.to(self.dtype),
        ).sample


class Flux(_Joint):
    """T5 rows, and the pooled vector of a CLIP encoder.

    Latents are handed over as patches of 2 x 2, with ids of rows and columns.  Guidance was distilled into the
    denoiser: it is an input, the row-wise ``extra["guidance"]``, and there is no unconditional branch.  The
    size of a picture is the pipeline's ``default_sample_size``.
    """

    title = "Flux (T5 and CLIP, joint attention)"
    towers = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    steps, guidance = 28, 3.5
    two_branches = False

    @classmethod
    def covers(cls, pipeline: Any) -> bool:
        """By the class of the transformer."""
        return class_is(getattr(pipeline, "transformer", None), "FluxTransformer2DModel")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` before the latents are packed."""
        size = int(self.pipeline.default_sample_size) // 2 * 2
        return self.denoiser.config.in_channels // 4, size, size

    def _encoded(self, texts: list[str]) -> Condition:
        rows, pooled, _ = self.pipeline.encode_prompt(texts, max_sequence_length=self._length)
        return Condition(rows, pooled=pooled)

    def _clip_vectors(self, texts: list[str]) -> list[Tensor]:
        return [self.pipeline._get_clip_prompt_embeds(texts)]

    def _tokens(self, texts: Sequence[str]) -> list[tuple[Any, Tensor]]:
        ids = self._ids("tokenizer_2", texts, self._length)[0]
        return [(self.pipeline.tokenizer_2, ids)]

    def schedule(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """Noise levels evenly spaced from 1, and their shift with the size, as in the stock call."""
        _, height, width = self.latent_shape
        patches = (height // 2) * (width // 2)
        options: dict[str, Any] = {"mu": self._shift(scheduler, patches, 1.15)}
        if not scheduler.config.get("use_flow_sigmas", False):
            options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        takes = inspect.signature(scheduler.set_timesteps).parameters
        return {name: value for name, value in options.items() if name in takes}

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One pass of the transformer over packed latents."""
        assert condition.pooled is not None
        pipeline, (count, channels, height, width) = self.pipeline, noised.shape
        rows = condition.embeddings.to(self.dtype)
        where = pipeline._prepare_latent_image_ids(
            count, height // 2, width // 2, noised.device, self.dtype
        )
        guidance = condition.extra["guidance"].float()
        value = self.denoiser(
            hidden_states=pipeline._pack_latents(
                noised.contiguous(), count, channels, height, width
            ),
            timestep=timesteps.to(self.dtype) / 1000,
            guidance=guidance if self.denoiser.config.guidance_embeds else None,
            pooled_projections=condition.pooled.to(self.dtype),
            encoder_hidden_states=rows,
            txt_ids=rows.new_zeros(rows.shape[1], 3),
            img_ids=where,
        ).sample
        factor = self.scale_factor
        return pipeline._unpack_latents(value, height * factor, width * factor, factor)
