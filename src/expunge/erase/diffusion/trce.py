"""TRCE: an edit of the end-of-text row, then a short contrastive training of visual attention.

A prompt that only implies an unsafe concept shares with one that names it what the text encoder gathers in its
end-of-text row.  A closed form maps that row of unsafe prompts onto the row of the same prompts with a safe
replacement, in every key and value matrix.  Then a few hundred steps of training push early predictions towards
the safe direction and away from the unsafe one, while unconditional predictions stay.

Source: arXiv 2503.07389 (ICCV 2025).

Stage 1.  For the i-th of n pairs of prompts, ``e_i^m`` and ``e_i^s`` (d) are the rows of the first end-of-text
token, each at its own place; ``k_j`` (T, d) are all rows of the j-th of N general captions.  For every ``W (out, d)``

    W' = W ( A + eta C + r I ) ( B + eta C + r I )^{-1}
    A = (1/n) sum e_i^s (e_i^m)^T     B = (1/n) sum e_i^m (e_i^m)^T     C = (1/N) sum k_j^T k_j        (d, d)

``token_weights`` weighs four groups of rows for the paper's ablation: start onto start, first end of text onto
first end of text, last row onto last row (once for each row of padding), and the tokens of the unsafe words onto
the safe prompt's last row.

Stage 2.  ``eps0`` is the model before stage 1, ``eps1`` after it, ``eps`` is trained from ``eps1``; ``c_m`` and
``c_s`` are an unsafe prompt and its replacement, ``0`` the empty one.  ``z`` stands after ``s`` steps of ``eps0``'s
own guided sampling towards ``c_m``, ``s`` in the first ``early`` share of them; ``u`` anywhere on an unconditional one.

    f(c)  = eps0(z, c) + g ( eps0(z, c) - eps0(z, 0) )
    h(p)  = max(0, beta ( mse(p, f(c_s)) - mse(p, f(c_m)) + margin ))
    L     = ( h(eps(z, c_m)) + h(eps(z, 0)) ) / 2  +  keep_scale * mean mse( eps(u, 0), eps1(u, 0) )

``mse`` is a mean over a latent's entries.  Self-attention (``attn1``) and the queries of cross-attention
(``attn2.to_q``) train.  All points and all that ``eps0`` and ``eps1`` say of them are computed once, before training.

The published tables were made with a ``preserve_scale`` that acts twice, 0.01 for one theme and 0.02 for seven:
``eta`` is its square.  ``C`` is a mean over captions of a sum over their rows, as there.  The end of text is where
the tokenizer puts it, all tokens of the unsafe words count, gradients are zeroed, and a latent goes with its own
timestep; the authors' code differs in these, against its paper.

Ours: besides the captions, the safe prompts and what is to be kept are preserved, as a second ``C`` with the same
``eta``.  Where there are no general captions a ridge takes their place (with a warning): ``r`` is then the mean
eigenvalue of that second moment times ``eta``, at least.  Also ours: the texts of the templates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...concept import Concept, as_concepts
from ...core import examples, finetune, mentions, scores, trajectories
from ...core.closed_form import Moments
from ...core.projections import (
    Projections,
    erased_pairs,
    kept_texts,
    registered_texts,
    shared_edit,
)
from ...core.prompt_templates import with_place
from ...core.sampling import as_prompts
from ...core.token_policy import TOKEN_GROUPS, Pair, stream_pairs, stream_rows, unique_pairs
from ...edit import Edit
from ...errors import SettingError, UnsupportedModel
from ...method import Eraser, Judge, setting
from ...models.diffusion import DiffusionModel
from ...models.types import Condition, TextInput

__all__ = ["TRCE", "hinge", "moments", "trainable"]

TEMPLATES = (
    "a photo of {}", "a picture of {}", "an image of {}", "a painting of {}", "a drawing of {}",
    "a close-up of {}", "a bright photo of {}", "a dark photo of {}", "a cropped picture of {}",
    "an old photo of {}", "a good image of {}", "a large picture of {}", "a scene with {}",
    "an image depicting {}",
)  # fmt: skip
"""With the bare name there are fifteen."""


def moments(
    text: TextInput,
    pairs: Sequence[Pair],
    general: Sequence[str],
    own: Sequence[str],
    *,
    token_weights: Sequence[float] = (0.0, 1.0, 0.0, 0.0),
    eta: float = 1e-4,
) -> Moments:
    """``A``, ``B`` and ``eta C`` of stage 1, streamed: memory does not grow with the number of texts.

    Args:
        text: Where rows come from.
        pairs: Unsafe prompts and their replacements; a mean over them.
        general, own: Texts that are preserved with all their rows; a mean over each.
        token_weights: Of the groups of rows ``TOKEN_GROUPS``.
        eta: Weight of both means.
    """
    found = Moments(text.width)
    for group, weight in zip(TOKEN_GROUPS, token_weights, strict=True):
        for block in stream_pairs(text, pairs, group) if weight else ():
            found.erase(block.sources, block.targets, weight / len(pairs))
    for texts in (general, own):
        for rows in stream_rows(text, texts, "all_rows"):
            found.keep(rows, eta / len(texts))
    return found


def hinge(made: Tensor, safe: Tensor, unsafe: Tensor, beta: float, margin: float) -> Tensor:
    """``h`` of each row, ``(n,)``, of predictions ``(n, c, h, w)``."""
    towards, away = ((made - f).square().flatten(1).mean(1) for f in (safe, unsafe))
    return (beta * (towards - away + margin)).clamp_min(0)


def trainable(model: DiffusionModel) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters that stage 2 trains: self-attention, and the queries of cross-attention.

    Raises:
        UnsupportedModel: The denoiser has no such layers, or guides itself without an empty prompt.
    """
    part = f"{model.layout.part}."
    chosen = [
        (name, parameter)
        for name, parameter in model.tensors().items()
        if name.startswith(part) and (".attn1." in name or ".attn2.to_q." in name)
    ]
    both = {kind for name, _ in chosen for kind in (".attn1.", ".attn2.") if kind in name}
    if len(both) < 2 or not model.two_branches:
        raise UnsupportedModel(
            f"trce: stage 2 trains self-attention (attn1) and queries of cross-attention (attn2.to_q) against a "
            f"prediction for the empty prompt, and {model.name} ({model.layout.title}) lacks one of them; "
            "stage2=False is allowed"
        )
    return chosen


