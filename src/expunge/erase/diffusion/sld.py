"""Safe Latent Diffusion: guidance that is led away from a safety text, element by element, while the model samples.

No weight changes.  Beside the prompt and the empty text the denoiser is asked, in the same pass, for a text that says
what must not be drawn.  Where the prompt's prediction lies close to that text's, or beyond it, the safety direction is
taken out of guidance; a momentum keeps up a push that has begun.

Source: Schramowski et al., CVPR 2023 (arXiv 2211.05105).  With ``e_u, e_p, e_S`` the predictions for the empty (or
the user's negative) text, the prompt and the safety text, ``s_g`` guidance, all of it element by element over the
latents ``(n, c, h, w)``, momentum ``nu = 0`` before the first step:

    mu    = min(1, s_S |e_p - e_S|)   where e_p - e_S < lambda,   else 0
    gamma = mu (e_S - e_u) + s_m nu
    nu    = b_m nu + (1 - b_m) gamma
    e     = e_u + s_g (e_p - e_u)                  in the first delta steps
    e     = e_u + s_g (e_p - e_u - gamma)          in the others

The test is on the signed difference: with ``lambda = 1`` it is nearly always true.  The paper writes ``max(1, .)``
where its code takes the minimum, which is meant: mu is a gate from 0 to 1.  The momentum grows during the warm-up,
too.  With ``s_S < 1`` and for pictures whose guidance is at most 1 nothing is done at all.

Predictions are compared as the denoiser makes them (noise, v, velocity of a flow); those of the clean picture as the
noise that they imply, because the sign of the test would turn.  Of several safety texts each is a branch with a gate
of its own; the gammas are summed.  The safety branches are left out where they cannot matter: in the warm-up without
momentum, and everywhere where the warm-up is as long as the sampling.

Ours: the safety text is the concept's names unless one is given, and ``warm_up_of`` scales the warm-up to samplings
of other lengths than the paper's 50 steps.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import as_concepts, names_of
from ...edit import Edit
from ...errors import MissingCapability, SettingError, UnsupportedModel
from ...method import Control, Eraser, Judge, setting
from ...models.diffusion import DiffusionModel
from ...models.types import Condition, Context, Prediction

__all__ = ["SLD"]

UNSAFE = (
    "an image showing hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, "
    "brutality, cruelty"
)
"""The published safety text."""

STRENGTHS: Mapping[str, Mapping[str, Any]] = {
    "weak": {
        "warm_up": 15, "safety_scale": 200.0, "threshold": 0.0, "momentum_scale": 0.0,
        "momentum_decay": 0.0,
    },
    "medium": {
        "warm_up": 10, "safety_scale": 1000.0, "threshold": 0.01, "momentum_scale": 0.3,
        "momentum_decay": 0.4,
    },
    "strong": {
        "warm_up": 7, "safety_scale": 2000.0, "threshold": 0.025, "momentum_scale": 0.5,
        "momentum_decay": 0.7,
    },
    "max": {
        "warm_up": 0, "safety_scale": 5000.0, "threshold": 1.0, "momentum_scale": 0.5,
        "momentum_decay": 0.7,
    },
}  # fmt: skip
"""The paper's four configurations."""


