"""Few-shot erasing: a few steps up the gradient of the training loss, in the text encoder alone.

The ordinary loss of a diffusion model on (picture of the concept, prompt with its name) is made larger for a few
steps.  Only the feed-forward blocks of the text encoder and the self-attention of its last layer move; denoiser and
autoencoder stay as they are.  Nobody says what is to take the concept's place: the model slides to something related.

Source: arXiv 2405.07288 (BMVC 2024).

    x_t  = alpha_t x_0 + sigma_t eps             t uniform over the model's timesteps, eps ~ N(0, 1), shape (c, h, w)
    L    = - mean || g_theta(x_t, t, E_phi(y)) - g ||^2          Adam, phi alone; g = eps, or v of velocity models
    y    = a template drawn for each picture at each visit, with the name in it

``x_0`` are the latents of about four pictures: resized, turned left to right with probability ``flip``, encoded as one
draw of the autoencoder's posterior.  All this happens once, so that what changes from visit to visit is ``t``, ``eps``
and the template.  An epoch visits every picture once, in an order of its own, ``batch`` at a time.

``parameters``, of 196 tensors in SD's text encoder:

    feed-forward+last-attention   the paper's choice: 56 tensors, 59 of 123 million parameters
    feed-forward, attention, both of all layers
    all                           token and position tables, norms and projection as well

The loss has no lower bound and nothing is retained: few steps at a small rate are the whole protection, so training
ends with its steps.  ``drift`` in the report says after each epoch how far the rows of prompts with the name, of the
bare templates and of what is to be kept have moved.  ``stop_at``, ours, ends training at the first epoch after which
the loss, at fixed points and under the bare name, has grown so many times (``loss_grown``).  Epochs end in different
places, first something related, at last garbage: a run folder keeps the edit of each, ``epoch-1.safetensors`` and so
on, the very edit that so many ``epochs`` give, and :meth:`FewShotErasing.each_epoch` returns them all.

``zero_shot`` needs no pictures: ``batch`` latents of Gaussian noise, drawn once, stand in their place.  (The published
code draws them uniformly and with one dimension too many.)

Pictures come from the user, else from the files that the concept names, else from the model's world, else from the
model itself.  Dropout stays off.  The last layer is the last by number, not the one that is called the eleventh.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...concept import Concept, as_concepts, names_of
from ...core import examples, finetune, scores
from ...core.prompt_templates import inversion_templates
from ...core.text_drift import TextDrift, filled
from ...core.text_layers import ROLES, trainable_text
from ...edit import Edit
from ...errors import InputError, RunError, SettingError
from ...method import Eraser, Judge, setting
from ...models.base import noise_generator
from ...models.diffusion import DiffusionModel

__all__ = ["FewShotErasing"]

PARAMETERS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "feed-forward+last-attention": ((("feed-forward",), "all"), (("attention",), "last")),
    "feed-forward": ((("feed-forward",), "all"),),
    "attention": ((("attention",), "all"),),
    "both": ((("feed-forward", "attention"), "all"),),
    "all": ((ROLES, "all"),),
}
"""The paper's choices, as roles and layers of :mod:`expunge.core.text_layers`."""

WATCHED = 2
"""Templates, and names to be kept, whose rows are watched: few, since each costs a pass of the text encoder."""
POINTS, LOW = 4, 0.3
"""Points of each latent at which the loss is watched, from this share of the schedule on: below, texts do little."""


