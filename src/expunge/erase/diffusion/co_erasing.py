"""Co-Erasing: a concept is described by text and by pictures that the model itself makes of it.

A word does not cover what a denoiser can draw, so erasing by text alone leaves other ways in.  After a text stage
(ESD's loss) a second stage repeats negative guidance with image tokens of self-generated pictures beside the text;
the image branch is then thrown away.  Image tokens are first refined by the concept's text, so that what else is in
the pictures is not erased.  Only a change of the denoiser's own weights is left.

Source: arXiv 2505.11131 (ICML 2025); image branch of arXiv 2308.06721.

    q     = LayerNorm(W e)                             tokens of a picture, (4, width)
    c_img = softmax( q E^T / sqrt(width) ) E           E the concept's text rows; c_img = q without ``refine``
    stage 1   L = || eps_theta(z_t, c, t) - [ eps_o(z_t, 0) - eta (eps_o(z_t, c) - eps_o(z_t, 0)) ] ||^2
    stage 2   L = || eps_theta(z_t, [c, c_img], t)
                     - [ eps_1(z_t, 0) - eta (eps_1(z_t, [c, c_img]) - eps_1(z_t, 0)) ] ||^2

``eps_o`` is the model as it was given, ``eps_1`` the model after stage 1, from which stage 2 also starts.  ``z_t``
comes from the student's own walk towards ``c`` without guidance and is blurred.  ``text_steps=0`` leaves stage 1
out: what another eraser left on the model is then the stage-1 model.  Pictures are made without edits.

``bank`` draws the frozen model's points, pictures and targets of a stage once: an approximation, since the
paper's points follow the student.  ``evidence``, ``refine``, ``text_uncond`` and ``pictures`` are the ablation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...concept import Concept, as_concepts, names_of
from ...core import finetune, scores
from ...core.image_prompts import ImagePrompts, refined, text_only, with_image
from ...core.layer_choice import trainable
from ...core.prompt_templates import with_place
from ...core.trajectories import Trajectories
from ...core.vision import vision_encoder
from ...edit import Edit
from ...errors import InputError, MissingPart
from ...method import Eraser, Judge, setting
from ...models.base import noise_generator
from ...models.diffusion import DiffusionModel

__all__ = ["CoErasing"]

LAYERS = {"noxattn": "other", "xattn": "cross-attention", "full": "full"}
"""The official names of the choices of :mod:`expunge.core.layer_choice`."""

EVIDENCE = ("text+image", "image", "text")


@dataclasses.dataclass(frozen=True)
class CoErasing(Eraser):
    """Text-image collaborative erasing; defaults are the official settings."""

    id: ClassVar[str] = "co-erasing"
    title: ClassVar[str] = "One Image is Worth a Thousand Words"
    source: ClassVar[str] = "arXiv 2505.11131"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {},
        "paper:style": {"template": "a drawing of {}"},
        "paper:unsafe": {"layers": "full", "steps": 1500, "count": 200, "blur": 5},
        # ESD's preset for the world, its steps shared by the two stages; not tuned further.
        "world": {
            "text_steps": 175, "steps": 175, "lr": 5e-4, "eta": 2.0, "batch": 16, "sampling_steps": 20,
            "count": 48, "blur": 0, "bank": 384, "phrases": True,
        },
    }  # fmt: skip

    evidence: str = setting("text+image", "what stage 2 erases by", choices=EVIDENCE)
    refine: bool = setting(True, "refine image tokens by the concept's text")
    text_uncond: bool = setting(
        True, "the unconditional reference sees no picture; if not, an empty one"
    )
    pictures: str = setting(
        "target", "pictures of the concept, or of anything else (a control)", choices=("target", "random"),
    )  # fmt: skip
    count: int = setting(100, "pictures of each concept", minimum=1)
    template: str = setting("a photo of {}", "prompt of the pictures; {} is the concept's name")
    text_layers: str = setting("noxattn", "which modules train in stage 1", choices=tuple(LAYERS))
    text_steps: int = setting(1000, "optimiser steps of stage 1; 0 leaves it out", minimum=0)
    layers: str = setting("noxattn", "which modules train in stage 2", choices=tuple(LAYERS))
    steps: int = setting(1000, "optimiser steps of stage 2", minimum=1)
    eta: float = setting(1.0, "strength of negative guidance", minimum=0)
    image_scale: float = setting(1.0, "weight of attention to image tokens, lambda", minimum=0)
    blur: int = setting(3, "side of the Gaussian kernel over z_t; 0 for none", choices=(0, 3, 5))
    token_noise: float = setting(0.0, "half-width of uniform noise on image tokens", minimum=0)
    lr: float = setting(1e-5, "learning rate of Adam", minimum=0)
    batch: int = setting(1, "points a step", minimum=1)
    guidance: float = setting(1.0, "guidance of the walk to z_t", minimum=0)
    sampling_steps: int = setting(50, "sampling steps of a whole trajectory", minimum=2)
    walked: str = setting(
        "student", "whose walk gives z_t; with a bank the frozen model's", choices=scores.WALKED
    )
    phrases: bool = setting(False, "erase the concept's listed phrases as well as its name")
    bank: int | None = setting(
        None,
        "points of a stage drawn once, by its frozen model; fresh ones every step when unset",
        minimum=1,
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
        """Learn an edit of the denoiser; ``keep`` has no part in the method and is only recorded.

        Args:
            data: The image-prompt branch: an :class:`ImagePrompts`, or a safetensors file of one, whose pictures
                the pipeline's ``image_encoder`` reads; default: the one that belongs to the model's world.

        Raises:
            MissingPart: Pictures are wanted and there is no branch.
            ModelError, UnsupportedModel, InputError: The branch is for another denoiser or another width of text.
            SettingError: The template has no ``{}``.
        """
        model.check_family(self)
        model.needs("gradients", "generate")
        wanted = as_concepts(concepts, keep)
        counted, start = model.cost.snapshot(), time.monotonic()
        kept = names_of(keep)
        with_place(self.id, "template", [self.template])
        if self.evidence == "text":
            self.without_data(data, "evidence='image' or 'text+image'")
        branch = None if self.evidence == "text" else _branch(model, data)
        if branch is not None:
            _fits(branch, model, self.refine)
        digest = None if branch is None else _digest(branch)
        tokens = [] if branch is None else [self._tokens(model, branch, c, seed) for c in wanted]
        # The state names the model before either stage; in between its weights are others.
        request = finetune.request(self, model, wanted, keep=kept, data=digest)
        groups = {
            stage: trainable(model, LAYERS[layers])
            for stage, layers in (("text", self.text_layers), ("image", self.layers))
            if stage == "image" or self.text_steps
        }
        own = {name: parameter for pairs in groups.values() for name, parameter in pairs}
        before = {name: p.detach().clone() for name, p in own.items()}
        after, report = dict(before), dict[str, Any]()
        with finetune.put_back(own, before):
            for stage, pairs in groups.items():
                second = stage == "image"
                trained = self._stage(
                    model, wanted, pairs, seed, branch if second else None, tokens,
                    None if run is None else Path(run) / stage, {**request, "stage": stage},
                )  # fmt: skip
                after.update(trained.values)
                report[stage] = trained.report()
                with torch.no_grad():
                    for name, value in trained.values.items():
                        own[name].copy_(value)
        report["losses"] = {stage: made["losses"]["denoiser"] for stage, made in report.items()}
        report["pictures"] = sum(len(q) for q in tokens)
        return finetune.edit_from(
            self, model, wanted, before, after, keep=kept, seed=seed, cost=model.cost.since(counted),
            seconds=time.monotonic() - start, report=report, data_digest=digest,
        )  # fmt: skip

    def _stage(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        pairs: list[tuple[str, nn.Parameter]],
        seed: int,
        branch: ImagePrompts | None,
        tokens: list[Tensor],
        run: Path | None,
        settings: Mapping[str, Any],
    ) -> finetune.Trained:
        """One stage: with a branch the second, without one the first (or text alone)."""
        attached = contextlib.nullcontext() if branch is None else branch.attached(model)
        steps = self.text_steps if settings["stage"] == "text" else self.steps
        with attached:
            task = _Negative(self, model, concepts, pairs, seed, branch, tokens)
            return finetune.fit(
                task,
                finetune.Loop(steps=steps, optimiser=finetune.Optimiser(lr=self.lr)),
                seed=seed,
                modules=tuple(model.parts().values()),
                run=run,
                settings=settings,
                label=f"{self.id}, {settings['stage']}",
            )

    def _tokens(
        self, model: DiffusionModel, branch: ImagePrompts, concept: Concept, seed: int
    ) -> Tensor:
        """``q`` of pictures that the model without edits makes, ``(count, tokens, width)``."""
        texts = [self.template.replace("{}", concept.name)]
        if self.pictures == "random":
            captions = None if model.companions is None else model.companions.captions
            texts = captions(self.count, seed, (concept.name,)) if captions else [""]
        draws = noise_generator(seed, "co-erasing pictures", concept.name)
        seeds = torch.randint(2**31, (self.count,), generator=draws).tolist()
        asked = [texts[i % len(texts)] for i in range(self.count)]
        with model.lifted():
            made = model.generate(asked, seeds=seeds)
        return branch.tokens(np.asarray(made))


def _branch(model: DiffusionModel, data: Any) -> ImagePrompts:
    """The image-prompt branch that was given, or the world's."""
    if isinstance(data, ImagePrompts):
        return data
    if isinstance(data, (str, Path)):
        encoder = getattr(model.pipeline, "image_encoder", None)
        return ImagePrompts.load(data, None if encoder is None else vision_encoder(encoder))
    if data is not None:
        raise InputError(
            f"co-erasing takes an image-prompt branch or a safetensors file as data, not {type(data).__name__}"
        )
    opened = None if model.companions is None else model.companions.image_prompts
    if opened is None:
        raise MissingPart(
            f"{model.name}: co-erasing needs an image-prompt branch (IP-Adapter) for this denoiser; "
            f"give one as data, or erase by evidence='text'"
        )
    return opened()


