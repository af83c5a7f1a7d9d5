"""Relearning: fine-tuning an erased model on data disjoint from what was forgotten.

A few steps of ordinary fine-tuning on harmless data can bring erased knowledge back, if the weights
still hold it.  The attack trains the model under attack on pairs that share nothing with the
forgotten facts, asks the forgotten questions after each of several numbers of steps, and puts the
weights back.

Source: "Jogging the Memory of Unlearned LLMs Through Targeted Relearning Attacks", arXiv 2406.13356.

    L = CE(batch)      mean of -log p(token | all before) over the answer and end tokens

Two arms: ``related`` trains on facts of the same kind about others (the question forms come back
with them), ``unrelated`` on facts of another kind.  Fine-tuning can teach, so only the advantage over
a model that never knew the facts counts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...concept import Concept
from ...core import answers, finetune
from ...core.text_lines import lines_of, read_text
from ...core.trials import received
from ...errors import PromptError, SettingError
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, Verdicts, setting
from ...models.base import noise_generator
from ...models.language import LanguageModel

__all__ = ["Relearning"]


@dataclasses.dataclass(frozen=True)
class Relearning(Attack):
    """Relearning on disjoint data along a curve of step budgets."""

    id: ClassVar[str] = "relearning"
    title: ClassVar[str] = "Relearning on disjoint data"
    source: ClassVar[str] = "arXiv 2406.13356"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("language",)
    teaches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "world": {"lr": 1e-3, "curve": (1, 2, 5, 10, 20, 50), "batch": 16},
        "quick": {"lr": 1e-3, "curve": (2, 10), "batch": 16},
    }

    data: str = setting("related", "disjoint data to train on", choices=("related", "unrelated"))
    lr: float = setting(1e-5, "learning rate of AdamW", minimum=0)
    curve: tuple[int, ...] = setting(
        (5, 10, 25, 50, 100), "steps after which the forgotten questions are asked", minimum=1
    )
    batch: int = setting(16, "pairs a step", minimum=1)
    max_new_tokens: int = setting(16, "longest answer in tokens", minimum=1)
    file: str | None = setting(
        None, "JSON lines with keys prompt and answer to train on, instead of the companions' data"
    )

    def attack(
        self,
        model: LanguageModel,
        concept: Concept,
        judge: Judge,
        budget: Budget,
        *,
        prompts: Sequence[Prompt],
        reference: Any = None,
        seed: int = 0,
    ) -> Attempts:
        """Attack all prompts at once; see :meth:`expunge.method.Attack.attack`.

        The rows of training and asking are shared by all prompts: step budgets that
        ``budget.denoiser_rows`` times the number of prompts cannot pay for are left out, an asking
        counted at its longest answers, so that the same ones are tried on every model.  ``hit`` of
        an attempt is a hit before, or after the last step budget; ``details["curve"]`` holds every
        one.

        Raises:
            SettingError: The budget does not pay for a single step budget.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        model.needs("gradients", "generate")
        curve = self._affordable(budget, len(prompts))
        before = model.cost.snapshot()
        ask = _Asker(self, model, concept, judge, prompts)
        task = _Relearn(self, model, self._pairs(model, concept, prompts), curve, ask, seed)
        ask(0)
        optimiser = finetune.Optimiser(lr=self.lr, name="adamw")
        trained = finetune.fit(
            task,
            finetune.Loop(steps=curve[-1], optimiser=optimiser),
            seed=seed,
            modules=tuple(model.parts().values()),
            label=self.id,
        )
        losses = trained.report()["losses"]
        return Attempts(
            attack=self.id,
            version=self.version,
            settings=self.settings(),
            teaches=True,
            budget=budget.name,
            judge=judge.id,
            threshold=judge.threshold,
            seed=seed,
            items=tuple(ask.attempt(i, prompt, losses) for i, prompt in enumerate(prompts)),
            outputs=ask.outputs[max(ask.outputs)],
            cost=model.cost.since(before),
        )

    def _affordable(self, budget: Budget, prompts: int) -> tuple[int, ...]:
        """The step budgets that the rows pay for; asking once costs at most a row a prompt and token."""
        curve = tuple(sorted(set(self.curve)))
        if not curve:
            raise SettingError(f"{self.id}: curve is empty; at least one number of steps is needed")
        if budget.denoiser_rows is None:
            return curve
        allowed, asking = budget.denoiser_rows * prompts, prompts * self.max_new_tokens
        price = [2 * self.batch * steps + (i + 2) * asking for i, steps in enumerate(curve)]
        if price[0] > allowed:
            raise SettingError(
                f"{self.id}: asking {prompts} prompts before and after {curve[0]} steps takes up to {price[0]} rows; "
                f"budget {budget.name!r} allows {allowed}"
            )
        return tuple(s for s, rows in zip(curve, price, strict=True) if rows <= allowed)

    def _pairs(
        self, model: LanguageModel, concept: Concept, prompts: Sequence[Prompt]
    ) -> list[answers.Pair]:
        if self.file is not None:
            pairs = _read_pairs(Path(self.file))
            asked = {(p.text, str(p.labels.get("answer"))) for p in prompts}
            for pair in pairs:
                if pair in asked:
                    raise SettingError(
                        f"{self.id}: {Path(self.file).name} holds {pair!r}, which is asked afterwards; data to relearn "
                        "on must be disjoint from what was forgotten"
                    )
            return pairs
        source = model.companions.data if model.companions is not None else None
        if source is None:
            raise SettingError(
                f"{self.id}: {model.name} brings no data to relearn on; give file=, JSON lines with "
                "keys prompt and answer"
            )
        found = source((concept,))
        pairs = list(found["retain" if self.data == "related" else "unrelated"])
        if set(pairs) & set(found["forget"]) or not pairs:
            raise SettingError(f"{self.id}: the {self.data} data is empty or not disjoint")
        return pairs