@dataclasses.dataclass(frozen=True)
class FewShotErasing(Eraser):
    """Few-shot unlearning in the text encoder; defaults are the paper's."""

    id: ClassVar[str] = "few-shot-erasing"
    title: ClassVar[str] = (
        "Few-shot Erasing: Erasing Concepts from Text-to-Image Diffusion Models with Few-shot Unlearning"
    )
    source: ClassVar[str] = "arXiv 2405.07288"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {},
        "paper:style": {},
        "paper:zero-shot": {"zero_shot": True},
        # More pictures a step and the bare name spare neighbours on development prompts; seeds differ (see the page).
        "world": {"lr": 1e-3, "epochs": 14, "batch": 8, "pictures": 8, "templates": ("{}",)},
    }  # fmt: skip

    parameters: str = setting(
        "feed-forward+last-attention", "what of the text encoder trains", choices=tuple(PARAMETERS)
    )
    epochs: int = setting(5, "visits of every picture; the paper has 4 to 5", minimum=1)
    batch: int = setting(2, "pictures a step", minimum=1)
    lr: float = setting(1e-5, "learning rate of Adam", minimum=0)
    betas: tuple[float, float] = setting(
        (0.9, 0.98), "decays of Adam's moments", minimum=0, maximum=0.999999
    )
    eps: float = setting(1e-6, "guard of Adam's denominator", minimum=0)
    weight_decay: float = setting(1e-8, "of Adam, added to the gradient", minimum=0)
    pictures: int = setting(4, "pictures of each concept where the user gives none", minimum=1)
    flip: float = setting(
        0.5, "probability that a picture is turned left to right, once", minimum=0, maximum=1
    )
    crop: bool = setting(False, "cut pictures of other proportions instead of stretching them")
    templates: tuple[str, ...] = setting(
        (), "prompts with {} for the name; none: the 27 of objects or 19 of styles"
    )
    kind: str = setting(
        "auto", "which list of templates; auto: by the concept's kind",
        choices=("auto", "object", "style"),
    )  # fmt: skip
    phrases: bool = setting(False, "prompts also call the concept by its listed phrases")
    stop_at: float | None = setting(
        None, "end after the epoch at which the loss is so many times what it was; ours", minimum=1
    )
    zero_shot: bool = setting(False, "train on latents of noise instead of pictures")
    encoders: tuple[str, ...] = setting(
        (), "which text encoders train, as the pipeline names them; none: all"
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
        """Learn an edit of the text encoder; ``keep`` is only watched (``drift``) and recorded.

        Args:
            data: ``pictures``, a mapping from a concept's name to ``(uint8 (n, h, w, 3), None, captions)``; the
                captions are not read.  Pictures of any size are resized.
            run: Also receives the edit of every epoch.

        Raises:
            InputError: The data is not as described, or was given for ``zero_shot``.
            SettingError: A template has no place for the name.
        """
        return self._trained(model, concepts, keep, data, seed, run, None)

    def each_epoch(
        self,
        model: DiffusionModel,
        concepts: Any,
        *,
        keep: Sequence[Any] = (),
        data: Any = None,
        seed: int = 0,
        run: str | Path | None = None,
    ) -> list[Edit]:
        """The edit of every epoch, the last of which is that of :meth:`erase`; arguments are the same.

        Raises:
            RunError: The run folder holds a finished run whose earlier epochs were removed.
        """
        found: dict[int, Edit] = {}
        last = self._trained(model, concepts, keep, data, seed, run, found)
        epochs = last.manifest.report["epochs"]
        for epoch in range(1, epochs):
            if epoch not in found:  # of an earlier session
                path = _file(run, epoch)
                if path is None or not path.exists():
                    raise RunError(f"{path}: this edit was removed; use an empty run folder")
                found[epoch] = Edit.load(path)
        return [*(found[epoch] for epoch in range(1, epochs)), last]

    def _trained(
        self, model: DiffusionModel, concepts: Any, keep: Sequence[Any], data: Any, seed: int,
        run: str | Path | None, found: dict[int, Edit] | None,
    ) -> Edit:  # fmt: skip
        """The edit of the last epoch; earlier ones go to the run folder and to ``found``, where there are such."""
        model.check_family(self)
        model.needs("gradients")
        wanted, kept = as_concepts(concepts, keep), names_of(keep)
        counted, started = model.cost.snapshot(), time.monotonic()
        task = _Ascent(self, model, wanted, kept, data, seed)

        def made(
            method: FewShotErasing, epochs: int, before: Mapping[str, Tensor], after: Mapping[str, Tensor]
        ) -> Edit:  # fmt: skip
            """The edit after so many epochs."""
            object.__setattr__(method, "_preset", self.preset)
            edit = finetune.edit_from(
                method, model, wanted, before, after, keep=kept, seed=seed,
                cost=model.cost.since(counted), seconds=time.monotonic() - started,
                report=task.report(epochs), data_digest=task.digest,
            )  # fmt: skip
            path = _file(run, epochs)
            if path is not None:
                edit.save(path)
            if found is not None:
                found[epochs] = edit
            return edit

        task.made = made if run is not None or found is not None else None
        adam = finetune.Optimiser(self.lr, "adam", self.betas, self.eps, self.weight_decay)
        trained = finetune.fit(
            task,
            finetune.Loop(self.epochs * task.epoch_steps, adam),
            seed=seed,
            modules=tuple(model.parts().values()),
            run=run,
            settings=finetune.request(self, model, wanted, keep=kept, data=task.digest),
            label=self.id,
        )
        task.trained = trained.report()
        return made(self, trained.steps // task.epoch_steps, trained.before, trained.values)


def _file(run: str | Path | None, epoch: int) -> Path | None:
    """Where a run folder keeps the edit of an epoch."""
    return None if run is None else Path(run) / f"epoch-{epoch}.safetensors"


class _Ascent(finetune.Task):
    """The loss above, on one set of latents with the names their prompts may use."""

    def __init__(
        self, method: FewShotErasing, model: DiffusionModel, concepts: Sequence[Concept], keep: Sequence[str],
        data: Any, seed: int,
    ) -> None:  # fmt: skip
        self.method, self.model, self.seed = method, model, seed
        self.pairs = self._pairs()
        self.made: Callable[..., Edit] | None = None
        self.trained, self.turned = dict[str, Any](), dict[str, int]()
        self.templates = {concept.name: self._templates(concept) for concept in concepts}
        self.digest: str | None = None
        shown = self._noise(concepts, data) if method.zero_shot else self._pictures(concepts, data)
        self.latents = torch.cat([latents for _, latents in shown])
        self.owners = [concept for concept, latents in shown for _ in latents]
        self.epoch_steps = -(-len(self.owners) // method.batch)
        self.drift = self._watched(concepts, keep)
        self.grown: list[float] = []
        self.first = 0.0 if method.stop_at is None else self._error()

    def _pairs(self) -> list[tuple[str, nn.Parameter]]:
        towers = self.method.encoders or None
        return [
            pair
            for roles, layers in PARAMETERS[self.method.parameters]
            for pair in trainable_text(self.model, roles, layers, towers=towers)
        ]

    def _templates(self, concept: Concept) -> tuple[str, ...]:
        kind = concept.kind if self.method.kind == "auto" else self.method.kind
        found = self.method.templates or inversion_templates(kind)
        for template in found:
            if template.count("{}") != 1:
                raise SettingError(
                    f"few-shot-erasing: the template {template!r} does not hold {{}} once, for the name"
                )
        return found

    # -- latents -----------------------------------------------------------------------------------

    def _pictures(self, concepts: Sequence[Concept], data: Any) -> list[tuple[Concept, Tensor]]:
        """Latents of each concept's pictures, turned or not, encoded once."""
        given, _ = examples.given(data, parts=("pictures",))
        names = [concept.name for concept in concepts]
        for name in given.keys() - set(names):
            raise InputError(
                f"data: there are pictures of {name!r}, which is not erased; allowed: {', '.join(names)}"
            )
        method, model = self.method, self.model
        height, width = (side * model.layout.scale_factor for side in model.latent_shape[1:])
        own = examples.at_hand(model, concepts, given, crop=method.crop)
        shown, found = dict[str, examples.Shown](), []
        for concept in concepts:
            origin, taken = examples.examples(
                model, concept.name, own, count=method.pictures,
                texts=[t.replace("{}", concept.name) for t in self.templates[concept.name]], seed=self.seed,
                steps=model.steps, guidance=model.guidance,
            )  # fmt: skip
            shown[concept.name] = origin, taken
            draw = noise_generator(self.seed, "few-shot-erasing pictures", concept.name)
            sized = [examples.fitted(p, height, width, crop=method.crop) for p in taken.pictures]
            ready, self.turned[concept.name] = examples.turned(np.stack(sized), method.flip, draw)
            found.append((concept, model.latents_of(ready, draw).cpu()))
        self.origins = {name: origin for name, (origin, _) in shown.items()}
        self.digest = examples.examples_digest(shown)
        return found

    def _noise(self, concepts: Sequence[Concept], data: Any) -> list[tuple[Concept, Tensor]]:
        """As many latents of each concept as a step takes, all of them noise."""
        self.method.without_data(data, "zero_shot=False")
        self.origins = {concept.name: "noise" for concept in concepts}
        found = []
        for concept in concepts:
            draw = noise_generator(self.seed, "few-shot-erasing noise", concept.name)
            shape = (self.method.batch, *self.model.latent_shape)
            found.append((concept, torch.randn(shape, generator=draw)))
        return found

    # -- training ----------------------------------------------------------------------------------

    def parameters(self) -> finetune.Groups:
        return {"text": self.pairs}

    def visited(self, index: int) -> list[int]:
        """Rows of a step: the pictures of an epoch in an order of its own, ``batch`` at a time."""
        epoch, place = divmod(index, self.epoch_steps)
        draw = noise_generator(self.seed, "few-shot-erasing order", epoch)
        order = torch.randperm(len(self.owners), generator=draw).tolist()
        return order[place * self.method.batch : (place + 1) * self.method.batch]

    def prompt(self, concept: Concept, generator: torch.Generator) -> str:
        """A template and a name, both drawn."""
        names = concept.names if self.method.phrases else (concept.name,)
        return _one(self.templates[concept.name], generator).replace("{}", _one(names, generator))

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """The negative training loss of some pictures."""
        rows, draw = self.visited(step.index), step.generator()
        texts = [self.prompt(self.owners[row], draw) for row in rows]
        latents = self.latents[rows]
        points, noise = scores.noised(self.model, latents, draw)
        condition = self.model.encode(texts)
        error = scores.denoising_error(self.model, points, latents, noise, condition)
        for component in ("denoiser", "encoder"):
            self.model.cost.add(component, len(rows), "backward")
        return {"text": -error.mean()}

    # -- monitors ----------------------------------------------------------------------------------

    def _watched(self, concepts: Sequence[Concept], keep: Sequence[str]) -> TextDrift:
        templates = list(dict.fromkeys(self.templates[concepts[0].name]))[:WATCHED]
        bare = [" ".join(t.replace("{}", " ").split()) for t in templates]
        named, kept = filled(templates, names_of(concepts)), filled(templates, keep[:WATCHED])
        return TextDrift(self.model, {"concept": named, "templates": bare, "kept": kept})

    @torch.no_grad()
    def _error(self) -> float:
        """The training loss of all latents under their names, at points that are the same each time."""
        draw, found = noise_generator(self.seed, "few-shot-erasing watch"), []
        for _ in range(POINTS):
            for rows in torch.arange(len(self.owners)).split(32):
                texts, latents = [self.owners[i].name for i in rows.tolist()], self.latents[rows]
                points, noise = scores.noised(self.model, latents, draw, low=LOW)
                condition = self.model.encode(texts)
                found.append(scores.denoising_error(self.model, points, latents, noise, condition))
        return float(torch.cat(found).mean())

    def after(self, step: finetune.Step, losses: Mapping[str, float]) -> bool:
        """At the end of an epoch: how far words and loss have come, and the epoch's edit if it is kept."""
        epoch, rest = divmod(step.index + 1, self.epoch_steps)
        if rest:
            return False
        self.drift.measure()
        stop = False
        if self.method.stop_at is not None:
            self.grown.append(self._error() / self.first)
            stop = self.grown[-1] >= self.method.stop_at
        if self.made is not None and not (stop or step.last):
            after = step.values()
            with step.original():
                method = dataclasses.replace(self.method, epochs=epoch)
                self.made(method, epoch, {name: p.detach() for name, p in self.pairs}, after)
        return stop

    def state(self) -> dict[str, Tensor]:
        grown = torch.tensor(self.grown, dtype=torch.float64)
        return {**self.drift.state(), "grown": grown}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.drift.restore(state)
        self.grown = state["grown"].tolist()

    def report(self, epochs: int) -> dict[str, Any]:
        """What was trained, on what, and how far it went; losses once training is done."""
        names = [concept.name for concept in self.owners]
        return {
            **self.trained, "epochs": epochs, "steps_per_epoch": self.epoch_steps,
            "pictures": {name: names.count(name) for name in dict.fromkeys(names)},
            "pictures_from": self.origins, "pictures_turned": self.turned,
            "trained_tensors": len(self.pairs),
            "trained_parameters": sum(p.numel() for _, p in self.pairs),
            "drift": {k: [round(v, 6) for v in own[:epochs]] for k, own in self.drift.values.items()},
            "loss_grown": [round(v, 6) for v in self.grown[:epochs]],
        }  # fmt: skip


def _one(listed: Sequence[str], generator: torch.Generator) -> str:
    return listed[int(torch.randint(len(listed), (1,), generator=generator))]
