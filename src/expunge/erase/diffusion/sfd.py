"""Score Forgetting Distillation: a denoiser becomes a one-step generator that has forgotten a concept on the way.

The model is distilled into a generator that answers in one step (:mod:`expunge.core.score_distillation`), from prompts
or class labels alone.  Forgetting is one more term: for the concept the teacher is asked for something else, while
fake network and generator are asked for the concept, so the generator's answer to the concept is drawn there.

Source: Chen et al., ICLR 2025 (arXiv 2409.11219).  With ``R(c_p, c_psi)`` the generator's SiD loss under the teacher's
and the fake network's condition, remain prompts ``c_r``, the concept's ``c_f`` and what overrides it ``c_o``:

    L_psi   = v_r || e - psi(x_t, t, c_r) ||^2 + v_f || e - psi(x'_t, t, c_f) ||^2
    L_theta = w_r R(c_r, c_r) + w_f R(c_o, c_f)

``x_t`` are noised pictures that the generator made for ``c_r``, ``x'_t`` for ``c_f``; both terms have noise and times
of their own and go through the networks together.  Guidance is that of teacher and fake network; the generator itself
has none.  Where it is not 1, prompts are dropped in a tenth of the rows that train the fake network.

The edit is a dense change of the denoiser, and it acts: while it is on, sampling is one step from noise, whatever steps
and guidance are asked for.  Teacher and fake network are not part of it.

Defaults are those for Stable Diffusion 1.5, which starts from a generator: train one by ``first_steps`` of plain
distillation (all prompts, nothing forgotten), or give an earlier edit as ``data["generator"]``.  Otherwise generator
and fake network start from the teacher.  The preset ``paper:class`` is that for CIFAR-10.  ``override`` set to the
concept itself forgets nothing: plain SiD, the control.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...concept import Concept, as_concepts, names_of
from ...core import finetune
from ...core.forget_prompts import ForgetPrompts, forget_prompts
from ...core.layer_choice import LAYERS, trainable
from ...core.score_distillation import (
    Asked,
    Distillation,
    OneStepSampling,
    check_times,
    losses_by_turn,
)
from ...edit import Edit
from ...errors import InputError, MissingCapability, SettingError, WrongMethod, WrongState
from ...method import Control, Eraser, Judge, setting
from ...models.diffusion import DiffusionModel
from ...models.types import Condition

__all__ = ["SFD"]

Classifier = Callable[[Tensor], Tensor]
"""Pictures ``(n, c, h, w)`` from 0 to 1 -> logits ``(n, classes)``."""

DDPM: Mapping[str, Any] = {
    "alpha": 1.2, "t_init": 440, "t_min": 38, "t_max": 712, "guidance": 1.0, "fake_guidance": 1.0,
    "forget_weight": 0.01, "fake_forget_weight": 0.01, "lr": 1e-5, "fake_lr": 1e-5, "batch": 128, "steps": 50_000,
    "ema": 0.9999,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SFD(Eraser):
    """Score Forgetting Distillation; defaults are the paper's for Stable Diffusion 1.5."""

    id: ClassVar[str] = "sfd"
    title: ClassVar[str] = (
        "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models"
    )
    source: ClassVar[str] = "arXiv 2409.11219"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:identity": {},
        "paper:unsafe": {"pairing": "unsafe", "fake_negative": True},
        "paper:class": DDPM,
        "paper:class-64": {**DDPM, "batch": 64, "fake_lr": 3e-5},
        "paper:class-two-stage": {**DDPM, "fake_lr": 3e-5, "first_steps": 50_000},
        # Sized for a core on development prompts; see the page for what the guidance costs.
        "world": {
            "guidance": 3.0, "fake_guidance": 3.0, "lr": 1e-4, "fake_lr": 3e-4, "batch": 8, "steps": 150, "ema": 0.98,
        },
        "world:class": {
            **DDPM, "lr": 3e-4, "fake_lr": 3e-4, "batch": 16, "steps": 400, "ema": 0.99,
            "forget_weight": 0.3, "fake_forget_weight": 0.3,
        },
    }  # fmt: skip

    override: str | None = setting(
        None,
        "what the concept is to look like; its own anchor when unset, without one any other class",
    )
    pairing: str = setting(
        "name", "how a prompt is overridden: its name exchanged, or an unsafe word left out",
        choices=("name", "unsafe"),
    )  # fmt: skip
    phrases: bool = setting(True, "forget the concept's listed phrases as well as its name")
    loss: str = setting(
        "sid", "sid, or diff-instruct: teacher and fake network are constants", choices=("sid", "diff-instruct"),
    )  # fmt: skip
    alpha: float = setting(1.0, "weight of the term that SiD takes away")
    t_init: int = setting(625, "timestep the generator answers at", minimum=1)
    t_min: int = setting(20, "first timestep of the losses", minimum=0)
    t_max: int = setting(980, "timestep before which those of the losses end", minimum=1)
    remain_weight: float = setting(1.0, "w_r, in the generator's loss", minimum=0)
    forget_weight: float = setting(1.0, "w_f, in the generator's loss", minimum=0)
    fake_remain_weight: float = setting(1.0, "v_r, in the fake network's loss", minimum=0)
    fake_forget_weight: float = setting(1.0, "v_f, in the fake network's loss", minimum=0)
    guidance: float = setting(4.5, "guidance of the teacher", minimum=0)
    fake_guidance: float = setting(
        4.5, "guidance of the fake network, trained and asked", minimum=0
    )
    drop: float = setting(
        0.1,
        "share of prompts dropped while the fake network trains, where it is guided",
        minimum=0,
        maximum=1,
    )
    negative: str | None = setting(
        None,
        "text of the teacher's unconditional branch for the concept; unset: unsafe words, or none",
    )
    fake_negative: bool = setting(False, "the fake network's, too")
    fake_override: bool = setting(
        False, "ask the fake network for the override as well, in the generator's step"
    )
    pseudo_label: str = setting(
        "none", "override by what a classifier sees in x0_psi: its best other class, or one drawn by its scores",
        choices=("none", "best", "drawn"),
    )  # fmt: skip
    layers: str = setting("full", "what of the denoiser trains", choices=LAYERS)
    lr: float = setting(1e-6, "learning rate of the generator's Adam", minimum=0)
    fake_lr: float = setting(3e-6, "learning rate of the fake network's Adam", minimum=0)
    steps: int = setting(5000, "iterations, of fake network and generator each", minimum=1)
    batch: int = setting(8, "rows of each term", minimum=1)
    clip: float | None = setting(1.0, "largest entry of a gradient", minimum=0)
    ema: float = setting(
        0.0, "what the average of the generator keeps at a step; 0: none", minimum=0, maximum=1
    )
    dropout: bool = setting(True, "dropout of the denoiser is on in the generator's step")
    first_steps: int = setting(0, "iterations of plain distillation before", minimum=0)
    first_fake_lr: float = setting(3e-5, "learning rate of the fake network in these", minimum=0)
    prompts: int = setting(200, "prompts from a world, of the concept and of the rest", minimum=1)

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
        """Learn a one-step generator.

        Args:
            keep: Names in templates among the remain prompts; the rest of a world or of the classes is there anyway.
            data: Texts, see :mod:`expunge.core.forget_prompts`; ``generator``, an earlier edit to start from;
                ``classifier``, for ``pseudo_label``.  No pictures.

        Raises:
            SettingError: A concept has nothing to take its place, or times are off the schedule.
            MissingCapability: Guidance without a second branch.
            WrongState: The model already samples in one step, so it has no scores to teach.
        """
        model.check_family(self)
        model.needs("gradients", "controls")
        wanted = as_concepts(concepts, keep)
        self._check(model)
        given = dict(data) if isinstance(data, Mapping) else {}
        start, classifier = given.pop("generator", None), given.pop("classifier", None)
        kept, texts = names_of(keep), given if isinstance(data, Mapping) else data
        asks = forget_prompts(
            model, wanted, texts or None, kept, override=self.override, unsafe=self.pairing == "unsafe",
            phrases=self.phrases, count=self.prompts, seed=seed,
        )  # fmt: skip
        relabel = self._relabel(model, wanted, classifier)
        pairs = trainable(model, self.layers)
        teacher = {name: p.detach().clone() for name, p in pairs}
        values = dict(teacher) if start is None else self._start(model, start, pairs)
        digest = asks.digest if start is None else f"{asks.digest}|{start.digest}"
        request = finetune.request(self, model, wanted, keep=kept, data=digest)
        started, counted = time.monotonic(), model.cost.snapshot()
        report: dict[str, Any] = {}
        with finetune.put_back(dict(pairs), teacher):
            for stage in ("first", "forget") if self.first_steps else ("forget",):
                _set(pairs, values)
                rows = _Rows(self, model, asks, plain=stage == "first")
                task = Distillation(
                    model, pairs, teacher, rows.draw, self, None if stage == "first" else relabel
                )
                trained = self._fit(task, stage, run, {**request, "stage": stage}, seed)
                values = {n: task.averaged.get(n, trained.values[n]).clone() for n in teacher}
                report[stage] = {
                    "losses": losses_by_turn(trained.losses), "resumed_at": trained.resumed // 2,
                }  # fmt: skip
        return finetune.edit_from(
            self, model, wanted, teacher, values, acts=True, keep=kept, seed=seed,
            cost=model.cost.since(counted), seconds=time.monotonic() - started, data_digest=digest,
            report={**report, **_told(asks), "started_from": "teacher" if start is None else start.digest},
        )  # fmt: skip

    def _fit(
        self,
        task: Distillation,
        stage: str,
        run: str | Path | None,
        request: Mapping[str, Any],
        seed: int,
    ) -> finetune.Trained:
        first = stage == "first"
        rates = self.lr, self.first_fake_lr if first else self.fake_lr
        own, fake = (finetune.Optimiser(rate, betas=(0.0, 0.999)) for rate in rates)
        loop = finetune.Loop(
            2 * (self.first_steps if first else self.steps), own, groups={"fake": fake}
        )
        return finetune.fit(
            task, loop, seed=seed, modules=tuple(task.model.parts().values()),
            run=None if run is None else Path(run) / stage, settings=request, label=f"{self.id}, {stage}",
        )  # fmt: skip

    def _check(self, model: DiffusionModel) -> None:
        check_times(model, self)
        if self.ema == 1.0:
            raise SettingError(
                "sfd: ema=1 keeps the start for ever; allowed is less than 1, and 0 for no average"
            )
        if self.negative is not None and self.guidance == self.fake_guidance == 1.0:
            raise SettingError(
                f"sfd: negative={self.negative!r} would be ignored, because nothing is guided; leave it out, or guide"
            )
        if self.override is not None and self.pseudo_label != "none":
            raise SettingError(
                f"sfd: override={self.override!r} would be ignored, because a classifier says what takes the concept's "
                "place; leave it out, or take pseudo_label='none'"
            )
        if not model.two_branches and (self.guidance != 1.0 or self.fake_guidance != 1.0):
            raise MissingCapability(
                f"{model.name}: sfd guides teacher and fake network by an unconditional branch, and "
                f"{model.layout.title} has none here; allowed is guidance=1 with fake_guidance=1"
            )
        if any(isinstance(control, OneStepSampling) for control in model.acting):
            raise WrongState(
                f"{model.name} samples in one step, so its denoiser is a generator and no teacher; take the edit off, "
                "or give it as data={'generator': edit} to go on from it"
            )

    def _start(
        self, model: DiffusionModel, edit: Any, pairs: Sequence[tuple[str, nn.Parameter]]
    ) -> dict[str, Tensor]:
        """Values of the generator that an earlier edit of this method is."""
        if not isinstance(edit, Edit) or edit.manifest.method != self.id:
            raise WrongMethod("data: 'generator' must be an edit of sfd, a one-step generator")
        if edit.manifest.settings["t_init"] != self.t_init:
            raise SettingError(
                f"data: the generator answers at t_init={edit.manifest.settings['t_init']}, this run at {self.t_init}; "
                "both must be the same"
            )
        missing = {t.name for t in edit.manifest.targets} - {name for name, _ in pairs}
        if missing:
            raise SettingError(
                f"data: the generator changes {sorted(missing)[0]!r}, which layers={self.layers!r} does not train"
            )
        with edit.on(model):
            return {name: parameter.detach().clone() for name, parameter in pairs}

    def _relabel(
        self, model: DiffusionModel, concepts: Sequence[Concept], classifier: Classifier | None
    ) -> Callable[[Tensor, Asked, torch.Generator], Condition] | None:
        """The teacher's condition by what a classifier sees, the forgotten classes masked."""
        if self.pseudo_label == "none":
            if classifier is not None:
                raise InputError(
                    "sfd: data holds a 'classifier', which is asked only with pseudo_label='best' or 'drawn'"
                )
            return None
        names = model.layout.classes
        if not names or classifier is None:
            what = "a model of classes" if not names else "data={'classifier': ...}"
            raise InputError(f"sfd: pseudo_label={self.pseudo_label!r} needs {what}")
        known = [name.lower() for name in names]
        gone = [known.index(concept.name.lower()) for concept in concepts]

        def relabel(seen: Tensor, rows: Asked, draw: torch.Generator) -> Condition:
            """The teacher's condition, labelled anew where a picture was asked for by a forgotten class."""
            with torch.no_grad():
                logits = classifier((seen / 2 + 0.5).clamp(0, 1)).float().cpu()
            if logits.shape != (len(seen), len(names)):
                raise InputError(
                    f"data: the classifier answers with {tuple(logits.shape)} for {len(seen)} pictures; allowed are "
                    f"logits of the model's {len(names)} classes, {(len(seen), len(names))}"
                )
            logits[:, gone] = -torch.inf
            labels = logits.argmax(1)
            if self.pseudo_label == "drawn":
                labels = torch.multinomial(logits.softmax(1), 1, generator=draw)[:, 0]
            own = rows.generator.extra["label"]
            forgotten = torch.isin(own.cpu(), torch.tensor(gone)).to(own.device)
            given = rows.teacher.extra["label"]
            new = torch.where(forgotten, labels.to(own), given)
            return dataclasses.replace(rows.teacher, extra={**rows.teacher.extra, "label": new})

        return relabel

    @classmethod
    def control(cls, edit: Edit, model: DiffusionModel) -> Control:
        """One-step sampling at the edit's ``t_init``."""
        return OneStepSampling(cls(**edit.manifest.settings).t_init)


