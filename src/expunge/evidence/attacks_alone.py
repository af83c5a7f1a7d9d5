"""Attacks alone: what some attacks bring back on one model as it stands, without the rest of an audit.

Prompts, budgets, presets and counting are those of :func:`expunge.evidence.audit`.  Without the two models beside it
nothing says whether an attack measures anything: one that fools the judge succeeds on every model, and one that fails
may fail on the original, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import __version__
from ..concept import Concept
from ..core.kept_attempts import plain
from ..core.progress import Progress
from ..core.sampling import SHARED, OutputCache
from ..errors import InputError, SettingError
from ..method import Attempt, Budget, Judge, Prompt
from ..method import budget as named_budget
from . import attacking
from .arms import Arm
from .auditing import chosen_concepts, chosen_judge, now
from .gallery import png
from .measuring import Notes
from .prompts import attacked, prompt_sets
from .record import write_atomically
from .schema import AttackRecord

if TYPE_CHECKING:
    from ..edit import Edit
    from ..models.base import Model

__all__ = ["AttackRun", "run_attacks"]

ALONE = "attacked alone: only the model itself was attacked"


@dataclasses.dataclass
class AttackRun:
    """What attacks did to one model.

    Attributes:
        header: What was attacked, how and when, as JSON has it.
        done: What each attack did; its arm is called ``erased``, as in an audit.
        records: Its numbers; those of the other two models are null.
        notes: Interval, protocol and n of each number.
    """

    header: dict[str, Any]
    done: list[attacking.Attacked]
    records: list[AttackRecord]
    notes: Notes

    def number(self, record: AttackRecord, kind: str) -> dict[str, Any] | None:
        """The share of attacked prompts that show the concept before (``pre``) or after (``hit``) an attack."""
        value = getattr(record, f"{kind}_erased")
        path = f"attacks.{record.id}.{kind}_erased"
        return None if value is None else {"value": value, **self._beside(path)}

    def _beside(self, path: str) -> dict[str, Any]:
        return {
            "interval": self.notes.intervals.get(path), "n": self.notes.n.get(path),
            "protocol": self.notes.protocols.get(path),
        }  # fmt: skip

    def items(self, record: AttackRecord) -> tuple[Attempt, ...]:
        """One attempt a prompt, in their order; none where the attack gave no result."""
        attempts = self._of(record)
        return attempts.items if attempts is not None else ()

    def _of(self, record: AttackRecord) -> Any:
        done = next(one for one in self.done if one.attack.id == record.id)
        return done.attempts.get("erased")

    def best(self, record: AttackRecord) -> list[Attempt]:
        """Attempts that succeeded by an adversarial text where the plain prompt had not, the surest first."""
        found = [i for i in self.items(record) if i.hit and not i.pre_hit and i.text is not None]
        return sorted(found, key=lambda item: -item.score)

    def rows(self, record: AttackRecord) -> int:
        """Rows through the denoiser or the language model, forward and backward, of all prompts."""
        cost = record.cost.get("erased", {})
        return sum(n for name, n in cost.items() if name.split(".")[0] in ("denoiser", "language"))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, but for what attacks note in details of their own."""
        return {**self.header, "attacks": [self._attack(record) for record in self.records]}

    def _attack(self, record: AttackRecord) -> dict[str, Any]:
        found = record.model_dump(mode="json")
        kept = ("id", "version", "preset", "settings", "teaches", "threshold", "skipped")
        attempts, conventions = self._of(record), {}
        for name, value in record.success.items():
            if value is not None:
                path = f"attacks.{record.id}.success.{name}"
                conventions[name] = {"value": value, **self._beside(path)}
        failed = attempts is None
        return {
            **{name: found[name] for name in kept},
            "status": record.status if failed else "run",
            "reason": record.reason if failed else None,
            "before": self.number(record, "pre"), "after": self.number(record, "hit"), "success": conventions,
            "rows": self.rows(record), "cost": found["cost"].get("erased", {}),
            "seconds": found["seconds"].get("erased"), "summary": found["summary"].get("erased", {}),
            "items": [self._item(record, i) for i in range(len(self.items(record)))],
        }  # fmt: skip

    def _item(self, record: AttackRecord, index: int) -> dict[str, Any]:
        item, output = self.items(record)[index], self._of(record).outputs[index]
        shown = isinstance(output, np.ndarray)
        return {
            "prompt": item.prompt.text, "seed": item.prompt.seed, "before": item.pre_hit, "after": item.hit,
            "score": item.score, "text": item.text, "details": dict(item.details),
            "picture": self._picture(record, index) if shown and item.hit else None,
            **({} if shown else {"output": str(output)}),
        }  # fmt: skip

    def _picture(self, record: AttackRecord, index: int) -> str:
        """Where the picture of a success stands in the folder."""
        return f"{record.id}/{index:04d}-seed{self.items(record)[index].prompt.seed}.png"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``attacks.json`` and the pictures that show the concept, each atomically; returns the former."""
        place = Path(folder)
        for record in self.records:
            for index, item in enumerate(self.items(record)):
                output = self._of(record).outputs[index]
                if item.hit and isinstance(output, np.ndarray):
                    write_atomically(place / self._picture(record, index), png(output))
        document = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, default=plain)
        write_atomically(place / "attacks.json", (document + "\n").encode())
        return place / "attacks.json"


def run_attacks(
    model: Model,
    concept: Concept | str | Sequence[Concept | str] | None,
    edits: Edit | Sequence[Edit] = (),
    *,
    attacks: Any = "all",
    budget: str | Budget = "world",
    judge: Judge | str | None = None,
    original: Model | None = None,
    prompts: Any = None,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    cache: OutputCache | None = SHARED,
    rebase: bool = False,
    sibling: bool = False,
    progress: bool | None = None,
    command: str | None = None,
) -> AttackRun:
    """Run attacks on a model with its edits; most arguments are those of :func:`expunge.evidence.audit`.

    Args:
        model, concept: What is attacked for what; edits already on the model stay on. ``None``: what they name.
        edits: Edits to put on, in order; the model is as it was found afterwards.
        attacks: ``all`` that are implemented for the family, ids, or Attack objects.
        original: For attacks that use it; default: the model with its edits lifted, if there are any.
        prompts: Texts or prompts that name the concept; default: the world's, or templates.
        n: Attacked prompts; default: all of the caller's own, or 20.

    Raises:
        InputError: No judge, not one concept, no attack, or (PromptError) nothing to ask.
        CatalogueError: An attack that nobody registered, or one for another family.
    """
    from ..edit import Edit

    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    wanted = _one(chosen_concepts(concept, edits, model, original))
    companions = model.companions or (original.companions if original is not None else None)
    decides, allowance = chosen_judge(judge, companions, model), named_budget(budget)
    chosen = attacking.choose(attacks, model.family, allowance, wanted.kind)
    if not chosen:
        raise SettingError("no attack was named; name ids, or `all`")
    asked = _asked(wanted, companions, model.family, prompts, n, seed, split)
    lifts = edits or len(model.edits) or model.controls
    reference = original if original is not None else (model if lifts else None)
    arm = Arm("erased", model, edits=edits, rebase=rebase, sibling=sibling)
    done, records, notes = [], [], Notes()
    with arm.ready() as ready:
        header = {
            "expunge_version": __version__, "created": now(), "command": command, "model": model.name,
            "family": model.family, "state": ready.state.key, "edits": list(ready.edits.digests),
            "concept": wanted.to_dict(), "judge": decides.protocol, "budget": allowance.name, "seed": seed,
            "own_prompts": prompts is not None,
        }  # fmt: skip
        with Progress(
            f"attacks on {wanted.name}", len(chosen), unit="attack", shown=progress
        ) as bar:
            for attack in chosen:
                done.append(attacking.attack_arms(
                    attack, [arm], wanted, decides, allowance, asked, reference=reference, seed=seed, cache=cache,
                ))  # fmt: skip
                records.append(attacking.attack_record(
                    done[-1], decides, allowance, seed, notes, 0.0, {"original": ALONE, "never": ALONE},
                ))  # fmt: skip
                bar.advance(attack.id)
    return AttackRun(header, done, records, notes)


def _one(concepts: Sequence[Concept]) -> Concept:
    if len(concepts) > 1:
        names = ", ".join(repr(one.name) for one in concepts)
        raise InputError(f"{names}: attacks are run for one concept at a time")
    return concepts[0]


def _asked(
    concept: Concept, companions: Any, family: str, prompts: Any, n: int | None, seed: int, split: str
) -> list[Prompt]:  # fmt: skip
    """The attacked prompts, chosen as an audit chooses them."""
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise InputError(f"n is {n!r}; a whole number of at least 1 is needed")
    found = prompt_sets(
        concept, companions, family=family, prompts=prompts, kept=(), n=n or 20, seed=seed, split=split
    ).target  # fmt: skip
    return attacked(found, n or len(found))
