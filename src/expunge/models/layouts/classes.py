"""A UNet of pixels that is told a class instead of a text (``UNet2DModel`` with class embeddings).

Prompts are names of classes.  The last embedding may stand for no class at all: then it is the unconditional branch
of guidance and what the empty text means; with a name for every embedding there is only one branch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MissingCapability, MissingPart, PromptError, UnsupportedModel, nearest
from ..types import Condition, TextInput
from .base import Layout, checked, class_is

__all__ = ["NAMES", "ClassLabels"]

NAMES = "class_names"
"""Where the UNet's configuration keeps the names, so that they are saved with it."""


class ClassLabels(Layout):
    """Class embeddings added to the time embedding; pixels from -1 to 1 are the latents."""

    title = "a UNet with class labels"
    part = "unet"
    towers = ()
    tokenizers = ()
    steps, guidance = 50, 1.0

    @classmethod
    def covers(cls, pipeline: Any) -> bool:
        """By the class of the UNet and its class embeddings."""
        unet: Any = getattr(pipeline, "unet", None)
        return class_is(unet, "UNet2DModel") and unet.config.num_class_embeds is not None

    def check(self) -> None:
        """Refuse a pipeline with other parts, or names that do not fit the embeddings."""
        if getattr(self.pipeline, "scheduler", None) is None:
            raise UnsupportedModel(f"{self.name}: the pipeline has no scheduler")
        if getattr(self.pipeline, "vae", None) is not None:
            raise UnsupportedModel(
                f"{self.name}: class labels beside an autoencoder are not covered"
            )
        count, names = self._embeddings, self.classes
        if len(names) not in (count, count - 1) or len({n.lower() for n in names}) != len(names):
            raise UnsupportedModel(
                f"{self.name}: {len(names)} names for {count} class embeddings; allowed are different names for all, "
                "or for all but the last, which then stands for no class"
            )

    @property
    def _embeddings(self) -> int:
        return int(self.denoiser.config.num_class_embeds)

    @property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]  # read where the pipeline keeps them
        """Names of the classes, in the order of their embeddings."""
        names = self.denoiser.config.get(NAMES)
        if names is None:
            return tuple(f"class {index}" for index in range(self._embeddings - 1))
        return tuple(names)

    @property
    def two_branches(self) -> bool:  # type: ignore[override]  # depends on the embeddings
        """Whether there is an embedding of no class."""
        return len(self.classes) < self._embeddings

    @property
    def scale_factor(self) -> int:
        """Pixels a latent: pixels are the latents."""
        return 1

    def _encoded(self, texts: list[str]) -> Condition:
        known = {name.lower(): index for index, name in enumerate(self.classes)}
        labels = []
        for text in texts:
            name = text.strip().lower()
            if not name and not self.two_branches:
                raise MissingCapability(
                    f"{self.name}: each of its embeddings is a class, so it cannot be asked for none"
                )
            if name and name not in known:
                raise PromptError(
                    f"{self.name} draws classes; {text.strip()[:60]!r} is none of them{nearest(name, known)}"
                )
            labels.append(known[name] if name else self._embeddings - 1)
        # Labels need no text rows; one column of zeros keeps the shape of a condition.
        return Condition(
            torch.zeros(len(texts), 1, 1), extra={"label": torch.tensor(labels, dtype=torch.long)}
        )

    def encode(self, texts: Sequence[str]) -> Condition:
        """The labels of class names; the empty text is no class."""
        checked(texts)
        return self._encoded(list(texts))

    def text_inputs(self, tensors: Mapping[str, nn.Parameter]) -> tuple[TextInput, ...]:
        """There is no text: always an error."""
        raise MissingPart(f"{self.name}: {self.title} reads no text, so no matrix is linear in it")

    def predict(self, noised: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """One pass of the UNet."""
        labels = condition.extra["label"].to(noised.device)
        return self.denoiser(noised, timesteps, class_labels=labels).sample
