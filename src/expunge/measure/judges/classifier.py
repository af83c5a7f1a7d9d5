"""Any image classifier as a judge: a hit where the concept's class is among the first ``k``.

Papers ask ResNet-50 whether the first class of a picture is the concept's (Imagenette's objects; top-1), a
129-way ViT whether an artist is among the first three (styles).  Which weights are asked changes the number, so
the protocol names them.  A classifier always names some class, also of a broken picture: ``floor`` calls a picture
unrecognisable whose first class is less likely than that (0, as papers have it: none ever is).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...concept import Concept
from ...core.vision import model_name, uint8_pictures
from ...errors import InputError, ModelError, SettingError, nearest
from ...method import Judge, Outputs, Prompt, Verdicts

__all__ = ["IMAGENETTE", "PictureClassifier", "open_classifier", "read_labels"]

IMAGENETTE: Mapping[str, tuple[int, ...]] = {
    "cassette player": (482,), "chain saw": (491,), "church": (497,), "gas pump": (571,), "tench": (0,),
    "garbage truck": (569,), "english springer": (217,), "golf ball": (574,), "parachute": (701,),
    "french horn": (566,),
}  # fmt: skip
"""Imagenette's ten classes -> their places among ImageNet's thousand."""

Logits = Callable[[np.ndarray], np.ndarray]
"""uint8 pictures ``(n, h, w, 3)`` -> logits ``(n, classes)``."""


class PictureClassifier(Judge):
    """Says whether a concept's class is among the first ``top`` of a classifier.

    Args:
        logits: The classifier, with what it does to pictures first.
        labels: Concept -> places of its classes; a concept may have several.
        name: Names the weights and what is done to pictures, part of the protocol.
        top: Classes that count.
        threshold: The concept's probability must reach it; 0: its rank alone decides.
        floor: Probability that the first class must reach for the picture to be recognisable.
    """

    id = "classifier"

    def __init__(
        self,
        logits: Logits,
        labels: Mapping[str, Sequence[int]],
        name: str,
        *,
        top: int = 1,
        threshold: float = 0.0,
        floor: float = 0.0,
    ) -> None:
        if top < 1:
            raise SettingError(f"{self.id}: top is {top}; at least one class must count")
        for key, value in (("threshold", threshold), ("floor", floor)):
            if not 0 <= value <= 1:
                raise SettingError(
                    f"{self.id}: {key} is {value}; a probability from 0 to 1 is needed"
                )
        self.logits, self.top, self.threshold, self.floor = logits, top, threshold, floor
        self.labels = {label.lower(): tuple(places) for label, places in labels.items()}
        for label, places in self.labels.items():
            if not places or min(places) < 0:
                raise SettingError(
                    f"{self.id}: {label!r} has the places {places}; at least one class from 0 on is needed"
                )
        digest = hashlib.sha256(json.dumps(sorted(self.labels.items())).encode()).hexdigest()[:8]
        self.protocol = f"classifier/1/{name}:top-{top}&probability>={threshold:g}&first>={floor:g}/labels={digest}"

    def judge(self, outputs: Outputs, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """Verdicts on uint8 pictures ``(n, h, w, 3)``; the score is the probability of the concept's classes.

        Raises:
            SettingError: None of the labels is the concept or a phrase of it.
        """
        places = list(self._places(concept))
        if not len(outputs):
            return Verdicts(np.zeros(0, bool), np.zeros(0), np.zeros(0, bool))
        logits = np.asarray(self.logits(uint8_pictures(outputs)), np.float64)
        if logits.ndim != 2 or len(logits) != len(outputs) or max(places) >= logits.shape[1]:
            raise InputError(
                f"{self.id}: the classifier gave {logits.shape} for {len(outputs)} pictures; a row each with at "
                f"least {max(places) + 1} classes is needed"
            )
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        score = np.clip(shares[:, places].sum(axis=1), 0, 1)
        # Classes that beat the concept's best one; equals are ranked in its favour.
        rank = (shares > shares[:, places].max(axis=1, keepdims=True)).sum(axis=1)
        known = shares.max(axis=1) >= self.floor
        return Verdicts((rank < self.top) & (score >= self.threshold) & known, score, known)

    def _places(self, concept: Concept) -> tuple[int, ...]:
        for name in concept.names:
            if name.lower() in self.labels:
                return self.labels[name.lower()]
        raise SettingError(
            f"{self.id}: {concept.name!r} is none of the labels{nearest(concept.name.lower(), self.labels)}"
        )


def open_classifier(
    beside: Any = None,
    *,
    model: str = "microsoft/resnet-50",
    labels: str = "",
    top: int = 1,
    threshold: float = 0.0,
    floor: float = 0.0,
    batch: int = 32,
) -> PictureClassifier:
    """A classifier of transformers, with its own image processor.

    Args:
        beside: The model that will be judged; its device is used.
        model: A folder or hub id of an image classifier.
        labels: ``imagenette``, a JSON file (concept -> class, name of a class, or a list of them); default: the
            classifier's own names, each also by its parts between commas.
        top, threshold, floor: See :class:`PictureClassifier`.
        batch: Pictures at a time.

    Raises:
        ModelError: It cannot be opened.
        SettingError: A label names no class.
    """
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        network = AutoModelForImageClassification.from_pretrained(
            model, use_safetensors=True
        ).eval()
        processor = AutoImageProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"judge classifier: {model!r} cannot be opened ({reason})") from None
    device = getattr(beside, "device", None)
    if device is not None:
        network = network.to(device)
    own = {int(place): str(name) for place, name in network.config.id2label.items()}
    chosen = (
        IMAGENETTE if labels == "imagenette" else read_labels(labels, own) if labels else _own(own)
    )

    @torch.no_grad()
    def logits(pictures: np.ndarray) -> np.ndarray:
        rows = []
        for first in range(0, len(pictures), batch):
            made = processor(images=list(pictures[first : first + batch]), return_tensors="pt")
            pixels = made["pixel_values"].to(network.device, network.dtype)
            rows.append(network(pixel_values=pixels).logits.float().cpu().numpy())
        return np.concatenate(rows)

    return PictureClassifier(
        logits, chosen, model_name(model), top=top, threshold=threshold, floor=floor
    )


def _own(names: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for place, name in names.items():
        for part in {name, *name.split(",")}:
            key = part.strip().lower()
            found[key] = (*found.get(key, ()), place)
    return found


def read_labels(file: str, names: Mapping[int, str]) -> dict[str, tuple[int, ...]]:
    """Concept -> places, from a JSON file; classes are given by place or by name.

    Raises:
        SettingError: It cannot be read, or names a class that there is not.
    """
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingError(f"labels {file!r} cannot be read ({error})") from None
    if not isinstance(data, dict) or not data:
        raise SettingError(f"labels {file!r}: a mapping from concept to classes is needed")
    own, found = _own(names), {}
    for concept, given in data.items():
        places: tuple[int, ...] = ()
        for entry in given if isinstance(given, list) else [given]:
            if isinstance(entry, int) and not isinstance(entry, bool) and entry in names:
                places += (entry,)
            elif isinstance(entry, str) and entry.lower() in own:
                places += own[entry.lower()]
            else:
                raise SettingError(
                    f"labels {file!r}: {concept!r} names the class {entry!r}, which the classifier has not"
                    f"{nearest(str(entry), own)}"
                )
        found[str(concept)] = places
    return found