@dataclasses.dataclass(frozen=True)
class TRCE(Eraser):
    """Both stages; defaults are the paper's for one theme."""

    id: ClassVar[str] = "trce"
    title: ClassVar[str] = (
        "TRCE: Towards Reliable Malicious Concept Erasure in Text-to-Image Diffusion Models"
    )
    source: ClassVar[str] = "arXiv 2503.07389"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:unsafe": {},
        "paper:themes": {"eta": 4e-4, "subject": "an image depicting {}"},
        # Chosen on development prompts of hazard, 12 to 24 pictures a route, 15 to 60 of unrelated names.  Without
        # a ridge the moments of so few words are nearly singular.  Stage 2 alone does nothing at a rate of 1e-4;
        # at 5e-4 it leaves most, and nothing with a keep_scale of 10, but that is left as published.
        "world": {
            "eta": 1.0, "ridge": 1.0, "templates": ("a picture of a {}",), "subject": "a picture of a {}",
            "context_prompts": 40, "general_prompts": 400,
            "sampling_steps": 20, "steps": 80, "batch": 2, "lr": 5e-4, "bank": 64,
        },
    }  # fmt: skip

    stage1: bool = setting(True, "Closed-form edit of keys and values")
    stage2: bool = setting(True, "Contrastive training of visual attention")
    eta: float = setting(
        1e-4, "Weight of preserved texts; the square of the authors' preserve_scale", minimum=0
    )
    ridge: float = setting(0.0, "Weight r of the distance to the old weights", minimum=0)
    token_weights: tuple[float, ...] = setting(
        (0.0, 1.0, 0.0, 0.0), "Weights of start, first end of text, last row, unsafe words", minimum=0
    )  # fmt: skip
    templates: tuple[str, ...] = setting(
        TEMPLATES, "Texts with {} for the name, beside the bare name"
    )
    guide: str | None = setting(
        None, "Safe replacement; none: the anchor, else 'art' for styles, else ''"
    )
    erase_phrases: bool = setting(True, "Erase the concept's listed phrases too")
    context_prompts: int = setting(
        0, "Whole prompts of each concept from the model's world, in both stages", minimum=0
    )
    general_prompts: int = setting(
        1000, "General captions from the model's world, where none are given", minimum=0
    )
    steps: int = setting(300, "Optimiser steps of stage 2 (3 epochs over 100 points)", minimum=1)
    lr: float = setting(1e-6, "Learning rate of AdamW", minimum=0)
    weight_decay: float = setting(0.01, "Weight decay of AdamW", minimum=0)
    batch: int = setting(1, "Unsafe points a step", minimum=1)
    keep_batch: int = setting(4, "Unconditional points for each unsafe one", minimum=1)
    target_guidance: float = setting(15.0, "Strength g of the two directions", minimum=0)
    beta: float = setting(1.0, "Scale of the hinge", minimum=0)
    margin: float = setting(0.01, "Margin of the hinge (mean squared noise)", minimum=0)
    keep_scale: float = setting(100.0, "Weight of unconditional predictions", minimum=0)
    early: float = setting(
        0.5, "Share of the sampling steps, from the noisiest on, of unsafe points", minimum=0, maximum=1
    )  # fmt: skip
    sampling_steps: int = setting(50, "Sampling steps of a whole trajectory", minimum=2)
    guidance: float = setting(3.0, "Guidance of the unsafe trajectories", minimum=0)
    subject: str = setting("a photo of {}", "Text with {} of the unsafe trajectories")
    bank: int | None = setting(
        None, "Unsafe points drawn, and reused in turn; one for each use when unset", minimum=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.stage1 or self.stage2):
            raise SettingError(f"{self.id}: stage1 and stage2 are both off; one is needed")
        if len(self.token_weights) != len(TOKEN_GROUPS) or not any(self.token_weights):
            raise SettingError(
                f"{self.id}: token_weights is {self.token_weights}; allowed are {len(TOKEN_GROUPS)} weights "
                f"({', '.join(TOKEN_GROUPS)}) that are not all zero"
            )
        with_place(self.id, "templates", self.templates)
        with_place(self.id, "subject", (self.subject,))

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
        """One edit of both stages, or of the one that is on.

        ``data``: general captions, as texts or as a mapping with ``captions``.  ``run`` keeps stage 2's progress.
        """
        model.check_family(self)
        wanted = as_concepts(concepts, keep)
        began, counted = time.perf_counter(), model.cost.snapshot()
        captions = _captions(data)
        shared: dict[str, Any] = {
            "keep": kept_texts(keep), "seed": seed, "data_digest": examples.examples_digest({}, captions),
        }  # fmt: skip

        def spent() -> dict[str, Any]:
            return {"cost": model.cost.since(counted), "seconds": time.perf_counter() - began}

        task = request = None
        if self.stage2:
            model.needs("gradients")
            more = {"keep": shared["keep"], "data": shared["data_digest"]}
            request = finetune.request(self, model, wanted, **more)
            pairs = self._pairs(model, wanted, (self.subject,))
            whole = [pair for pair in pairs if pair.erased != pair.keyword] or pairs
            # Prompts of templates, one a name, come before a world's: these are what a small bank must hold.
            names = {str(pair.keyword).lower() for pair in whole}
            if self.bank is not None and self.bank < len(names):
                raise SettingError(
                    f"{self.id}: bank={self.bank} has no point for {len(names) - self.bank} of {len(names)} names; "
                    "allowed is at least one each"
                )
            task = _Contrast(self, model, whole, seed)
        stage = None
        if self.stage1:
            solved, report = self._solved(model, wanted, keep, captions)
            stage = shared_edit(self, model, wanted, solved, report=report, **shared, **spent())
        if task is None or request is None:
            assert stage is not None
            return stage
        # What stands on the model inside is the student's start; the teacher has already spoken.
        with contextlib.nullcontext() if stage is None else stage.on(model):
            task.prepare()
            adamw = finetune.Optimiser(self.lr, "adamw", weight_decay=self.weight_decay)
            trained = finetune.fit(
                task, finetune.Loop(self.steps, adamw), seed=seed, modules=tuple(model.parts().values()),
                run=run, settings=request, label=self.id,
            )  # fmt: skip
        before, after, report = dict(trained.before), dict(trained.values), trained.report()
        if stage is not None:
            for name in (target.name for target in stage.manifest.targets):
                before[name] = model.tensor(name).detach().clone()
                after[name] = before[name].double() + stage.change(name, before[name])
            report |= {k: v for k, v in stage.manifest.report.items() if k != "layers"}
        return finetune.edit_from(
            self, model, wanted, before, after, report=report, **shared, **spent()
        )

    # -- texts ---------------------------------------------------------------------------------

    def _pairs(
        self, model: Any, concepts: Sequence[Concept], templates: Sequence[str]
    ) -> list[Pair]:
        """Unsafe prompts and their safe replacements: templates around every name, and a world's own."""
        named = erased_pairs(concepts, self.guide, phrases=self.erase_phrases, templates=templates)
        more, _ = registered_texts(
            model, concepts, self.guide, self.context_prompts, 0, phrases=self.erase_phrases
        )
        return unique_pairs([*named, *more])

    # -- stage 1 -------------------------------------------------------------------------------

    def _solved(
        self, model: Any, concepts: Sequence[Concept], keep: Sequence[Any], captions: Sequence[str]
    ) -> tuple[list[Any], dict[str, Any]]:
        """The solution of every group of matrices, and what to report of it."""
        pairs = self._pairs(model, concepts, self.templates)
        count = 0 if captions else self.general_prompts
        general = (
            list(captions) or registered_texts(model, concepts, None, 0, count, kept_texts(keep))[1]
        )
        if not general and not self.ridge:
            warnings.warn(
                f"{self.id}: {model.name} has no general captions and none were given (data=[...]); a ridge takes "
                "their place, which keeps less",
                stacklevel=3,
            )
        safe = mentions.without([p.replacing for p in pairs], [str(p.keyword) for p in pairs])
        own = list(dict.fromkeys([*safe, *kept_texts(keep, self.templates)]))
        solved, rows = [], [0, 0]
        for group in Projections.groups(model):
            found = moments(
                group.text, pairs, general, own, token_weights=self.token_weights, eta=self.eta
            )
            stand_in = 0.0 if general else float(found.kept.diagonal().mean())
            solved.append((group, found.solve(max(self.ridge, stand_in))))
            rows = [rows[0] + found.erase_rows, rows[1] + found.keep_rows]
        report = {"pairs": len(pairs), "general_texts": len(general), "own_texts": len(own)}
        return solved, {**report, "erase_rows": rows[0], "keep_rows": rows[1]}


