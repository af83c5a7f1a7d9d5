"""Transformers with cross-attention behind a caption projection: PixArt (alpha, sigma) and Sana.

A small network inside the denoiser (two linear layers; in Sana also a norm) turns the text encoder's rows into
the rows that every ``attn2.to_k`` and ``attn2.to_v`` takes.  These have biases, which an edit leaves alone: what
it changes is the product with the rows.  Padding is masked, so only attended rows count in an edit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..types import Condition, Segment, TextInput
from .base import Layout, class_is
from .unet import KEYS_AND_VALUES

__all__ = ["PixArt", "Sana"]


class _Captioned(Layout):
    """What PixArt and Sana share."""

    @abstractmethod
    def projected(self, rows: Tensor) -> Tensor:
        """The rows that ``attn2`` receives, of rows of the text encoder."""

    @abstractmethod
    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask behind the rows of texts, each ``(n, tokens)``."""

    def text_inputs(self, tensors: Mapping[str, nn.Parameter]) -> tuple[TextInput, ...]:
        """Keys and values of every cross-attention: one group, rows after the caption projection."""
        names, width = self._named(tensors, *KEYS_AND_VALUES)
        inside = getattr(self.denoiser, "caption_projection", None) is not None
        return (TextInput(names, width, self._segments, None if inside else "embeddings"),)

    def _segments(self, texts: Sequence[str]) -> tuple[Segment, ...]:
        ids, mask = self._tokens(texts)
        with torch.no_grad():
            rows = self.projected(self.encode(texts).embeddings.to(self.dtype))
        return (Segment(self.pipeline.tokenizer, ids, rows, mask),)

    def room(self, tokenizer: str) -> int:
        """The pipeline's own length; what the tokenizer says is far more."""
        return self._length

    def prepared(self, texts: Sequence[str]) -> list[str]:
        """Texts as the pipeline's own preprocessing writes them."""
        return self.pipeline._text_preprocessing(list(texts), clean_caption=self._cleaned)

    @property
    def _cleaned(self) -> bool:
        from diffusers.utils import is_bs4_available, is_ftfy_available

        # Without both libraries the pipeline leaves it off too, with a warning at every call.
        return bool(self.default("clean_caption")) and is_bs4_available() and is_ftfy_available()

    @property
    @abstractmethod
    def _length(self) -> int:
        """Rows of a text."""

    def settings(self) -> dict[str, Any]:
        """Also whether captions are cleaned, and the rows of a text."""
        return {**super().settings(), "cleaned": self._cleaned, "length": self._length}

    def _mean(self, value: Tensor, channels: int) -> Tensor:
        """The prediction without the variances that some denoisers learn beside it."""
        learned = self.denoiser.config.out_channels // 2 == channels
        return value.chunk(2, dim=1)[0] if learned else value


class PixArt(_Captioned):
    """T5 rows with a mask."""

    title = "PixArt (T5, cross-attention)"
    steps, guidance = 20, 4.5
    shows_attention = True

    @classmethod
    def covers(cls, pipeline: Any) -> bool:
        """By the class of the transformer."""
        return class_is(getattr(pipeline, "transformer", None), "PixArtTransformer2DModel")

    @property
    def _length(self) -> int:
        return int(self.default("max_sequence_length", 120))

    def _encoded(self, texts: list[str]) -> Condition:
        rows, mask, _, _ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, clean_caption=self._cleaned,
            max_sequence_length=self._length,
        )  # fmt: skip
        return Condition(rows, mask)

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self._ids("tokenizer", self.prepared(texts), self._length)

    def projected(self, rows: Tensor) -> Tensor:
        """Through the caption projection, where there is one."""
        projection = self.denoiser.caption_projection
        return rows if projection is None else projection(rows)

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One pass of the transformer."""
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.denoiser.config.sample_size == 128:
            height, width = (side * self.scale_factor for side in noised.shape[-2:])
            sizes = {
                "resolution": noised.new_tensor([[height, width]]).repeat(len(noised), 1),
                "aspect_ratio": noised.new_tensor([[height / width]]).repeat(len(noised), 1),
            }
        value = self.denoiser(
            noised,
            encoder_hidden_states=condition.embeddings.to(self.dtype),
            encoder_attention_mask=condition.mask,
            timestep=timesteps,
            added_cond_kwargs=sizes,
        ).sample
        return self._mean(value, noised.shape[1])


class Sana(_Captioned):
    """Gemma rows with a mask; the pipeline's instruction stands before each prompt but not in the rows.

    The rows are the first one and the last ``max_sequence_length - 1`` of instruction and prompt together, and
    negative prompts have no instruction.
    """

    title = "Sana (Gemma, cross-attention)"
    steps, guidance = 20, 4.5

    @classmethod
    def covers(cls, pipeline: Any) -> bool:
        """By the class of the transformer; distilled variants take guidance as an input."""
        transformer: Any = getattr(pipeline, "transformer", None)
        return class_is(transformer, "SanaTransformer2DModel") and not getattr(
            transformer.config, "guidance_embeds", False
        )

    @property
    def _length(self) -> int:
        return int(self.default("max_sequence_length", 300))

    @property
    def _instruction(self) -> list[str]:
        return self.default("complex_human_instruction") or []

    def _encoded(self, texts: list[str], instructed: bool = True) -> Condition:
        rows, mask, _, _ = self.pipeline.encode_prompt(
            texts, do_classifier_free_guidance=False, clean_caption=self._cleaned,
            max_sequence_length=self._length,
            complex_human_instruction=self._instruction if instructed else None,
        )  # fmt: skip
        return Condition(rows, mask)

    def unconditional(self, text: str) -> Condition:
        """Without the instruction."""
        self._count([text])
        return self._encoded([text], instructed=False)

    def settings(self) -> dict[str, Any]:
        """Also the instruction."""
        return {**super().settings(), "instruction": self._instruction}

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        # A Gemma tokenizer pads on the left until the pipeline, which sets this too, has encoded once.
        self.pipeline.tokenizer.padding_side = "right"
        prepared, length, instruction = self.prepared(texts), self._length, self._instruction
        if instruction:
            before = "\n".join(instruction)
            prepared = [before + text for text in prepared]
            length += len(self.pipeline.tokenizer.encode(before)) - 2
        ids, mask = self._ids("tokenizer", prepared, length)
        kept = [0, *range(1 - self._length, 0)]
        return ids[:, kept], mask[:, kept]

    def projected(self, rows: Tensor) -> Tensor:
        """Through the caption projection and its norm."""
        return self.denoiser.caption_norm(self.denoiser.caption_projection(rows))

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One pass of the transformer."""
        value = self.denoiser(
            noised,
            encoder_hidden_states=condition.embeddings.to(self.dtype),
            encoder_attention_mask=condition.mask,
            timestep=timesteps * self.denoiser.config.timestep_scale,
        ).sample
        return self._mean(value, noised.shape[1])