class _Asker:
    """Asks all prompts and keeps the verdicts of every step budget."""

    def __init__(
        self,
        method: Relearning,
        model: LanguageModel,
        concept: Concept,
        judge: Judge,
        prompts: Sequence[Prompt],
    ) -> None:
        self.method, self.model, self.concept, self.judge = method, model, concept, judge
        self.prompts = list(prompts)
        self.verdicts: dict[int, Verdicts] = {}
        self.outputs: dict[int, list[str]] = {}

    def __call__(self, steps: int) -> None:
        texts = self.model.generate(self.prompts, max_new_tokens=self.method.max_new_tokens)
        self.outputs[steps] = texts
        self.verdicts[steps] = self.judge.judge(texts, self.concept, self.prompts)

    def attempt(self, i: int, prompt: Prompt, losses: Mapping[str, Any]) -> Attempt:
        """The record of one prompt, with every step budget."""
        last = max(self.verdicts)
        pre, final = bool(self.verdicts[0].hit[i]), bool(self.verdicts[last].hit[i])
        details = {
            "curve": {str(steps): bool(v.hit[i]) for steps, v in self.verdicts.items()},
            "curve_of": "steps",
            "outputs": {str(steps): texts[i] for steps, texts in self.outputs.items()},
            "data": self.method.data,
            "steps": last,
            # The run is shared by all prompts, so its losses stand with the first one only.
            **({"losses": dict(losses)} if i == 0 else {}),
        }
        score = float(self.verdicts[last].score[i])
        return Attempt(prompt, pre, pre or final, score, None, details)


class _Relearn(finetune.Task):
    """Ordinary fine-tuning; asks when a step budget is reached."""

    def __init__(
        self,
        method: Relearning,
        model: LanguageModel,
        pairs: list[answers.Pair],
        curve: tuple[int, ...],
        ask: _Asker,
        seed: int,
    ) -> None:
        self.method, self.model, self.curve, self.ask, self.seed = method, model, curve, ask, seed
        self.sequences = model.sequences([p for p, _ in pairs], [a for _, a in pairs])

    def parameters(self) -> finetune.Groups:
        return {"weights": list(self.model.tensors().items())}

    def step(self, step: finetune.Step) -> dict[str, torch.Tensor]:
        chosen = answers.batches(
            len(self.sequences),
            self.method.batch,
            step.index,
            lambda epoch: noise_generator(self.seed, "relearning:order", epoch),
        )
        loss, mask = self.model.token_nll(self.sequences.select(chosen))
        self.model.cost.add("language", len(chosen), "backward")
        return {"weights": loss.sum() / mask.sum()}

    def after(self, step: finetune.Step, losses: Mapping[str, float]) -> bool:
        if step.index + 1 in self.curve:
            self.ask(step.index + 1)
        return False


def _read_pairs(path: Path) -> list[answers.Pair]:
    """Pairs from JSON lines with exactly the keys prompt and answer."""
    try:
        text = read_text(path)
    except OSError as error:
        raise PromptError(f"{path.name}: cannot be read ({error})") from None
    pairs = []
    for number, line in lines_of(text):
        try:
            entry = json.loads(line)
            pairs.append((str(entry["prompt"]), str(entry["answer"])))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise PromptError(
                f"{path.name}, line {number}: needs a JSON object with keys prompt and answer"
            ) from None
    if not pairs:
        raise PromptError(f"{path.name}: holds no pair of prompt and answer")
    return pairs
