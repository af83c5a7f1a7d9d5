"""What a layout is: how a pipeline turns texts into what its denoiser takes, and which matrices read them.

The embeddings are those of the pipeline's own ``encode_prompt``, with the defaults of its own call, so they
are the library's by construction.  A layout adds what the library does not say: which matrices are linear
in the text, the rows they take, and the token ids behind those rows.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from ...errors import MissingCapability, MissingPart, PromptError, UnsupportedModel
from ..base import Cost
from ..types import Condition, Segment, TextInput

__all__ = ["MAX_PROMPT", "Layout", "class_is"]

MAX_PROMPT = 20_000
"""Characters; a longer prompt is a mistake, and tokenising it would take seconds."""


def class_is(part: Any, name: str) -> bool:
    """Whether an object's class, or one it inherits from, has a name; nothing is imported."""
    return any(kind.__name__ == name for kind in type(part).__mro__)


class Layout(ABC):
    """One way of conditioning on text; a pipeline's own objects stay where they are.

    Attributes:
        title: Its name in sentences.
        part: Where the pipeline keeps the denoiser.
        towers: Where it keeps text encoders; their tokenizers stand in ``tokenizers``.
        optional: Towers that may be missing.
        unread_layers: Tower -> how many of its last layers are not read.
        steps, guidance: Defaults of the stock pipeline.
        two_branches: Guidance is an unconditional branch beside the conditional one; otherwise it is an
            input of the denoiser.
        shows_attention: Controls can read and change attention probabilities.
        classes: Names of the classes where pictures are asked for by class; empty where they are by text.
        wide: The pipeline decodes in float32 where a float16 autoencoder asks for it.
        batch: Texts encoded at a time.
    """

    title: ClassVar[str]
    part: ClassVar[str] = "transformer"
    towers: ClassVar[tuple[str, ...]] = ("text_encoder",)
    tokenizers: ClassVar[tuple[str, ...]] = ("tokenizer",)
    optional: ClassVar[tuple[str, ...]] = ()
    unread_layers: ClassVar[Mapping[str, int]] = {}
    steps: ClassVar[int] = 50
    guidance: ClassVar[float] = 7.5
    two_branches: ClassVar[bool] = True
    shows_attention: ClassVar[bool] = False
    classes: ClassVar[tuple[str, ...]] = ()
    wide: ClassVar[bool] = False
    batch: ClassVar[int] = 32

    def __init__(self, name: str, pipeline: Any, cost: Cost) -> None:
        self.name, self.pipeline, self.cost = name, pipeline, cost

    @classmethod
    @abstractmethod
    def covers(cls, pipeline: Any) -> bool:
        """Whether a pipeline is of this layout."""

    def check(self) -> None:
        """Refuse, in words, a pipeline that lacks a part or whose denoiser takes more than latents."""
        kind = type(self.pipeline).__name__
        for part in (self.part, *self.towers, *self.tokenizers, "vae", "scheduler"):
            if part not in self.optional and getattr(self.pipeline, part, None) is None:
                raise UnsupportedModel(
                    f"{self.name}: {kind} has no {part}, which {self.title} needs"
                )
        for part in ("controlnet", "adapter"):
            if getattr(self.pipeline, part, None) is not None:
                raise UnsupportedModel(
                    f"{self.name}: {kind} also takes a picture through its {part}, which is not covered"
                )
        made = getattr(self.pipeline.vae.config, "latent_channels", None)
        if made is not None and made != self.latent_shape[0]:
            raise UnsupportedModel(
                f"{self.name}: the denoiser of {kind} takes {self.latent_shape[0]} channels and its "
                f"autoencoder gives {made}; denoisers that also take a picture are not covered"
            )

    # -- parts ---------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        """Denoiser, text encoders and autoencoder by name, as the pipeline has them now."""
        names = (self.part, *self.towers, "vae")
        found = {name: getattr(self.pipeline, name, None) for name in names}
        return {name: module for name, module in found.items() if module is not None}

    def encoders(self) -> dict[str, nn.Module]:
        """The text encoders among the parts."""
        return {name: module for name, module in self.parts().items() if name in self.towers}

    @property
    def denoiser(self) -> Any:
        """The network that is asked for a prediction."""
        return getattr(self.pipeline, self.part)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the denoiser."""
        return next(self.denoiser.parameters()).dtype

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of the latents of one picture."""
        size = self.denoiser.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser.config.in_channels, height, width

    @property
    def scale_factor(self) -> int:
        """Pixels a latent, along each side."""
        return int(getattr(self.pipeline, "vae_scale_factor", 8))

    def settings(self) -> dict[str, Any]:
        """What decides pictures beside weights, configurations and tokenizers; for cache keys."""
        return {"layout": type(self).__name__, "latents": self.latent_shape}

    def default(self, option: str, otherwise: Any = None) -> Any:
        """The default of an option of the pipeline's own call."""
        found = inspect.signature(type(self.pipeline).__call__).parameters.get(option)
        return otherwise if found is None else found.default

    # -- text ----------------------------------------------------------------------------------

    def encode(self, texts: Sequence[str]) -> Condition:
        """The condition of texts, as the pipeline encodes prompts; one row a text."""
        self._count(texts)
        return self._encoded(list(texts))

    def room(self, tokenizer: str) -> int:
        """Tokens of a text that fit, start and end among them, by the name of a tokenizer; the rest is cut."""
        return int(getattr(self.pipeline, tokenizer).model_max_length)

    def prepared(self, texts: Sequence[str]) -> list[str]:
        """Texts as the pipeline writes them before its tokenizer sees them."""
        return list(texts)

    def unconditional(self, text: str) -> Condition | None:
        """One row for the unconditional branch, where the pipeline does not encode it like any other text."""
        return None

    @abstractmethod
    def _encoded(self, texts: list[str]) -> Condition: ...

    @abstractmethod
    def text_inputs(self, tensors: Mapping[str, nn.Parameter]) -> tuple[TextInput, ...]:
        """The matrices that are linear in the text, in groups that take the same rows."""

    @abstractmethod
    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """What the denoiser says of ``(n, c, h, w)``, of the same shape; differentiable."""

    def schedule(self, scheduler: Any, steps: int) -> dict[str, Any]:
        """Further options of the scheduler's ``set_timesteps``."""
        return {}

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids ``(n, tokens)`` of a layout with one CLIP text encoder."""
        self._one_tokenizer()

    def content_length(self, texts: Sequence[str]) -> list[int]:
        """Content tokens of each text."""
        self._one_tokenizer()

    def token_table(self) -> Tensor:
        """The token embeddings ``(vocabulary, width)``."""
        self._one_tokenizer()

    def encode_tokens(self, ids: Tensor, vectors: Tensor | None = None) -> Condition:
        """The condition of token ids."""
        self._one_tokenizer()

    def _one_tokenizer(self) -> NoReturn:
        raise MissingCapability(
            f"{self.name}: searches over tokens are defined for one CLIP text encoder (SD 1.x and 2.x); "
            f"this is {self.title}"
        )

    # -- for the layouts -----------------------------------------------------------------------

    def _count(self, texts: Sequence[str]) -> None:
        checked(texts)
        present = sum(getattr(self.pipeline, tower, None) is not None for tower in self.towers)
        self.cost.add("encoder", len(texts) * present)

    def _ids(self, tokenizer: str, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask ``(n, length)``, padded and cut as the pipelines do."""
        made = getattr(self.pipeline, tokenizer)(
            list(texts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        return made.input_ids, made.attention_mask

    def _clip_ids(self, texts: Sequence[str]) -> Tensor:
        """Ids of two CLIP tokenizers whose rows stand beside each other: the places must be the same."""
        length = self.pipeline.tokenizer.model_max_length
        ids, mask = self._ids("tokenizer", texts, length)
        if not torch.equal(mask, self._ids("tokenizer_2", texts, length)[1]):
            raise UnsupportedModel(
                f"{self.name}: its two CLIP tokenizers cut the same text into different numbers of tokens, "
                "so rows that join both stand for no token"
            )
        return ids

    def _named(
        self, tensors: Mapping[str, nn.Parameter], *ends: str
    ) -> tuple[tuple[str, ...], int]:
        """Names of the denoiser's tensors with these ends, and the width of the rows they take.

        Raises:
            MissingPart: None was found (an edit of nothing would look like success).
        """
        names = tuple(n for n in tensors if n.startswith(f"{self.part}.") and n.endswith(ends))
        if not names:
            shown = " / ".join(end.removesuffix(".weight") for end in ends)
            raise MissingPart(f"{self.name}: the denoiser has no {shown} matrices")
        return names, tensors[names[0]].shape[1]


def checked(texts: Sequence[str]) -> None:
    """Refuse texts that are too long to be prompts."""
    for text in texts:
        if len(text) > MAX_PROMPT:
            raise PromptError(
                f"a prompt has {len(text)} characters; at most {MAX_PROMPT} are allowed"
            )


def pooled_segment(pooled: Tensor) -> Segment:
    """One row a text, ``(n, width)``, that belongs to no token."""
    return Segment(None, torch.zeros(len(pooled), 1, dtype=torch.long), pooled[:, None])