def _told(asks: ForgetPrompts) -> dict[str, Any]:
    return {
        "forget_prompts": len(asks.forget), "remain_prompts": len(asks.remain),
        "example": {asks.forget[0]: list(asks.overrides[0][:8])}, "negative": asks.negative,
    }  # fmt: skip


class _Rows:
    """What is asked for in a step: remain rows, then the concept's."""

    def __init__(
        self, method: SFD, model: DiffusionModel, asks: ForgetPrompts, *, plain: bool
    ) -> None:
        self.method, self.model, self.asks, self.plain = method, model, asks, plain
        self.negative = asks.negative if method.negative is None else method.negative

    def draw(self, generator: torch.Generator, turn: str) -> Asked:
        """The rows of a turn; a term whose weight is 0 there has none."""
        method, count = self.method, self.method.batch
        if self.plain:
            texts = self.asks.anything(count, generator)
            return self._asked([(texts, texts, 1.0, "")], turn, generator)
        forget, instead, remain = self.asks.drawn(count, generator)
        weights = (method.remain_weight, method.forget_weight)
        if turn == "fake":
            weights = (method.fake_remain_weight, method.fake_forget_weight)
        terms = [(remain, remain, weights[0], ""), (forget, instead, weights[1], self.negative)]
        terms = [term for term in terms if term[2] > 0]
        if not terms:
            raise SettingError(
                f"sfd: both weights of the {turn} network's loss are 0; it would not learn"
            )
        return self._asked(terms, turn, generator)

    def _asked(
        self,
        terms: Sequence[tuple[list[str], list[str], float, str]],
        turn: str,
        generator: torch.Generator,
    ) -> Asked:
        method = self.method
        own = [text for texts, *_ in terms for text in texts]
        other = [text for _, texts, *_ in terms for text in texts]
        away = [text for texts, _, _, negative in terms for text in [negative] * len(texts)]
        weights = torch.cat(
            [torch.full((len(texts),), weight / len(texts)) for texts, _, weight, _ in terms]
        )
        guided = method.guidance != 1.0 or method.fake_guidance != 1.0
        if turn == "fake" and method.fake_guidance != 1.0:
            drops = (torch.rand(len(own), generator=generator) < method.drop).tolist()
            # A dropped row is asked for nothing by either branch.
            own = ["" if drop else text for text, drop in zip(own, drops, strict=True)]
            away = ["" if drop else text for text, drop in zip(away, drops, strict=True)]
        with torch.no_grad():
            asked = self._encoded(own)
            teacher = self._encoded(other)
            empty = negative = None
            if guided:
                empty = self._empty(away if method.fake_negative else [""] * len(own))
                negative = self._empty(away)
        fake = teacher if method.fake_override else asked
        return Asked(asked, teacher, fake, weights, weights, empty, negative)

    def _encoded(self, texts: Sequence[str]) -> Condition:
        return self.model.encode(list(texts)).detach()

    def _empty(self, texts: Sequence[str]) -> Condition:
        return Condition.concatenate([self.model.unconditional(text) for text in texts]).detach()


def _set(pairs: Sequence[tuple[str, nn.Parameter]], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in pairs:
            parameter.copy_(values[name])
