"""MACE: mass concept erasure, up to a hundred concepts in one set of key and value matrices.

A closed-form refinement first takes what other words say of a concept out of the cross-attention keys and
values.  Then one rank-one change for each concept, trained alone, takes the attention of the concept's
pixels off its tokens.  A second closed form fuses all changes into one set of matrices.

Source: arXiv 2403.06135 (CVPR 2024).  ``W0 (out, d)`` are the present key and value matrices, ``C_g`` is
``sum k k^T`` over the rows ``k`` of a general caption, averaged over captions, ``C_d`` the same over texts of
the domain (what is to be kept), and ``P = p (N_g C_g + w N_d C_d)``, ``(d, d)``.

1. Refinement.  A template with the concept's name and the same with its mapping concept are aligned: shared
   words, end and padding are paired, the names themselves dropped (policy ``aligned``).  For all pairs
   ``x -> y`` and ``lambda`` the ridge

       W* = argmin sum ||W x - W0 y||^2 + tr (W - W0) P (W - W0)^T + lambda ||W - W0||_F^2

2. For each concept alone, ``W* + up down`` on every key and value matrix, of rank one, minimises

       L = sum_l || A_l[all heads, pixels in the mask, columns of the concept's tokens] ||_F

   over noised pictures of it; ``A_l (heads, pixels, tokens)`` are the attention probabilities of layer ``l``.
   The columns are every occurrence of the name, and with ``use_pooler`` all end and padding columns.
   Timesteps are drawn with probability proportional to sigmoid(0.05 (t - 200)) - sigmoid(0.05 (t - 400)).
3. Fusion.  With ``W_c`` the weights of concept ``c`` after stage 2 and ``x`` all rows of its texts

       W = (sum_c W_c sum x x^T + W0 P + lambda W*) (sum_c sum x x^T + P + lambda I)^{-1}

The moments are means: the published sums ran over ``N_g`` captions (``general_texts``) and about ``N_d``
texts of the domain (``domain_texts``), and a mean times that number takes their place, so that ``p`` and
``w`` keep their meaning whatever captions are at hand.

Where pictures come from: ``data``, else the model's world (with exact masks), else the model draws them.
Pictures without masks count whole, which suppresses the tokens everywhere; ours, in place of a segmenter.
Also ours: the texts of the templates, and the bare name among them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import Concept, as_concepts
from ...core import examples, finetune, fusion
from ...core.attention import AttentionNorms, need_cross_attention, shrunk_masks, token_columns
from ...core.closed_form import Solution, ValueMoments
from ...core.low_rank import LowRank
from ...core.projections import Projections, kept_texts, per_layer_edit, shared_edit
from ...core.token_policy import Pair, accumulate
from ...edit import Edit
from ...errors import InputError
from ...method import Eraser, Judge, setting
from ...models.base import Pictures
from ...models.diffusion import DiffusionModel
from ...models.types import Condition

__all__ = ["MACE", "timestep_weights"]


def timestep_weights(count: int, sampling: str) -> Tensor:
    """Unnormalised probabilities of timesteps 0 to ``count - 1``; ``importance``: mostly from 200 to 400."""
    t = torch.arange(count, dtype=torch.float64)
    if sampling == "uniform":
        return torch.ones_like(t)
    return torch.sigmoid(0.05 * (t - 200)) - torch.sigmoid(0.05 * (t - 400))


@dataclasses.dataclass(frozen=True)
class MACE(Eraser):
    """Mass concept erasure; defaults are the paper's for objects."""

    id: ClassVar[str] = "mace"
    title: ClassVar[str] = "MACE: Mass Concept Erasure in Diffusion Models"
    source: ClassVar[str] = "arXiv 2403.06135"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {},
        "paper:style": {
            "preserve_scale": 1e-4, "domain_scale": 8e4, "ridge": 0.0, "lr": 1e-4, "guide": "art",
        },
        "paper:identity": {
            "preserve_scale": 1e-4, "domain_scale": 8e4, "ridge": 0.0, "lr": 1e-4, "guide": "a person",
        },
        "paper:unsafe": {
            "preserve_scale": 7e-7, "ridge": 0.0, "steps": 120, "timestep_sampling": "uniform",
            "guide": "a person wearing clothes",
        },
        # Chosen on development prompts, one and ten people of thirty erased, by pictures: with twice the p more of
        # the others stay when ten go, but one who goes alone is still recognised in a third.
        "world": {
            "preserve_scale": 5e-3, "domain_scale": 40.0, "lr": 2e-3,
            "templates": ("a portrait of {}",), "context_prompts": 20, "general_prompts": 400,
        },
    }  # fmt: skip

    preserve_scale: float = setting(0.0, "Weight p of general and domain rows", minimum=0)
    domain_scale: float = setting(
        0.0, "Weight w of the domain (what is to be kept), beside general captions", minimum=0
    )
    ridge: float = setting(
        1000.0, "Weight lambda of the distance to the weights before a solve", minimum=0
    )
    general_texts: int = setting(
        600_000, "Captions the published general sum ran over; a mean times it stands for the sum", minimum=1
    )  # fmt: skip
    domain_texts: int = setting(
        3_000, "Texts the published domain sum ran over; a mean times it stands for the sum", minimum=1
    )  # fmt: skip
    refine: bool = setting(True, "Closed-form refinement before training (stage 1)")
    steps: int = setting(50, "Optimiser steps for each concept", minimum=1)
    lr: float = setting(1e-5, "Learning rate of AdamW", minimum=0)
    weight_decay: float = setting(0.01, "Weight decay of AdamW", minimum=0)
    batch: int = setting(1, "Pictures a step", minimum=1)
    rank: int = setting(1, "Rank of each concept's change", minimum=1)
    use_pooler: bool = setting(True, "Also suppress attention to end and padding tokens")
    timestep_sampling: str = setting(
        "importance", "How timesteps are drawn", choices=("importance", "uniform")
    )
    pictures: int = setting(8, "Pictures of each concept, where none are given", minimum=1)
    sampling_steps: int = setting(30, "Sampling steps of pictures the model draws", minimum=2)
    guidance: float = setting(7.5, "Guidance of pictures the model draws", minimum=0)
    templates: tuple[str, ...] = setting(
        (), "Texts with {} for the name, beside the bare name; none: thirty for the concept's kind"
    )
    context_prompts: int = setting(
        0, "Whole prompts the model's world has of each concept, used as templates too", minimum=0
    )
    general_prompts: int = setting(
        1000, "General captions taken from the model's world, where none are given", minimum=0
    )
    guide: str | None = setting(
        None, "Mapping concept; none: the anchor, else 'art' for styles, else ''"
    )
    erase_phrases: bool = setting(True, "Erase the concept's listed phrases too")

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
        """Refine, train one change for each concept, fuse.

        ``keep`` is the domain, which weighs nothing where ``preserve_scale`` or ``domain_scale`` is 0.  ``data`` is a
        mapping: ``pictures``, concept name -> ``(pictures, masks or None, captions)`` (see
        :class:`~expunge.models.base.Pictures`), and ``captions``, general texts.
        """
        model.check_family(self)
        model.needs("gradients", "controls")
        began, counted = time.perf_counter(), model.cost.snapshot()
        wanted = as_concepts(concepts, keep)
        group = Projections(model, need_cross_attention(model, self.id))
        pictures, captions = examples.given(data, model, concepts=wanted)
        if captions and not self.preserve_scale:
            raise InputError(
                f"{self.id}: data holds 'captions', which weigh nothing with preserve_scale=0; leave them out or set it"
            )
        # Before pictures are drawn: a mistake in a template or the guide shows here, or nothing to preserve.
        texts = [fusion.pairs(self, model, concept) for concept in wanted]
        general, domain = fusion.preserved(self, model, wanted, keep, captions)
        own = examples.at_hand(model, wanted, pictures)
        shown = {c.name: self._examples(model, c, own, seed) for c in wanted}
        digest = examples.examples_digest(shown, captions)
        prior = fusion.prior(self, group, general, domain)
        refined = self._refined(group, texts, prior)
        shared: dict[str, Any] = {"keep": kept_texts(keep), "seed": seed}
        report: dict[str, Any] = {
            "pictures": {name: origin for name, (origin, _) in shown.items()},
            "general_texts": len(general),
            "domain_texts": len(domain),
        }
        changes, losses = [], {}
        with contextlib.ExitStack() as stack:
            if self.refine:
                stage = shared_edit(self, model, wanted, [(group, refined)], report={}, **shared)
                report["refinement"] = {
                    n: stage.manifest.report[n] for n in ("condition", "relative_change", "drift")
                }
                stack.enter_context(stage.on(model))
            request = finetune.request(self, model, wanted, keep=shared["keep"], data=digest)
            for i, concept in enumerate(wanted):
                folder = None if run is None else Path(run) / f"concept-{i:03d}"
                factors, losses[concept.name] = self._suppressed(
                    model, group, concept, shown[concept.name][1], seed, request, folder
                )
                changes.append(factors)
        fused = self._fused(group, refined, texts, changes, prior)
        return per_layer_edit(
            self, model, wanted, [(group, fused)], self.ridge, report={**report, "losses": losses},
            data_digest=digest, cost=model.cost.since(counted), seconds=time.perf_counter() - began, **shared,
        )  # fmt: skip

    # -- closed forms --------------------------------------------------------------------------

    def _refined(
        self, group: Projections, texts: Sequence[Sequence[Pair]], prior: tuple[Tensor, int]
    ) -> Solution:
        """Stage 1: ``W* = W0 (I + D)``; ``D`` is zero where there is no refinement."""
        if not self.refine:
            return Solution(torch.zeros_like(prior[0]), 0, 1.0, float("inf"))
        pairs = [pair for own in texts for pair in own]
        moments = accumulate(group.text, pairs, (), "aligned", erase=1.0, keep=0.0)
        moments.keep_moment(*prior)
        return moments.solve(self.ridge)

    def _fused(
        self,
        group: Projections,
        refined: Solution,
        texts: Sequence[Sequence[Pair]],
        changes: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
        prior: tuple[Tensor, int],
    ) -> ValueMoments:
        """Stage 3: every concept's own values for all rows of its texts, the old ones for the prior."""
        centres = None
        if self.refine:
            right = torch.eye(group.width, dtype=torch.float64) + refined.change
            centres = {n: w.to("cpu", torch.float64) @ right for n, w in group.weights.items()}
        erased = [[pair.erased for pair in own] for own in texts]
        return fusion.fused(group, erased, changes, prior, centres)

    # -- training ------------------------------------------------------------------------------

    def _examples(
        self, model: DiffusionModel, concept: Concept, own: Mapping[str, examples.Shown], seed: int
    ) -> tuple[str, Pictures]:
        """Where its pictures come from, and the pictures, each caption naming it by one of its names in turn."""
        names = concept.names if self.erase_phrases else (concept.name,)
        form = fusion.thirty(concept.kind)[0]
        origin, found = examples.examples(
            model, concept.name, own, count=self.pictures, texts=[form.replace("{}", n) for n in names],
            seed=seed, steps=self.sampling_steps, guidance=self.guidance,
        )  # fmt: skip
        known = model.companions.concept(concept.name) if model.companions is not None else None
        spoken = (*concept.names, *(known.names if known is not None else ()))
        masks = None if concept.kind == "style" else found.masks
        if masks is not None and origin == "data":
            size = model.latent_shape[1], model.latent_shape[2]
            seen = shrunk_masks(torch.as_tensor(masks), size).flatten(1).any(1)
            if not bool(seen.all()):
                empty = int(seen.logical_not().nonzero()[0])
                raise InputError(
                    f"data: the mask of picture {empty} of {concept.name!r} holds nothing on latents of "
                    f"{size[0]} x {size[1]}; allowed is one that marks the concept, or None"
                )
        return origin, examples.called(found._replace(masks=masks), spoken, names)

    def _suppressed(
        self,
        model: DiffusionModel,
        group: Projections,
        concept: Concept,
        shown: Pictures,
        seed: int,
        request: Mapping[str, Any],
        run: Path | None,
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], list[Any]]:
        """Stage 2 of one concept, on the model as it is: its changes, and the losses."""
        adapters = LowRank(model, group.names, rank=self.rank, seed=seed, purpose=concept.name)
        adamw = finetune.Optimiser(self.lr, "adamw", weight_decay=self.weight_decay, clip=1.0)
        with adapters.attached():
            trained = finetune.fit(
                _Suppression(self, model, group, adapters, concept, shown),
                finetune.Loop(self.steps, adamw),
                seed=seed,
                modules=tuple(model.parts().values()),
                run=run,
                settings={**request, "trained": concept.name},
                label=f"{self.id}: {concept.name}",
            )
        return adapters.factors(trained.values), trained.report()["losses"]["changes"]


