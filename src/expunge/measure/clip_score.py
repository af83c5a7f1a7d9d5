"""CLIP score: the cosine between a picture's and its prompt's embedding, times 100.

Three scales are in use under this name (100 cos, cos, 2.5 max(cos, 0)); this is the first, and the
protocol id names the scale and the model.  A score from one CLIP is not comparable with another's.

:class:`ClipZeroShot` classifies pictures by the same cosines (Radford et al., arXiv 2103.00020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..concept import Concept
from ..errors import SettingError, nearest
from ..method import Judge, Measurement, Metric, Outputs, Prompt, Verdicts

__all__ = ["ClipScore", "ClipZeroShot"]

# What CLIP image processors use unless their configuration says otherwise.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScore(Metric):
    """Mean of ``100 cos(picture, prompt)``, with the interval over prompts.

    Args:
        model: A transformers ``CLIPModel``.
        tokenizer: Its tokenizer.
        name: The name of the model, part of the protocol.
        processor: Its image processor; only mean and standard deviation are read.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, processor: Any = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.protocol = f"clip-score/100-cosine/{name}"
        self.mean = tuple(getattr(processor, "image_mean", None) or MEAN)
        self.std = tuple(getattr(processor, "image_std", None) or STD)
        self._values: list[float] = []
        self._prompts: list[str] = []

    def scores(self, outputs: Outputs, prompts: Sequence[Prompt], batch: int = 128) -> np.ndarray:
        """``100 cos`` of each of ``n`` pictures (uint8 ``(n, h, w, 3)``) with its prompt, ``(n,)``."""
        texts = sorted({prompt.text for prompt in prompts})
        place = {text: i for i, text in enumerate(texts)}
        pictures, rows = self._embedded(outputs, texts, batch)
        text = rows[[place[prompt.text] for prompt in prompts]]
        return 100.0 * (pictures * text).sum(dim=-1).double().cpu().numpy()

    def table(self, outputs: Outputs, texts: Sequence[str], batch: int = 128) -> np.ndarray:
        """``100 cos`` of each of ``n`` pictures with each of ``m`` texts, ``(n, m)``."""
        pictures, rows = self._embedded(outputs, texts, batch)
        return 100.0 * (pictures @ rows.T).double().cpu().numpy()

    def update(self, outputs: Outputs, prompts: Sequence[Prompt]) -> None:
        """Take in a batch of pictures and their prompts."""
        self._values.extend(self.scores(outputs, prompts).tolist())
        self._prompts.extend(prompt.text for prompt in prompts)

    def compute(self) -> Measurement:
        """The mean over everything taken in; the interval resamples prompts."""
        from ..core.resampling import bootstrap_mean

        if not self._values:
            return Measurement(None, self.protocol, 0)
        value, interval, n = bootstrap_mean(np.array(self._values), self._prompts)
        return Measurement(value, self.protocol, n, interval)

    def _embedded(
        self, outputs: Outputs, texts: Sequence[str], batch: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of pictures and of texts."""
        with torch.no_grad():
            rows = [self._texts(texts[i : i + batch]) for i in range(0, len(texts), batch)]
            seen = [self._pictures(outputs[i : i + batch]) for i in range(0, len(outputs), batch)]
        return torch.cat(seen), torch.cat(rows)

    def _texts(self, texts: Sequence[str]) -> torch.Tensor:
        length = self.model.config.text_config.max_position_embeddings
        batch = self.tokenizer(
            list(texts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        ids = batch["input_ids"].to(self.model.device)
        mask = batch["attention_mask"].to(self.model.device) if "attention_mask" in batch else None
        return _unit(self.model.get_text_features(input_ids=ids, attention_mask=mask))

    def _pictures(self, outputs: np.ndarray) -> torch.Tensor:
        size = self.model.config.vision_config.image_size
        pixels = torch.from_numpy(np.array(outputs)).permute(0, 3, 1, 2).float() / 255
        if pixels.shape[-1] != size or pixels.shape[-2] != size:
            pixels = torch.nn.functional.interpolate(
                pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False
            ).clamp(0, 1)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
        pixels = ((pixels - mean) / std).to(self.model.device, self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=pixels))


class ClipZeroShot(Judge):
    """Which of several labels a picture shows, by CLIP: softmax over ``100 cos`` with each label's text.

    The score of a concept is the share of its label, and there is no such thing as an unrecognisable
    picture: CLIP always prefers one label.

    Args:
        clip: Whose model is asked.
        labels: Names of all concepts it is asked about; what it says depends on all of them.
        template: Text of a label, with ``{}`` where its name stands.
    """

    id = "clip-zero-shot"
    threshold = 0.5

    def __init__(
        self, clip: ClipScore, labels: Sequence[str], template: str = "a photo of a {}"
    ) -> None:
        if len(set(labels)) < 2:
            raise SettingError(
                f"{self.id}: labels is {tuple(labels)!r}; at least two different ones are needed"
            )
        self.clip, self.labels, self.template = clip, tuple(labels), template
        self.protocol = f"{self.id}/{clip.protocol}/{template}/{'|'.join(self.labels)}"

    def judge(self, outputs: Outputs, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """Verdicts on uint8 pictures ``(n, h, w, 3)``.

        Raises:
            SettingError: The concept is none of the labels.
        """
        if concept.name not in self.labels:
            raise SettingError(
                f"{self.id}: {concept.name!r} is none of the labels{nearest(concept.name, self.labels)}"
            )
        if not len(outputs):
            return Verdicts(np.zeros(0, bool), np.zeros(0), np.zeros(0, bool))
        texts = [self.template.replace("{}", label) for label in self.labels]
        scores = self.clip.table(outputs, texts)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        score = shares[:, self.labels.index(concept.name)] / shares.sum(axis=1)
        return Verdicts(score >= self.threshold, score, np.ones(len(outputs), bool))


def _unit(found: Any) -> torch.Tensor:
    # Newer transformers return an output record, older ones the projected embedding itself.
    vectors = found if isinstance(found, torch.Tensor) else found.pooler_output
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
