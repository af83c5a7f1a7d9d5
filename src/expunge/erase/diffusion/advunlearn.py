"""AdvUnlearn: erasing as a game against an inner attack that learns a prompt.

Erasing by fine-tuning is undone by prompts that were searched for.  Here every update is preceded by such a search:
a few free word embeddings beside the concept's own are descended until the present model predicts for them what the
original predicts for the concept, and the erasing loss of ESD is then taken at that prompt.  A second loss holds the
model in place on prompts that have nothing to do with the concept.  What trains is the text encoder, which resists
better than the denoiser does, and which other models with the same text encoder take over as it is.

Source: Zhang et al., NeurIPS 2024 (arXiv 2405.15234).  ``eps`` is the model as it is by now, ``eps_o`` the original,
``c`` the concept's phrase, 0 the empty prompt, ``c'`` the phrase with ``k`` embeddings delta spliced in, ``c~`` a
retain prompt; ``x_t`` and ``x~_t`` stand on walks guided towards ``c`` and ``c~``; squares are means over entries:

    attack   l_atk = || eps(x_t, c', t) - eps_o(x_t, c, t) ||^2        K steps of Adam on delta, the model held fixed
    erase    l_esd = || eps(x_t, c', t) - [ eps_o(x_t, 0, t) - eta ( eps_o(x_t, c, t) - eps_o(x_t, 0, t) ) ] ||^2
    retain   l_ret = || eps(x~_t, c~, t) - eps_o(x~_t, c~, t) ||^2
    update   Adam on  l_esd + gamma l_ret

Only the student sees the adversarial prompt; the target has the clean phrase.  Every attack step has a point of its
own: ``s ~ U{0..S-1}``, a walk down to level ``s``, and with ``label="bin"`` ``t ~ U[s T/S, (s+1) T/S)``; ``"own"`` is
the level's timestep itself.  One draw of ``s`` and ``t`` serves the erasing and the retain points of an update.  The
first ``warm_up`` updates have no attack.  ``mode="iter"`` takes updates on ``l_ret`` alone after each on ``l_esd``.

delta ``(k, width)`` begins at embeddings of random words, or where the last attack ended.  Placements count tokens:

    prefix, suffix, middle, spread, third    [start][..delta and phrase..][end][padding, k shorter]
    replace    [start][delta][end in the place of each token of the phrase][rest]
    add        a delta for each token of the phrase, added to its embedding

``rule`` is Adam, steps by the sign of the gradient (with one step the paper's fast variant), or ``random``: delta stays
where it began, a control.  ``restarts`` deltas are descended side by side in one pass; the points of the update take
them in turn.  ``attack_steps=0`` leaves the attack out, with ``gamma=0`` that is ESD on the text encoder.

The text encoder's walks are the original's, because its own sampling prompt is encoded by the original, so a ``bank``
of points with their ``eps_o(x_t, c)`` and ``eps_o(x_t, 0)`` drawn once is the same distribution at a tenth of the cost.
The denoiser's walks are its own as it is by now; a bank of the original's is an approximation there.

Not repeated are the published code's slips: gradients that add up over the attack's steps, an attack whose result
misses the last step, sign steps handed to Adam, cuts by words in the place of tokens, layers chosen by a prefix of
their names, and a restart that reads prompt tokens.  Ours: everyday objects in the place of COCO's names, filtered by
name or label in the place of a language model; retain points of a bank keep depths of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import Concept, as_concepts, names_of
from ...core import examples, finetune, scores, soft_prompts
from ...core.adversarial_prompts import SOFT_PLACEMENTS, Splice
from ...core.layer_choice import LAYERS, trainable
from ...core.retain import RetainPrompts, RetainSource, retain_prompts
from ...core.text_layers import ROLES, trainable_text
from ...core.training import differentiable
from ...core.trajectories import Trajectories
from ...edit import Edit
from ...errors import MissingCapability, SettingError
from ...method import Eraser, Judge, setting
from ...models.base import noise_generator
from ...models.diffusion import DiffusionModel
from ...models.types import Condition

__all__ = ["AdvUnlearn"]


@dataclasses.dataclass(frozen=True)
class AdvUnlearn(Eraser):
    """Adversarial training against a learned prompt; defaults are the paper's for nudity."""

    id: ClassVar[str] = "advunlearn"
    title: ClassVar[str] = (
        "AdvUnlearn: Defensive Unlearning with Adversarial Training for Robust Concept Erasure in Diffusion Models"
    )
    source: ClassVar[str] = "arXiv 2405.15234"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:unsafe": {},
        "paper:style": {"gamma": 0.5},
        "paper:object": {"gamma": 0.5},
        "paper:fast": {"rule": "sign", "attack_steps": 1},
        "paper:denoiser": {"part": "denoiser"},
        # Chosen on 32 development prompts of star and 32 of untold neighbours: star in 6 %, 97 % kept (100 % before).
        # With one free embedding (and a longer warm-up) star stayed in 31 %.
        "world": {
            "steps": 120, "warm_up": 10, "lr": 2e-4, "batch": 8, "retain_batch": 8, "eta": 3.0, "gamma": 1.0,
            "tokens": 3, "attack_steps": 5, "attack_lr": 5e-3, "restarts": 2, "sampling_steps": 20, "label": "own",
            "bank": 96, "phrases": True,
        },
    }  # fmt: skip

    part: str = setting("text-encoder", "what trains", choices=("text-encoder", "denoiser"))
    text_layers: int | None = setting(
        None,
        "first layers of the text encoder that train; none: all, and the final norm",
        minimum=1,
    )
    layers: str = setting("other", "what of the denoiser trains", choices=LAYERS)
    steps: int = setting(1000, "updates", minimum=1)
    lr: float = setting(1e-5, "learning rate of Adam", minimum=0)
    batch: int = setting(1, "points an update", minimum=1)
    eta: float = setting(1.0, "strength of the push away from the concept", minimum=0)
    gamma: float = setting(
        0.3, "weight of the retain loss under mode='reg'; 0 leaves it out", minimum=0
    )
    mode: str = setting(
        "reg", "retain loss: added to the update, or updates of its own", choices=("reg", "iter")
    )
    retain_steps: int = setting(1, "retain updates after each other one, mode iter", minimum=1)
    retain_batch: int = setting(5, "retain prompts a step", minimum=1)
    retain_prompts: int = setting(243, "retain prompts where none are given", minimum=1)
    filtered: bool = setting(True, "leave out retain prompts that speak of the concept")
    warm_up: int = setting(200, "first updates, without attack", minimum=0)
    attack_steps: int = setting(30, "steps of an attack (paper: K); 0: no attack", minimum=0)
    attack_lr: float = setting(1e-3, "step size of the attack (paper: alpha)", minimum=0)
    rule: str = setting("adam", "how the attack moves its vectors", choices=soft_prompts.RULES)
    tokens: int = setting(1, "free embeddings k; add has one a token of the phrase", minimum=1)
    placement: str = setting("prefix", "where they stand", choices=SOFT_PLACEMENTS)
    start: str = setting("random", "where an attack begins", choices=("random", "latest"))
    restarts: int = setting(1, "attacks side by side; points take them in turn", minimum=1)
    guidance: float = setting(3.0, "guidance of the walks", minimum=0)
    sampling_steps: int = setting(50, "sampling steps S of a whole walk", minimum=2)
    label: str = setting("bin", "timestep of a point", choices=("bin", "own"))
    walked: str | None = setting(
        None, "whose walks; none: the original's, for the denoiser without a bank its own",
        choices=scores.WALKED,
    )  # fmt: skip
    bank: int | None = setting(
        None,
        "points of the concept, and of retain prompts, drawn once; none: fresh ones",
        minimum=1,
    )
    phrases: bool = setting(False, "erase the concept's listed phrases as well as its name")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.part == "text-encoder" and self.walked == "student":
            raise SettingError(
                f"{self.id}: walked is 'student' and part is 'text-encoder', whose sampling prompt the original "
                "encodes; allowed is walked='frozen', or part='denoiser'"
            )
        if self.attack_steps and self.warm_up >= self.steps:
            raise SettingError(
                f"{self.id}: warm_up is {self.warm_up} of {self.steps} steps, so no attack would be made; allowed is "
                "a shorter warm_up, or attack_steps=0"
            )
        if self.attack_steps and self.restarts > self.batch:
            raise SettingError(
                f"{self.id}: restarts is {self.restarts} and batch is {self.batch}, so an update would have no point "
                "for some of its attacks; allowed is at most one attack a point"
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
        """Learn an edit of the text encoder or the denoiser.

        Args:
            keep: Concepts; "a photo of" each joins the retain prompts.
            data: A mapping with ``captions``, the retain prompts; else captions of the model's world, or everyday
                objects.

        Raises:
            MissingCapability: An attack on a model with several text encoders, or one that is no CLIP.
            InputError: All retain prompts speak of the concept.
        """
        model.check_family(self)
        model.needs("gradients")
        wanted = as_concepts(concepts, keep)
        counted = model.cost.snapshot()
        _, captions = examples.given(data, parts=("captions",))
        retained = None
        if not self.gamma and self.mode == "reg":
            self.without_data(data, "gamma above 0")
        else:
            retained = retain_prompts(
                model, wanted, keep, captions, count=self.retain_prompts, filtered=self.filtered
            )
        task = _Game(self, model, wanted, retained, seed)
        return finetune.train_edit(
            self, model, wanted, task, finetune.Loop(self.steps * task.turns, finetune.Optimiser(self.lr)),
            seed=seed, keep=names_of(keep), run=run, data_digest=examples.examples_digest({}, captions),
            report=task.report, cost_before=counted,
        )  # fmt: skip


class _Game(finetune.Task):
    """Attack and update, in turns.

    Attributes:
        turns: Optimiser steps an update takes: one, and under ``mode="iter"`` the retain updates.
        report: Where the retain prompts came from, and how far the attacks got.
    """

    def __init__(
        self,
        method: AdvUnlearn,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        retained: RetainPrompts | None,
        seed: int,
    ) -> None:
        self.method, self.model = method, model
        self.texts = [t for c in concepts for t in (c.names if method.phrases else (c.name,))]
        self.turns = 1 + (method.retain_steps if method.mode == "iter" else 0)
        self.splices = self._splices()
        with torch.no_grad():
            self.concept = model.encode(self.texts).detach()
            self.empty = model.unconditional().detach()
        own = method.part == "denoiser" and method.bank is None
        walks: dict[str, Any] = {
            "steps": method.sampling_steps, "guidance": method.guidance, "binned": method.label == "bin",
            "walked": method.walked or ("student" if own else "frozen"),
        }  # fmt: skip
        self.sources = [self._source(i, seed, walks) for i in range(len(self.texts))]
        self.retain = None
        self.report: dict[str, Any] = {"walked": walks["walked"]}
        if retained is not None:
            self.retain = RetainSource(
                model,
                retained.prompts,
                seed=seed,
                batch=method.retain_batch,
                bank=method.bank,
                **walks,
            )
            self.report |= {
                "retain_prompts": len(retained.prompts), "retain_prompts_from": retained.origin,
                "retain_prompts_left_out": retained.left_out,
            }  # fmt: skip
        self.latest: dict[int, Tensor] = {}
        self.attacks: list[tuple[float, float]] = []

    def _splices(self) -> list[Splice]:
        """Each phrase with its free places; none where there is no attack."""
        method, model = self.method, self.model
        if not method.attack_steps:
            return []
        try:
            lengths = model.content_length(self.texts)
        except MissingCapability as error:
            raise MissingCapability(
                f"{method.id}: the attack puts embeddings into the prompt of one CLIP text encoder (SD 1.x and 2.x), "
                f"and {model.name} is {model.layout.title}; attack_steps=0 trains without an attack"
            ) from error
        counts = lengths if method.placement == "add" else [method.tokens] * len(lengths)
        return [
            Splice(model, [text], count, method.placement)
            for text, count in zip(self.texts, counts, strict=True)
        ]

    def _source(self, index: int, seed: int, walks: Mapping[str, Any]) -> scores.PointSource:
        """Points on walks towards one phrase; a bank is shared out among all."""
        method, several = self.method, len(self.texts)
        concept = self.concept.select(slice(index, index + 1))

        def answer(points: Trajectories) -> dict[str, Tensor]:
            found = scores.asked(self.model, points, [concept, self.empty])
            return dict(zip(("concept", "empty"), found, strict=True))

        own = noise_generator(seed, "phrase", index).initial_seed() if index else seed
        bank = None if method.bank is None else -(-method.bank // several)
        return scores.PointSource(
            self.model,
            [self.texts[index]],
            seed=own,
            batch=method.batch,
            answer=answer,
            bank=bank,
            **walks,
        )

    def parameters(self) -> finetune.Groups:
        method = self.method
        if method.part == "denoiser":
            return {method.part: trainable(self.model, method.layers)}
        if method.text_layers is None:
            chosen = trainable_text(self.model, ROLES[:4])
        else:
            chosen = trainable_text(self.model, ROLES[:3], method.text_layers)
        return {method.part: chosen}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """The loss of an update, or under ``mode="iter"`` of a retain update after it."""
        method = self.method
        update, turn = divmod(step.index, self.turns)
        if turn:
            number = update * method.retain_steps + turn - 1
            return {method.part: self._loss(*self._retained(step, number))}
        which = int(torch.randint(len(self.texts), (1,), generator=step.generator("phrase")))
        each = method.attack_steps * method.restarts
        first = update * (each + method.batch)
        found = None
        if method.attack_steps and update >= method.warm_up:
            found = self._attack(step, which, first)
        points, answers = self.sources[which].at(step, batch=method.batch, first=first + each)
        target = answers["empty"] - method.eta * (answers["concept"] - answers["empty"])
        erase = points, self._student(which, found), target
        if self.retain is None or method.mode == "iter":
            return {method.part: self._loss(erase)}
        return {method.part: self._loss(erase, *self._retained(step, update, points))}

    def _attack(self, step: finetune.Step, which: int, first: int) -> Tensor:
        """delta ``(restarts, k, width)`` against the model as it is by now."""
        method, model, splice = self.method, self.model, self.splices[which]
        rows, item = method.restarts, torch.zeros(method.restarts, dtype=torch.long)

        def loss(number: int, vectors: Tensor) -> Tensor:
            points, answers = self.sources[which].at(step, batch=rows, first=first + number * rows)
            made = scores.epsilon(model, points, splice.encode(vectors, item))
            model.cost.add("denoiser", rows, "backward")
            return (made - answers["concept"]).square().mean((1, 2, 3))

        start = self.latest.get(which) if method.start == "latest" else None
        if start is None:
            start = soft_prompts.random_start(model, rows, splice.searched, step.generator("start"))
        # Without this the graph would also keep what the weights' gradients need.
        with differentiable((), model.parts().values()):
            found = soft_prompts.descend(
                loss, start, steps=method.attack_steps, lr=method.attack_lr, rule=method.rule,
                half=model.dtype == torch.float16,
            )  # fmt: skip
        if method.start == "latest":
            self.latest[which] = found.vectors
        if found.losses:
            self.attacks.append((found.losses[0], found.losses[-1]))
        return found.vectors

    def _student(self, which: int, found: Tensor | None) -> Condition:
        """What the points of an update are asked under: the phrase, or its adversarial prompts in turn."""
        turn = torch.arange(self.method.batch) % (1 if found is None else len(found))
        if found is None:
            return self.model.encode([self.texts[which]]).select(turn)
        item = torch.zeros(len(found), dtype=torch.long)
        return self.splices[which].encode(found, item).select(turn)

    def _retained(
        self, step: finetune.Step, number: int, like: Trajectories | None = None
    ) -> list[tuple[Trajectories, Condition, Tensor]]:
        assert self.retain is not None
        points, texts, answers = self.retain.at(step, number, like)
        return [(points, self.model.encode(texts), answers)]

    def _loss(self, *terms: tuple[Trajectories, Condition, Tensor]) -> Tensor:
        """Mean squared distance of the first term from its target, plus gamma that of the second; one pass."""
        points = Trajectories.concatenate([points for points, _, _ in terms])
        made = scores.epsilon(
            self.model, points, Condition.concatenate([rows for _, rows, _ in terms])
        )
        self.model.cost.add("denoiser", len(made), "backward")
        parts = made.split([len(target) for _, _, target in terms])
        first, *rest = (
            (part - target).square().mean()
            for part, (_, _, target) in zip(parts, terms, strict=True)
        )
        return first + self.method.gamma * rest[0] if rest else first

    def after(self, step: finetune.Step, losses: Mapping[str, float]) -> bool:
        if step.last:
            self._tell()
        return False

    def _tell(self) -> None:
        """Means over ten stretches of the training of an attack's loss before its first and before its last step."""
        several = -(-len(self.attacks) // 10)
        parts = [self.attacks[i : i + several] for i in range(0, len(self.attacks), several or 1)]
        self.report["attacks"] = [
            [round(sum(values) / len(values), 6) for values in zip(*part, strict=True)] for part in parts
        ]  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        found = {f"latest.{which}": vectors for which, vectors in self.latest.items()}
        if self.attacks:
            found["attacks"] = torch.tensor(self.attacks, dtype=torch.float64)
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        device = self.model.device
        self.latest = {
            int(name.removeprefix("latest.")): vectors.to(device)
            for name, vectors in state.items()
            if name.startswith("latest.")
        }
        self.attacks = [(a, b) for a, b in state["attacks"].tolist()] if "attacks" in state else []
        self._tell()
