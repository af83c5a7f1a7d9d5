"""Geom-Erasing: implicit concepts, told where they are so that they can be told away.

An implicit concept (a watermark, a code, overlaid text) stands in pictures whose captions do not mention it: the
model draws it without being asked, and its name means nothing to it.  Here a detector says where the concept is;
name and place go into the caption, the place in new tokens, one for each bin of the picture; training ties the
concept to them.  At generation name and tokens take the place of the empty text in guidance, which leads away.

Source: Liu et al., ECCV 2024 (arXiv 2310.05873).

A box ``(a1, b1, a2, b2)`` in pixels touches the bins ``(m, n)`` with ``m = floor(a1 / W_bin) .. floor(a2 / W_bin)``
and ``n`` likewise from ``b1, b2``; caption ``y``, with ``w`` over the ``T`` bins of which ``K`` are touched:

    y' = y + name + <l{m,n}> of all these bins                       (y where nothing is seen)
    L  = E[ w . || eps - eps_theta(z_t, t, c(y')) ||^2 ]
    w  = T / (K + alpha (T - K))  in the touched bins,   alpha T / (K + alpha (T - K))  elsewhere
    eps = eps_theta(z, neg) + s ( eps_theta(z, y) - eps_theta(z, neg) ),   neg = name + location tokens

``setting`` is the paper's choice of what trains:

    model   the rows of the new tokens alone; a model that already draws the concept keeps every weight.  Captions
            without new tokens have no gradient there and are left out.
    data    the denoiser and the rows, on a contaminated set.  Captions are dropped, whole ``y'``, in 10 % of cases.

The edit carries the tokens and acts on the unconditional branch of guidance: in the place of the empty text stands
the negative, and behind an explicit negative text it is added, location tokens cut first.  Where guidance is 1
there is no such branch and nothing acts.  Who writes the tokens into a prompt gets the concept drawn: this explains
a concept, it does not destroy it.

Ours, because the paper's values are not published where we could read them: 4 x 4 bins, ``alpha = 2``, learning
rates, steps, the detector's threshold, all bins in the negative, one space between caption, name and tokens.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...concept import Concept, as_concepts, names_of
from ...core import finetune, scores
from ...core.detections import Detected, detected
from ...core.layer_choice import LAYERS, trainable
from ...core.location_tokens import Grid, Wording, Words, region_weights, upsampled
from ...core.negative_text import NegativeText
from ...edit import Edit
from ...errors import InputError, MissingCapability, SettingError, WrongState
from ...method import Control, Eraser, Judge
from ...method import setting as hyperparameter
from ...models.base import noise_generator
from ...models.diffusion import DiffusionModel

__all__ = ["GeomErasing"]

ROWS = "tokens.text_encoder"
"""Name of the new rows, in the edit and in checkpoints."""


@dataclasses.dataclass(frozen=True)
class GeomErasing(Eraser):
    """Implicit concept removal by location tokens; defaults follow the paper where it is known."""

    id: ClassVar[str] = "geom-erasing"
    title: ClassVar[str] = "Geom-Erasing: Implicit Concept Removal of Diffusion Models"
    source: ClassVar[str] = "arXiv 2310.05873"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Chosen on development pictures.  A mark that fills a fourteenth of a picture is tied to its tokens between 10
        # and 20 thousand rows, at a rate of 1e-3 and where noise hides the mark, and not in 48 thousand at 3e-4 from
        # all noises; the falling rate keeps objects.
        "world": {"steps": 300, "batch": 16, "pictures": 768, "lr": 5e-3, "start": "random", "low": 0.4},
        "world:data": {
            "setting": "data", "steps": 1000, "batch": 32, "pictures": 3000, "lr": 1e-2, "denoiser_lr": 1e-3,
            "schedule": "linear", "start": "random", "low": 0.4,
        },
    }  # fmt: skip

    setting: str = hyperparameter(
        "model", "what trains: tokens, or tokens and denoiser", choices=("model", "data")
    )
    columns: int = hyperparameter(4, "bins side by side", minimum=1, maximum=64)
    rows: int = hyperparameter(4, "bins one above the other", minimum=1, maximum=64)
    alpha: float = hyperparameter(
        2.0, "weight of the other bins over those of the concept; 1 weighs all alike", minimum=1
    )
    written: str = hyperparameter(
        "location", "what captions say of the concept; nothing, with alpha=1, is plain training on the pictures",
        choices=("location", "name", "nothing"),
    )  # fmt: skip
    negative: str = hyperparameter(
        "all", "location tokens of the negative text", choices=("all", "name", "none")
    )
    steps: int = hyperparameter(1000, "optimiser steps", minimum=1)
    batch: int = hyperparameter(8, "pictures a step", minimum=1)
    lr: float = hyperparameter(1e-3, "learning rate of AdamW for the tokens", minimum=0)
    denoiser_lr: float = hyperparameter(1e-5, "learning rate of AdamW for the denoiser", minimum=0)
    schedule: str = hyperparameter(
        "constant",
        "both learning rates over the steps; ours",
        choices=("constant", "linear", "cosine"),
    )
    layers: str = hyperparameter(
        "full", "what of the denoiser trains under setting='data'", choices=LAYERS
    )
    dropout: float = hyperparameter(
        0.1, "share of captions that are dropped under setting='data'", minimum=0, maximum=1
    )
    low: float = hyperparameter(
        0.0, "share of the noise schedule from which on steps train; ours", minimum=0, maximum=0.99
    )
    start: str = hyperparameter(
        "mean", "where token rows begin: mean, or a row drawn for each", choices=("mean", "random")
    )
    confidence: float = hyperparameter(
        0.5, "detections below it do not count", minimum=0, maximum=1
    )
    pictures: int = hyperparameter(
        1000, "pictures to learn from where the user gives none", minimum=1
    )
    sampling_steps: int | None = hyperparameter(
        None, "steps of pictures the model draws; its own when unset", minimum=1
    )
    guidance: float | None = hyperparameter(
        None, "guidance of such pictures; the model's own when unset", minimum=0
    )

    def erase(
        self,
        model: DiffusionModel,
        concepts: Any,
        *,
        keep: Sequence[Any] = (),
        data: Any = None,
        judge: Judge | None = None,
        seed: int = 0,
        run: str | Path | None = None,
    ) -> Edit:
        """Learn an edit of new tokens, and under ``setting="data"`` of the denoiser; ``keep`` is only recorded.

        Args:
            data: Pictures, captions and boxes, or a detector; see :mod:`expunge.core.detections`.  ``None`` takes
                contaminated pictures of the model's world.
            judge: Where nobody else looks, says whether a concept is in a picture; it is then in all bins.

        Raises:
            MissingCapability: The model has several text encoders, or guidance without a second branch.
            InputError: No concept is seen in any picture, or the data is not as described.
            WrongState: The model has location tokens of another edit of this method.
        """
        model.check_family(self)
        model.needs("gradients", "controls")
        wanted = as_concepts(concepts, keep)
        if self.setting == "model" and self.written != "location":
            raise SettingError(
                f"geom-erasing: with written={self.written!r} and setting='model' nothing would train; allowed is "
                "written='location', or setting='data'"
            )
        _two_branches(model)
        words = Words(model, self._grid())
        taken = set(model.tokenizer.get_vocab()) & set(words.grid.tokens)
        if taken and self.written == "location":
            raise WrongState(
                f"{model.name} has {min(taken)!r} of an earlier geom-erasing edit already, so this one's tokens could "
                "not be added to it; take that edit off, or give all concepts to one"
            )
        started, counted = time.monotonic(), model.cost.snapshot()
        found = detected(
            model, wanted, data, judge, count=self.pictures, seed=seed, steps=self.sampling_steps,
            guidance=self.guidance,
        )  # fmt: skip
        task = _Places(self, model, wanted, words, found, seed)
        kept = names_of(keep)
        tokens = finetune.Optimiser(name="adamw", lr=self.lr, schedule=self.schedule)
        denoiser = dataclasses.replace(tokens, lr=self.denoiser_lr)
        trained = finetune.fit(
            task,
            finetune.Loop(steps=self.steps, optimiser=tokens, groups={"denoiser": denoiser}),
            seed=seed,
            modules=tuple(model.parts().values()),
            run=run,
            settings=finetune.request(self, model, wanted, keep=kept, data=found.digest),
            label=self.id,
        )
        rows = trained.values.get(ROWS, task.rows.detach())
        before, after = (
            {name: value for name, value in held.items() if name != ROWS}
            for held in (trained.before, trained.values)
        )
        return finetune.edit_from(
            self, model, wanted, before, after,
            **self._new(words.grid, rows), acts=self._spoken != "none",
            keep=kept, seed=seed, cost=model.cost.since(counted), seconds=time.monotonic() - started,
            report={**trained.report(), **task.report(found)}, data_digest=found.digest,
        )  # fmt: skip

    def _grid(self) -> Grid:
        return Grid(self.columns, self.rows)

    @property
    def _spoken(self) -> str:
        """What the negative says: never more than the captions did."""
        most = {"location": "all", "name": "name", "nothing": "none"}[self.written]
        order = ("none", "name", "all")
        return min(most, self.negative, key=order.index)

    def _new(self, grid: Grid, rows: Tensor) -> dict[str, Any]:
        """The new tokens as an edit carries them, where there are any."""
        if self.written != "location":
            return {}
        return {"further": {ROWS: rows}, "tokens": {"tokenizer": list(grid.tokens)}}

    @classmethod
    def control(cls, edit: Edit, model: DiffusionModel) -> Control:
        """What the edit does while the model samples; refuses guidance without a second branch."""
        _two_branches(model)
        names = [str(concept["name"]) for concept in edit.manifest.concepts]
        return _Away(model, cls(**edit.manifest.settings), names)


def _two_branches(model: DiffusionModel) -> None:
    if not model.two_branches:
        raise MissingCapability(
            f"{model.name}: geom-erasing acts on the unconditional branch of guidance, and {model.layout.title} "
            "has none"
        )


class _Places(finetune.Task):
    """The loss above."""

    def __init__(
        self,
        method: GeomErasing,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        words: Words,
        found: Detected,
        seed: int,
    ) -> None:
        self.method, self.model, self.words = method, model, words
        height, width = found.pictures.shape[1:3]
        names = [concept.name for concept in concepts]
        groups = [
            words.grid.groups(boxes, names, width, height, method.confidence)
            for boxes in found.boxes
        ]
        self.seen = Counter(name for own in groups for name in own)
        for name in names:
            if not self.seen[name]:
                raise InputError(
                    f"{name!r} is seen in none of the {len(groups)} pictures; its places cannot be learnt"
                )
        self.texts = [
            words.write(*pair) for pair in zip(found.captions, map(self._said, groups), strict=True)
        ]
        chosen = [i for i, own in enumerate(groups) if own or method.setting == "data"]
        if method.setting == "model":
            # Only captions that hold a new token have a gradient at its row.
            chosen = [i for i in chosen if max(self.texts[i].ids) >= words.known]
        if not chosen:
            raise InputError(
                f"no caption has room for a location token in {words.room} tokens; shorten the captions"
            )
        self.ids = torch.tensor([self.texts[i].ids for i in chosen])
        self.weights = torch.stack([self._weights(groups[i]) for i in chosen])
        self.latents = model.latents_of(found.pictures[chosen]).cpu()
        self.rows = nn.Parameter(self._start(seed))

    def _said(self, groups: Mapping[str, Mapping[int, float]]) -> dict[str, Mapping[int, float]]:
        if self.method.written == "nothing":
            return {}
        return {
            name: bins if self.method.written == "location" else {} for name, bins in groups.items()
        }

    def _weights(self, groups: Mapping[str, Mapping[int, float]]) -> Tensor:
        """``w`` at the latents' resolution, float32 ``(1, h, w)``."""
        bins = {index for own in groups.values() for index in own}
        grid = region_weights(self.words.grid, bins, self.method.alpha)
        return upsampled(grid, *self.model.latent_shape[1:]).float()[None]

    def _start(self, seed: int) -> Tensor:
        table = self.model.token_table().float().cpu()
        count = self.words.grid.count
        if self.method.start == "mean":
            return table.mean(0).repeat(count, 1)
        draw = noise_generator(seed, "location tokens")
        return table[torch.randint(len(table), (count,), generator=draw)].clone()

    def parameters(self) -> finetune.Groups:
        groups: finetune.Groups = {}
        if self.method.written == "location":
            groups["tokens"] = [(ROWS, self.rows)]
        if self.method.setting == "data":
            groups["denoiser"] = trainable(self.model, self.method.layers)
        return groups

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """The weighted squared error of the noise in some pictures; one tensor for both groups."""
        pick = torch.randint(len(self.ids), (self.method.batch,), generator=step.generator("pick"))
        ids = self.ids[pick]
        if self.method.setting == "data":
            draw = torch.rand(len(pick), generator=step.generator("dropout"))
            ids = torch.where((draw < self.method.dropout)[:, None], self.words.empty.to(ids), ids)
        points, noise = scores.noised(
            self.model, self.latents[pick], step.generator("noise"), low=self.method.low
        )
        made = scores.epsilon(
            self.model, points, self.words.encode(ids, self.rows.to(self.model.device))
        )
        self.model.cost.add("denoiser", len(pick), "backward")
        weights = self.weights[pick].to(made.device)
        loss = (weights * (made - noise).square()).mean()
        return dict.fromkeys(self.parameters(), loss)

    def report(self, found: Detected) -> dict[str, Any]:
        """What was seen, what was written, and what did not fit."""
        names = list(self.seen)
        used = self.ids[self.ids >= self.words.known] - self.words.known
        away = _negative(self.words, self.method, names)
        return {
            "pictures": len(found.pictures), "pictures_from": found.origin, "seen_by": found.seer,
            "pictures_with": dict(self.seen), "pictures_trained_on": len(self.ids),
            "location_tokens_written": torch.bincount(used, minlength=self.words.grid.count).tolist(),
            "location_tokens_cut": sum(text.cut for text in self.texts),
            "captions_cut": sum(text.cut > 0 for text in self.texts),
            "names_cut": sum(text.lost for text in self.texts),
            "negative": None if away is None else away.text,
            "negative_tokens_cut": 0 if away is None else away.cut,
        }  # fmt: skip


def _negative(
    words: Words, method: GeomErasing, names: Sequence[str], text: str = ""
) -> Wording | None:
    """The negative text behind the user's own, or ``None`` where the edit does not act."""
    if method._spoken == "none":
        return None
    return words.everywhere(text, names, located=method._spoken == "all")


class _Away(NegativeText):
    """Puts the negative text in place of the empty text, behind the user's own negative where there is one."""

    def __init__(self, model: DiffusionModel, method: GeomErasing, names: Sequence[str]) -> None:
        super().__init__(model, "")
        self.method, self.names = method, list(names)
        self._texts: dict[str, str | None] = {}

    def text(self, negative: str = "") -> str | None:
        """What stands in the unconditional branch where the user's own negative is given."""
        if negative not in self._texts:
            words = Words(self.model, self.method._grid())
            made = _negative(words, self.method, self.names, negative)
            self._texts[negative] = None if made is None else made.text
        return self._texts[negative]
