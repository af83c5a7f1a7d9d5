"""CLIP score and CLIP accuracies: numbers from the cosine between a picture's and a text's embedding.

Three scales are in use under the name CLIP score, and three numbers under the name CLIP accuracy:

    100-cosine     100 cos                     MACE, RECE, ItD
    cosine         cos                         AdvUnlearn
    2.5-clipped    2.5 max(cos, 0)             Hessel et al. (arXiv 2104.08718); SPM, concept ablation
    accuracy       target text closer than anchor text                       concept ablation
    error rate     1 - accuracy                                              SPM
    probability    mean of softmax(100 cos) over ten objects                 MACE

The protocol id names the scale, the prefix of prompts and the model: a score from one CLIP is not comparable
with another's.  :class:`ClipZeroShot` classifies pictures by the same cosines (Radford et al., arXiv 2103.00020).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..concept import Concept
from ..core.resampling import bootstrap_mean, rate
from ..core.vision import CLIP_MEAN, CLIP_STD, model_name, pixel_statistics, pixels
from ..errors import InputError, ModelError, ProtocolError, SettingError, nearest
from ..method import Judge, Measurement, Metric, Outputs, Prompt, Verdicts

__all__ = ["SCALES", "ClipScore", "ClipZeroShot", "open_clip_score", "open_zero_shot"]

Texts = str | Sequence[str]

SCALES = ("100-cosine", "cosine", "2.5-clipped")

MACE_TEMPLATE = "a photo of the {}"


class ClipScore(Metric):
    """Mean of a scale of ``cos(picture, prompt)``, with the interval over prompts.

    Args:
        model: A transformers ``CLIPModel``.
        tokenizer: Its tokenizer.
        name: The name of the model, part of the protocol.
        processor: Its image processor; only mean and standard deviation are read.
        scale: One of :data:`SCALES`.
        prefix: Put before each prompt, as some do with ``"A photo depicts "``; part of the protocol.

    Raises:
        SettingError: Another scale.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        processor: Any = None,
        scale: str = "100-cosine",
        prefix: str = "",
    ) -> None:
        if scale not in SCALES:
            raise SettingError(f"clip-score: scale {scale!r} is unknown{nearest(scale, SCALES)}")
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.scale, self.prefix = scale, prefix
        self.protocol = f"clip-score/{scale}/{name}" + (f"/prefix={prefix!r}" if prefix else "")
        self.mean = tuple(getattr(processor, "image_mean", None) or CLIP_MEAN)
        self.std = tuple(getattr(processor, "image_std", None) or CLIP_STD)
        self._values: list[float] = []
        self._prompts: list[str] = []

    def scores(self, outputs: Outputs, prompts: Sequence[Prompt], batch: int = 128) -> np.ndarray:
        """The scaled cosine of each of ``n`` pictures (uint8 ``(n, h, w, 3)``) with its prompt, ``(n,)``.

        Raises:
            InputError: There is no picture, or not one prompt each.
        """
        return self.scored(outputs, prompts, batch)[0]

    def scored(
        self, outputs: Outputs, prompts: Sequence[Prompt], batch: int = 128
    ) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`scores` and the unit embeddings ``(n, d)`` of the pictures that they were taken from."""
        _one_each(outputs, prompts, "CLIP score")
        asked = [self.prefix + prompt.text for prompt in prompts]
        texts = sorted(set(asked))
        place = {text: i for i, text in enumerate(texts)}
        pictures, rows = self._embedded(outputs, texts, batch)
        text = rows[[place[one] for one in asked]]
        cosines = (pictures * text).sum(dim=-1).double().cpu().numpy()
        return self._scaled(cosines), pictures.cpu().numpy()

    def _scaled(self, cosines: np.ndarray) -> np.ndarray:
        if self.scale == "100-cosine":
            return 100.0 * cosines
        return cosines if self.scale == "cosine" else 2.5 * np.clip(cosines, 0, None)

    def accuracy(
        self, outputs: Outputs, target: Texts, anchor: Texts, prompts: Sequence[Prompt]
    ) -> Measurement:
        """Share of pictures that are closer to the target's text than to the anchor's (concept ablation).

        Args:
            outputs: uint8 ``(n, h, w, 3)``.
            target, anchor: A text for all pictures, or one each (SPM's templates); SPM's anchor of bare
                concepts is empty.
            prompts: What the pictures were drawn from, the unit of the interval.

        Raises:
            InputError: There is not one prompt a picture, or not one text for all or each.
        """
        hits = self._closer(outputs, target, anchor, prompts)
        return self._rate("clip-accuracy/target-over-anchor", hits, prompts, target, anchor)

    def error_rate(
        self, outputs: Outputs, target: Texts, anchor: Texts, prompts: Sequence[Prompt]
    ) -> Measurement:
        """SPM's CER, one minus :meth:`accuracy`: higher is better for an erased target."""
        hits = ~self._closer(outputs, target, anchor, prompts)
        return self._rate("clip-error-rate/spm", hits, prompts, target, anchor)

    def _closer(
        self, outputs: Outputs, target: Texts, anchor: Texts, prompts: Sequence[Prompt]
    ) -> np.ndarray:
        n = _one_each(outputs, prompts)
        sides = []
        for texts in (target, anchor):
            listed = [texts] * n if isinstance(texts, str) else list(texts)
            if len(listed) != n:
                raise InputError(
                    f"CLIP accuracy: {len(listed)} texts for {n} pictures; allowed is one for all or one each"
                )
            sides.append(self.scores(outputs, [Prompt(text) for text in listed]))
        # Scores are compared as they are scaled: where both are clipped to 0, neither is closer.
        return np.asarray(sides[0] > sides[1])

    def _rate(
        self, id: str, hits: np.ndarray, prompts: Sequence[Prompt], target: Texts, anchor: Texts
    ) -> Measurement:
        value, interval, n = rate(hits, [prompt.text for prompt in prompts])
        named = [repr(side) if isinstance(side, str) else "one each" for side in (target, anchor)]
        full = f"{id}/{self.name}/{self.scale}/{' over '.join(named)}"
        return Measurement(value, full, n, interval)

    def probability(
        self,
        outputs: Outputs,
        asked: str,
        objects: Sequence[str],
        prompts: Sequence[Prompt],
        template: str = MACE_TEMPLATE,
    ) -> Measurement:
        """MACE's accuracy of objects: the mean probability of the asked one, not the share of arg-max.

        Args:
            outputs: uint8 ``(n, h, w, 3)``.
            asked: One of ``objects``.
            objects: All classes, ten in the paper; the number depends on every one of them.
            prompts: What the pictures were drawn from, the unit of the interval.
            template: Text of a class, with ``{}`` where its name stands.

        Raises:
            InputError: ``asked`` is none of the objects, or there is not one prompt a picture.
        """
        if asked not in objects:
            raise InputError(f"{asked!r} is none of the objects{nearest(asked, objects)}")
        _one_each(outputs, prompts)
        shares = _softmax(self.table(outputs, [template.replace("{}", name) for name in objects]))
        mine = shares[:, list(objects).index(asked)]
        value, interval, n = bootstrap_mean(mine, [prompt.text for prompt in prompts])
        id = f"clip-accuracy/mace-probability/{self.name}/{template}/{'|'.join(objects)}"
        return Measurement(value, id, n, interval)

    def table(self, outputs: Outputs, texts: Sequence[str], batch: int = 128) -> np.ndarray:
        """``100 cos`` of each of ``n`` pictures with each of ``m`` texts, ``(n, m)``."""
        pictures, rows = self._embedded(outputs, texts, batch)
        return 100.0 * (pictures @ rows.T).double().cpu().numpy()

    def update(self, outputs: Outputs, prompts: Sequence[Prompt]) -> None:
        """Take in a batch of pictures and their prompts."""
        self._values.extend(self.scores(outputs, prompts).tolist())
        self._prompts.extend(prompt.text for prompt in prompts)

    def merge(self, other: ClipScore) -> ClipScore:
        """Take in everything a score of the same protocol has taken in.

        Raises:
            ProtocolError: It is of another protocol.
        """
        if other.protocol != self.protocol:
            raise ProtocolError(f"{other.protocol!r} does not merge into {self.protocol!r}")
        self._values.extend(other._values)
        self._prompts.extend(other._prompts)
        return self

    @property
    def values(self) -> tuple[float, ...]:
        """The scaled cosine of each picture taken in, in order."""
        return tuple(self._values)

    def compute(self) -> Measurement:
        """The mean over everything taken in; the interval resamples prompts."""
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
        read = pixels(np.array(outputs), size, self.mean, self.std)
        read = read.to(self.model.device, self.model.dtype)
        return _unit(self.model.get_image_features(pixel_values=read))


def open_clip_score(where: str, device: str = "cpu") -> ClipScore:
    """The CLIP score of a CLIP in a folder or on the hub, named by its hub id or its folder and weights.

    Raises:
        ModelError: It cannot be opened.
    """
    from transformers import AutoTokenizer, CLIPModel

    try:
        model = CLIPModel.from_pretrained(where, use_safetensors=True).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"no CLIP can be opened at {where!r} ({first})") from None
    return ClipScore(model, tokenizer, model_name(where), pixel_statistics(where))


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
        if len(labels) < 2 or len(set(labels)) < len(labels):
            # A label that stands twice would have half its share.
            raise SettingError(
                f"{self.id}: labels is {tuple(labels)!r}; at least two, each of them once, are needed"
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
        score = _softmax(self.clip.table(outputs, texts))[:, self.labels.index(concept.name)]
        return Verdicts(score >= self.threshold, score, np.ones(len(outputs), bool))


def _one_each(outputs: Outputs, prompts: Sequence[Prompt], what: str = "CLIP accuracy") -> int:
    if not len(outputs) or len(outputs) != len(prompts):
        raise InputError(
            f"{what}: {len(outputs)} pictures and {len(prompts)} prompts; allowed is one each, at least one"
        )
    return len(outputs)


def _softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True))


def open_zero_shot(
    beside: Any = None,
    *,
    labels: tuple[str, ...],
    template: str = "a photo of a {}",
    clip: str = "",
) -> ClipZeroShot:
    """A CLIP that prefers one of several labels.

    Args:
        beside: The model that will be judged: its companions' CLIP is asked where no other is named.
        labels: All names it is asked about.
        template: Text of a label.
        clip: A folder or hub id of a CLIP.

    Raises:
        SettingError: There is no CLIP beside the model and none is named.
        ModelError: It cannot be opened.
    """
    opener = getattr(getattr(beside, "companions", None), "clip", None)
    if clip:
        return ClipZeroShot(open_clip_score(clip), labels, template)
    if opener is None:
        raise SettingError(
            "judge clip-zero-shot: no CLIP stands beside this model; name one with clip="
        )
    return ClipZeroShot(opener() if callable(opener) else opener, labels, template)


def _unit(found: Any) -> torch.Tensor:
    # Newer transformers return an output record, older ones the projected embedding itself.
    vectors = found if isinstance(found, torch.Tensor) else found.pooler_output
    vectors = vectors.float()
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)