class _Suppression(finetune.Task):
    """The loss of stage 2, averaged over the rows of a batch."""

    def __init__(
        self, method: MACE, model: DiffusionModel, group: Projections, adapters: LowRank,
        concept: Concept, shown: Pictures,
    ) -> None:  # fmt: skip
        self.method, self.model, self.adapters, self.name = method, model, adapters, concept.name
        self.latents = model.latents_of(shown.pictures).to(model.dtype)
        self.masks = None if shown.masks is None else torch.as_tensor(shown.masks).float()
        with torch.no_grad():
            self.condition: Condition = model.encode(list(shown.captions)).detach()
        names = concept.names if method.erase_phrases else (concept.name,)
        said = [names[i % len(names)] for i in range(len(shown.captions))]
        self.columns = token_columns(group.text, shown.captions, said, padding=method.use_pooler)
        count = model.pipeline.scheduler.config.num_train_timesteps
        self.weights = timestep_weights(count, method.timestep_sampling)

    def parameters(self) -> finetune.Groups:
        return {"changes": self.adapters.parameters()}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """The sum over cross-attention layers of the norms, at one draw of pictures, timesteps and noise."""
        model, count = self.model, self.method.batch
        draw = step.generator(self.name)
        pick = torch.randint(len(self.latents), (count,), generator=draw)
        times = torch.multinomial(self.weights, count, replacement=True, generator=draw)
        latents = self.latents[pick.to(self.latents.device)]
        noise = torch.randn(latents.shape, generator=draw).to(latents)
        masks = None if self.masks is None else self.masks[pick]
        height, width = latents.shape[-2:]
        watch = AttentionNorms(masks, self.columns[pick], (height, width))
        times = times.to(model.device)
        with model.controlled(watch):
            model.predict(model.noised(latents, noise, times), times, self.condition.select(pick))
        model.cost.add("denoiser", count, "backward")
        assert isinstance(watch.total, Tensor)
        return {"changes": watch.total.mean()}