def _fits(branch: ImagePrompts, model: DiffusionModel, refine: bool) -> None:
    """Refuse a branch for another denoiser before pictures are made and stage 1 is trained."""
    with branch.attached(model), torch.no_grad():
        width, own = branch.image_proj.norm.normalized_shape[0], model.unconditional().embeddings
        if refine:
            refined(own.new_zeros(1, 1, width), own[0])


def _digest(branch: ImagePrompts) -> str:
    """SHA-256 of the branch's tensors."""
    made = hashlib.sha256()
    for name, value in sorted(branch.state_dict().items()):
        made.update(name.encode())
        made.update(value.detach().cpu().float().numpy().tobytes())
    return made.hexdigest()


class _Negative(finetune.Task):
    """The loss of a stage; pictures take part where there is a branch."""

    def __init__(
        self,
        method: CoErasing,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        pairs: list[tuple[str, nn.Parameter]],
        seed: int,
        branch: ImagePrompts | None,
        tokens: list[Tensor],
    ) -> None:
        self.method, self.model, self.pairs, self.branch = method, model, pairs, branch
        self.tokens = tokens
        named = [
            (t, i)
            for i, c in enumerate(concepts)
            for t in (c.names if method.phrases else (c.name,))
        ]
        texts, self.owner = [t for t, _ in named], [i for _, i in named]
        with torch.no_grad():
            self.concept = model.encode(texts).detach()
            self.empty = model.unconditional().detach()
        self.draws = noise_generator(seed, "co-erasing bank")
        self.points = scores.PointSource(
            model, texts, steps=method.sampling_steps, guidance=method.guidance, seed=seed,
            batch=method.batch, bank=method.bank, answer=self.target,
            walked=method.walked if method.bank is None else "frozen",
        )  # fmt: skip

    def parameters(self) -> finetune.Groups:
        return {"denoiser": self.pairs}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """Mean squared distance of the prediction from the stage's target."""
        self.draws = step.generator("pictures")
        points, answers = self.points.at(step)
        condition = self.described(points, answers.get("tokens"))
        made = scores.epsilon(self.model, self.seen(points), condition)
        self.model.cost.add("denoiser", len(made), "backward")
        return {"denoiser": (made - answers["target"]).square().mean()}

    def seen(self, points: Trajectories) -> Trajectories:
        """The points, blurred in the second stage."""
        if self.branch is None or not self.method.blur:
            return points
        return dataclasses.replace(points, latents=blurred(points.latents, self.method.blur))

    def described(self, points: Trajectories, tokens: Tensor | None) -> Any:
        """``c`` or ``[c, c_img]``, or ``[0, c_img]`` where pictures are to do it alone."""
        text = self.concept.select(points.which)
        if tokens is None:
            return text
        if self.method.evidence == "image":
            text = self.empty.repeat(len(points.which))
        return with_image(text, tokens, self.method.image_scale)

    def target(self, points: Trajectories) -> dict[str, Tensor]:
        """``eps(0) - eta (eps(c) - eps(0))`` of each point, and the image tokens it was asked with."""
        empty, more = self.empty, {}
        if self.branch is not None:
            more["tokens"] = self.drawn(points)
            if self.method.text_uncond:
                empty = text_only(empty, more["tokens"])
            else:
                none = torch.zeros(1, self.branch.image_proj.proj.in_features)
                like = more["tokens"]
                empty = with_image(
                    empty,
                    self.branch.tokens(none).to(like.device, like.dtype),
                    self.method.image_scale,
                )
        condition = self.described(points, more.get("tokens"))
        concept, nothing = scores.asked(self.model, self.seen(points), [condition, empty])
        return {"target": nothing - self.method.eta * (concept - nothing), **more}

    def drawn(self, points: Trajectories) -> Tensor:
        """``c_img`` of a random picture for each point, ``(n, tokens, width)``."""
        found = []
        for text in points.which.tolist():
            own = self.tokens[self.owner[text]]
            one = own[int(torch.randint(len(own), (1,), generator=self.draws))]
            if self.method.token_noise:
                noise = 2 * torch.rand(one.shape, generator=self.draws) - 1
                one = one + self.method.token_noise * noise.to(one.device, one.dtype)
            rows = self.concept.embeddings[text].to(one.device, one.dtype)
            found.append(refined(one[None], rows)[0] if self.method.refine else one)
        return torch.stack(found)


def blurred(latents: Tensor, kernel: int) -> Tensor:
    """Latents ``(n, c, h, w)`` under a Gaussian of ``kernel`` places, edges mirrored.

    Its sigma is 0.15 kernel + 0.35: 0.8 for 3 places, 1.1 for 5.
    """
    sigma, half = 0.15 * kernel + 0.35, kernel // 2
    place = torch.arange(-half, half + 1, device=latents.device, dtype=torch.float32)
    line = torch.exp(-0.5 * (place / sigma).square())
    line = (line / line.sum()).to(latents.dtype)
    channels = latents.shape[1]
    padded = functional.pad(latents, (half,) * 4, mode="reflect")
    across = functional.conv2d(padded, line.expand(channels, 1, 1, -1), groups=channels)
    return functional.conv2d(
        across, line.reshape(-1, 1).expand(channels, 1, -1, 1), groups=channels
    )