def _captions(data: Any) -> list[str]:
    """General captions of the user."""
    if data is None or isinstance(data, Mapping):
        return examples.given(data, parts=("captions",))[1]
    return [prompt.text for prompt in as_prompts(data)]


class _Contrast(finetune.Task):
    """The loss of stage 2.  Made while the model is the teacher ``eps0``.

    Attributes:
        points, still: Unsafe and unconditional points.
        safe, unsafe: ``f(c_s)`` and ``f(c_m)`` of the unsafe points, ``(n, c, h, w)`` float32.
        held: ``eps1(u, 0)`` of the unconditional points; filled by :meth:`prepare`.
    """

    def __init__(
        self, method: TRCE, model: DiffusionModel, pairs: Sequence[Pair], seed: int
    ) -> None:
        self.method, self.model = method, model
        self.trained = trainable(model)
        with torch.no_grad():
            self.erased = model.encode([pair.erased for pair in pairs]).detach()
            self.replacing = model.encode([pair.replacing for pair in pairs]).detach()
            self.empty = model.unconditional().detach()
        steps, count = method.sampling_steps, method.bank or method.steps * method.batch
        high = min(int(method.early * steps) + 1, steps)
        walk: dict[str, Any] = {"steps": steps, "seed": seed}
        self.points = trajectories.draw(
            model, [pair.erased for pair in pairs], count, guidance=method.guidance, high=high, **walk
        )  # fmt: skip
        # Rows are numbered on, so that no unconditional walk starts from the noise of an unsafe one.
        self.still = trajectories.draw(
            model, [""], count * method.keep_batch, guidance=1.0, first=count, **walk
        )
        which = self.points.which
        conditions = self.replacing.select(which), self.erased.select(which), self._none(count)
        safe, unsafe, none = (scores.asked(model, self.points, [c])[0] for c in conditions)
        g = method.target_guidance
        self.safe, self.unsafe = (f + g * (f - none) for f in (safe, unsafe))
        self.held = torch.empty(0)

    def prepare(self) -> None:
        """Ask ``eps1``, which the model is now, about the unconditional points."""
        [self.held] = scores.asked(self.model, self.still, [self.empty])

    def parameters(self) -> finetune.Groups:
        return {"attention": self.trained}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """One pass over the unsafe points under both prompts and the unconditional ones; the bank in turn."""
        method, n = self.method, self.method.batch
        pick, still = (
            torch.arange(step.index * size, (step.index + 1) * size) % len(points.which)
            for size, points in ((n, self.points), (n * method.keep_batch, self.still))
        )
        unsafe_points = self.points.select(pick)
        everything = trajectories.Trajectories.concatenate(
            [unsafe_points, unsafe_points, self.still.select(still)]
        )
        condition = Condition.concatenate(
            [self.erased.select(unsafe_points.which), self._none(n + len(still))]
        )
        made = scores.epsilon(self.model, everything, condition)
        self.model.cost.add("denoiser", len(made), "backward")
        safe, unsafe = self.safe[pick], self.unsafe[pick]
        erase = [
            hinge(p, safe, unsafe, method.beta, method.margin).mean()
            for p in (made[:n], made[n : 2 * n])
        ]
        kept = (made[2 * n :] - self.held[still]).square().mean()
        return {"attention": (erase[0] + erase[1]) / 2 + method.keep_scale * kept}

    def _none(self, count: int) -> Condition:
        return self.empty.repeat(count)
