"""UNets with cross-attention: Stable Diffusion 1.x and 2.x, and SDXL.

``attn2.to_k`` and ``attn2.to_v`` take the text rows as the encoders give them, and have no biases.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..types import Condition, Segment, TextInput
from .base import Layout, checked

__all__ = ["StableDiffusion", "StableDiffusionXL"]

KEYS_AND_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")


def _config(pipeline: Any, option: str) -> Any:
    return getattr(getattr(getattr(pipeline, "unet", None), "config", None), option, None)


class StableDiffusion(Layout):
    """One CLIP text encoder, whose last hidden states are the rows of every layer."""

    title = "a UNet with one text encoder (SD 1.x, 2.x)"
    part = "unet"
    shows_attention = True
    batch = 256

    @classmethod
    def covers(cls, pipeline: Any) -> bool:
        """A UNet that takes text rows and nothing else."""
        more = (
            "addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "time_cond_proj_dim",
        )  # fmt: skip
        return (
            getattr(pipeline, "unet", None) is not None
            and getattr(pipeline, "text_encoder_2", None) is None
            and all(_config(pipeline, option) is None for option in more)
        )

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids ``(n, tokens)``, padded and truncated as the pipeline does."""
        checked(texts)
        return self._ids("tokenizer", texts, self.pipeline.tokenizer.model_max_length)[0]

    def content_length(self, texts: Sequence[str]) -> list[int]:
        """Content tokens of each text: without start, end and padding."""
        tokenizer = self.pipeline.tokenizer
        room = tokenizer.model_max_length - 2
        made = tokenizer(list(texts), add_special_tokens=False, truncation=False).input_ids
        return [min(len(ids), room) for ids in made]

    def token_table(self) -> Tensor:
        """The token embeddings ``(vocabulary, width)``, detached."""
        return self.pipeline.text_encoder.get_input_embeddings().weight.detach()

    def encode(self, texts: Sequence[str]) -> Condition:
        """Text embeddings ``(n, tokens, width)``."""
        return self.encode_tokens(self.token_ids(texts))

    def _encoded(self, texts: list[str]) -> Condition:
        return self.encode(texts)

    def encode_tokens(self, ids: Tensor, vectors: Tensor | None = None) -> Condition:
        """Text embeddings of token ids ``(n, tokens)``; see ``DiffusionModel.encode_tokens``."""
        encoder = self.pipeline.text_encoder
        ids = ids.to(encoder.device)
        self.cost.add("encoder", len(ids))
        mask = None
        if getattr(encoder.config, "use_attention_mask", False):
            # The tokenizer's own mask: the first end token is seen, also where texts are padded with it.
            ends = (ids == self.pipeline.tokenizer.eos_token_id).long()
            mask = (ends.cumsum(1) - ends == 0).long()
        with self._spliced(vectors):
            hidden = encoder(ids, attention_mask=mask)[0]
        # The mask is the text encoder's: stock pipelines give the UNet none.
        return Condition(hidden)

    @contextlib.contextmanager
    def _spliced(self, vectors: Tensor | None) -> Iterator[None]:
        if vectors is None:
            yield
            return
        table = self.pipeline.text_encoder.get_input_embeddings()
        handle = table.register_forward_hook(lambda module, args, out: vectors.to(out.dtype))
        try:
            yield
        finally:
            handle.remove()

    def text_inputs(self, tensors: Mapping[str, nn.Parameter]) -> tuple[TextInput, ...]:
        """Keys and values of every cross-attention: one group."""
        return (TextInput(*self._named(tensors, *KEYS_AND_VALUES), self._segments),)

    def _segments(self, texts: Sequence[str]) -> tuple[Segment, ...]:
        ids = self.token_ids(texts)
        with torch.no_grad():
            rows = self.encode_tokens(ids).embeddings.detach()
        return (Segment(self.pipeline.tokenizer, ids, rows),)

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One pass of the UNet."""
        return self.denoiser(
            noised,
            timesteps,
            encoder_hidden_states=condition.embeddings.to(self.dtype),
            encoder_attention_mask=condition.mask,
        ).sample


class StableDiffusionXL(Layout):
    """Rows of two CLIP encoders side by side; the second one's pooled vector and six size ids go in elsewhere.

    The pooled vector enters through the time embedding, together with the ids and behind two layers, and is
    not edited.
    """

    title = "a UNet with two text encoders (SDXL)"
    part = "unet"
    towers = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    # Of the second one the pooled vector comes from the last.
    unread_layers: ClassVar = {"text_encoder": 1}
    guidance = 5.0
    shows_attention = True
    wide = True
    batch = 256

    @classmethod
    def covers(cls, pipeline: Any) -> bool:
        """A UNet that takes text rows, a pooled vector and time ids."""
        return (
            getattr(pipeline, "text_encoder_2", None) is not None
            and _config(pipeline, "addition_embed_type") == "text_time"
            and _config(pipeline, "encoder_hid_dim_type") is None
            and _config(pipeline, "time_cond_proj_dim") is None
        )

    def _encoded(self, texts: list[str]) -> Condition:
        rows, _, pooled, _ = self.pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
        return Condition(rows, pooled=pooled, extra={"time_ids": self._time_ids(len(texts), rows)})

    def _time_ids(self, count: int, like: Tensor) -> Tensor:
        height, width = (side * self.scale_factor for side in self.latent_shape[1:])
        # Original size, crop, target size: a whole picture of the default size, as in the stock call.
        return like.new_tensor([[height, width, 0, 0, height, width]]).repeat(count, 1)

    @property
    def _zeros(self) -> bool:
        return bool(self.pipeline.config.get("force_zeros_for_empty_prompt", False))

    def settings(self) -> dict[str, Any]:
        """Also whether an empty negative prompt is all zeros."""
        return {**super().settings(), "zeros": self._zeros}

    def unconditional(self, text: str) -> Condition | None:
        """All zeros for the empty text where the pipeline is configured so, as it is for SDXL 1.0."""
        if text or not self._zeros:
            return None
        found = self.encode([text])
        assert found.pooled is not None
        zeros = torch.zeros_like(found.embeddings), torch.zeros_like(found.pooled)
        return Condition(zeros[0], pooled=zeros[1], extra=found.extra)

    def text_inputs(self, tensors: Mapping[str, nn.Parameter]) -> tuple[TextInput, ...]:
        """Keys and values of every cross-attention: one group, rows of both encoders joined."""
        return (TextInput(*self._named(tensors, *KEYS_AND_VALUES), self._segments),)

    def _segments(self, texts: Sequence[str]) -> tuple[Segment, ...]:
        ids = self._clip_ids(texts)
        with torch.no_grad():
            rows = self.encode(texts).embeddings
        return (Segment(self.pipeline.tokenizer, ids, rows),)

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One pass of the UNet."""
        assert condition.pooled is not None
        return self.denoiser(
            noised,
            timesteps,
            encoder_hidden_states=condition.embeddings.to(self.dtype),
            added_cond_kwargs={
                "text_embeds": condition.pooled.to(self.dtype),
                "time_ids": condition.extra["time_ids"],
            },
        ).sample