@dataclasses.dataclass(frozen=True)
class SLD(Eraser):
    """Safe Latent Diffusion; defaults are the paper's Medium."""

    id: ClassVar[str] = "sld"
    title: ClassVar[str] = (
        "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion Models"
    )
    source: ClassVar[str] = "arXiv 2211.05105"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{f"paper:{name}": values for name, values in STRENGTHS.items()},
        "paper:unsafe": {"text": UNSAFE},
        # The paper's configurations, their warm-up at the same share of a sampling of any length.  Max was chosen on
        # 12 development prompts of star: 12, 11, 5 and 0 of 12 left, and 12, 12, 12 and 8 of 12 others kept.
        **{f"world:{name}": {**values, "warm_up_of": 50} for name, values in STRENGTHS.items()},
        "world": {**STRENGTHS["max"], "warm_up_of": 50},
    }  # fmt: skip

    text: str | None = setting(
        None, "safety text, several parted by '|'; the names of each concept when unset"
    )
    safety_scale: float = setting(
        1000.0, "s_S, steepness of the gate; below 1 nothing is done", minimum=0
    )
    threshold: float = setting(0.01, "lambda, the gate is open where e_p - e_S lies below it")
    momentum_scale: float = setting(0.3, "s_m, weight of the momentum", minimum=0, maximum=1)
    momentum_decay: float = setting(0.4, "b_m, what is kept of the momentum", minimum=0, maximum=1)
    warm_up: int = setting(10, "delta, first steps that are not led away", minimum=0)
    warm_up_of: int | None = setting(
        None, "the warm-up counts steps of a sampling this long, the same share of others; as it is when unset",
        minimum=1,
    )  # fmt: skip

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
        """An edit that acts; nothing is learnt, and ``keep`` and ``seed`` have no part but in the record.

        Raises:
            MissingCapability: Guidance of the model has no second branch.
            UnsupportedModel: It reads no text.
            SettingError: ``text`` holds an empty safety text.
        """
        model.check_family(self)
        self.without_data(data)
        model.needs("controls")
        started, wanted = time.monotonic(), as_concepts(concepts, keep)
        _guided_by_text(model)
        texts = self.texts([concept.to_dict() for concept in wanted])
        return Edit.make(
            self, model, wanted, kind="control", tensors={}, acts=True, keep=names_of(keep), seed=seed,
            seconds=time.monotonic() - started,
            report={"safety_texts": texts, "safety_tokens_cut": _cut(model, texts)},
        )  # fmt: skip

    def texts(self, concepts: Sequence[Mapping[str, Any]]) -> list[str]:
        """The safety texts: those that were given, else the names of each concept, parted by commas."""
        if self.text is None:
            return [", ".join([c["name"], *c.get("phrases", ())]) for c in concepts]
        found = [text.strip() for text in self.text.split("|")]
        if not all(found):
            raise SettingError(
                f"sld: text is {self.text!r}; allowed are texts, several parted by '|', none of them empty"
            )
        return found

    def warmed_up(self, steps: int) -> int:
        """How many of ``steps`` steps are not led away; a share is rounded up."""
        if self.warm_up_of is None:
            return self.warm_up
        return -(-self.warm_up * steps // self.warm_up_of)

    @classmethod
    def control(cls, edit: Edit, model: DiffusionModel) -> Control:
        """What the edit does while the model samples; refuses guidance without a second branch."""
        _guided_by_text(model)
        method = cls(**edit.manifest.settings)
        return _Safe(model, method, method.texts(edit.manifest.concepts))


def _guided_by_text(model: DiffusionModel) -> None:
    if not model.vocabularies():
        raise UnsupportedModel(
            f"{model.name}: sld leads away from texts, and {model.layout.title} reads none"
        )
    if not model.two_branches:
        raise MissingCapability(
            f"{model.name}: sld changes the difference between the two branches of guidance, and "
            f"{model.layout.title} has only one"
        )


def _cut(model: DiffusionModel, texts: Sequence[str]) -> dict[str, int]:
    """Tokens of all safety texts that do not fit, by tokenizer; the pipelines cut without a word."""
    found = {}
    for name, own in model.vocabularies().items():
        room = model.layout.room(name)
        made = own.tokenizer(own.prepared(texts), truncation=False).input_ids
        found[name] = sum(max(0, len(ids) - room) for ids in made)
    return found


class _Safe(Control):
    """The equations above."""

    def __init__(self, model: DiffusionModel, method: SLD, texts: Sequence[str]) -> None:
        self.model, self.method, self.texts = model, method, list(texts)

    def guided(self, context: Context) -> Tensor | None:
        """Which pictures are led away, bool ``(n,)``; ``None`` where this step has no use for safety branches."""
        method, steps = self.method, context.steps
        conditional, guidance = context.conditional, context.guidance
        if method.safety_scale < 1 or guidance is None or conditional is None:
            return None
        if bool(conditional.all()) or not bool((guidance > 1).any()):
            return None
        first = method.warmed_up(steps)
        wanted = context.step >= first or (first < steps and method.momentum_scale > 0)
        return guidance > 1 if wanted else None

    def branches(self, context: Context) -> list[Condition]:
        """The safety texts, with whatever else the rows of the empty text have."""
        if self.guided(context) is None:
            return []
        assert context.condition is not None and context.conditional is not None
        empty = (~context.conditional).nonzero().flatten()
        more = context.condition.select(empty.to(context.condition.embeddings.device))
        found = []
        for text in self.texts:
            own = self.model.unconditional(text).repeat(len(empty))
            extra = {**more.extra, **own.extra}
            found.append(dataclasses.replace(own, extra=extra))
        return found

    def prediction(self, context: Context, prediction: Prediction) -> Prediction:
        """The prompt's rows without gamma, from which guidance then makes the safe prediction."""
        led = self.guided(context)
        if led is None:
            return prediction
        assert context.conditional is not None
        rows = context.conditional.to(prediction.value.device)
        empty, prompt = (_compared(prediction.select(own)) for own in (~rows, rows))
        gamma = torch.zeros_like(prompt)
        for further in context.further[self]:
            safety = _compared(further)
            gamma = gamma + self.gate(prompt - safety) * (safety - empty)
        method, memory = self.method, context.memory
        momentum = memory.get(self, torch.zeros_like(gamma))
        gamma = gamma + method.momentum_scale * momentum
        keep = method.momentum_decay
        memory[self] = keep * momentum + (1 - keep) * gamma
        if context.step < method.warmed_up(context.steps):
            return prediction
        mine = prediction.select(rows)
        value = prediction.value.clone()
        away = mine.value - _uncompared(mine, gamma)
        value[rows] = torch.where(led.reshape(-1, 1, 1, 1), away, mine.value)
        return prediction.replace(value)

    def gate(self, difference: Tensor) -> Tensor:
        """``mu`` of ``e_p - e_S``."""
        scaled = (self.method.safety_scale * difference.abs()).clamp(max=1.0)
        return torch.where(difference < self.method.threshold, scaled, 0.0)


def _scale(prediction: Prediction) -> Tensor | float:
    """What a difference of noise is as a difference of such predictions, where the two are not compared as they are."""
    return -prediction.sigma / prediction.alpha if prediction.kind == "x0" else 1.0


def _compared(prediction: Prediction) -> Tensor:
    """The prediction in the units of the equations, up to a part that all branches share; float32."""
    return prediction.value.float() / _scale(prediction)


def _uncompared(prediction: Prediction, gamma: Tensor) -> Tensor:
    """``gamma`` as a difference of such predictions."""
    return (gamma * _scale(prediction)).to(prediction.value.dtype)
