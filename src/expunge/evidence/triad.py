"""One concept on the original, the erased and the never model: prompts, measures, edits, attacks."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..concept import Concept
from ..core.progress import Progress
from ..core.sampling import OutputCache
from ..method import Attack, Budget, Judge
from . import attacking, measuring
from .arms import Arm, Observed, PromptSets, observe, open_never
from .calibrating import calibration_flags, judge_record
from .edits import edit_record
from .gallery import Gallery, Shown
from .measuring import Notes
from .prompts import attacked
from .schema import ARMS, ConceptFields, Models, Stage
from .scope import scope
from .verdict import flags, judge_flags, verdict

if TYPE_CHECKING:
    from ..edit import Edit
    from ..models.base import Model

__all__ = ["Triad"]


class Triad:
    """One audit: what all its concepts share."""

    def __init__(self, model: Model, edits: tuple[Edit, ...], original: Model | None, never: Model | None,
                 companions: Any, judge: Judge, allowance: Budget, attacks: tuple[Attack, ...],
                 cache: OutputCache | None, batch: int, shown: int, clip: Any, seed: int, attack_n: int,
                 rebase: bool, sibling: bool, progress: bool | None, options: Mapping[str, Any],
                 calibrate: int | None = None) -> None:  # fmt: skip
        self.model, self.edits, self.original, self.never = model, edits, original, never
        self.companions, self.judge, self.allowance = companions, judge, allowance
        self.attacks = attacks
        self.cache, self.batch, self.shown, self.clip = cache, batch, shown, clip
        self.seed, self.attack_n, self.options = seed, attack_n, options
        self.rebase, self.sibling, self.progress = rebase, sibling, progress
        self.kind = "pictures" if model.family != "language" else "answers"
        self.calibrate = calibrate
        self.opened: Model | None = never

    def models(self) -> list[Model]:
        """The distinct models of this audit."""
        named = [self.model, self.original, self.opened]
        return list({id(m): m for m in named if m is not None}.values())

    def arms(self, concept: Concept, notes: Notes) -> list[Arm]:
        """The arms that can be had; the reason why one is missing goes to the notes."""
        arms = []
        if self.original is not None or self._changed:
            arms.append(Arm("original", self.original or self.model, lift=True))
        else:
            notes.null("models.original", "no original was given and the model has no edit to lift")
        arms.append(
            Arm("erased", self.model, edits=self.edits, rebase=self.rebase, sibling=self.sibling)
        )
        opened, reason = open_never(concept, self.never, self.companions, self.opened)
        if opened is not None:
            if self.opened is None:  # fresh from the world, which knows no device
                opened.beside(self.model)
            self.opened = opened
            arms.append(Arm("never", opened, lift=True))
        else:
            notes.null("models.never", reason or "")
        return arms

    def concept(self, concept: Concept, sets: PromptSets) -> tuple[ConceptFields, Gallery]:
        """Everything about one concept."""
        notes = Notes()
        stages: list[Stage] = []
        arms = self.arms(concept, notes)
        on = {edit.digest: edit for edit in [*self.model.edits, *self.edits]}
        for digest, made in ((digest, edit.manifest) for digest, edit in on.items()):
            if made.seconds is not None:
                name = f"erase ({made.method}, as recorded)"
                stages.append(Stage(name=name, seconds=made.seconds, cost=made.cost, edit=digest))
        seen: dict[str, Observed] = {}
        with Progress(
            f"audit of {concept.name}", sets.size * len(arms), unit="output", shown=self.progress
        ) as bar:
            for arm in arms:
                with (
                    _stage(arm.name, arm.model, stages) as stage,
                    _outputs_found(self.cache, stage),
                ):
                    seen[arm.name] = observe(
                        arm, sets, self.judge, cache=self.cache, options=self.options, batch=self.batch,
                        shown=self.shown, clip=self.clip, progress=functools.partial(bar.advance, arm.name),
                    )  # fmt: skip
        fields = ConceptFields(concept=concept.to_dict(), features=self.judge.id)
        fields.calibration = judge_record(
            self.judge, concept, self.companions, self.calibrate, notes
        )
        with _stage("measures", self.model, stages):
            self._measure(fields, seen, sets, notes)
        with arms[[a.name for a in arms].index("erased")].ready() as model:
            names = list(self.companions.unrelated) if self.companions is not None else []
            fields.edit = edit_record(model, names or list(sets.kept), notes)
        gallery = _gallery(seen)
        self._attack(fields, gallery, arms, sets, notes, stages)
        fields.stages = stages
        notes.into(fields)
        fields.flags = [
            *judge_flags(list(seen.values())), *calibration_flags(fields.calibration), *flags(fields, self.kind),
        ]  # fmt: skip
        fields.verdict = verdict(fields, concept.name, self.kind)
        fields.scope = scope(fields, concept.name, self.kind, self.judge.id)
        return fields, gallery

    def _attack(
        self,
        fields: ConceptFields,
        gallery: Gallery,
        arms: Sequence[Arm],
        sets: PromptSets,
        notes: Notes,
        stages: list[Stage],
    ) -> None:
        false = self._false_positives(fields)
        missing = {name: notes.reasons.get(f"models.{name}") for name in ARMS}
        asked = attacked(sets.target, self.attack_n)
        with Progress(
            f"attacks on {sets.concept.name}", len(self.attacks), unit="attack", shown=self.progress
        ) as bar:
            for attack in self.attacks:
                with _stage(f"attack {attack.id}", None, stages, self.models()) as stage:
                    done = attacking.attack_arms(
                        attack, arms, sets.concept, self.judge, self.allowance, asked,
                        reference=self._reference(), seed=self.seed, cache=self.cache,
                    )  # fmt: skip
                    for name in done.found:
                        _count(stage, done.attempts[name].cost)
                record = attacking.attack_record(
                    done, self.judge, self.allowance, self.seed, notes, false, missing
                )
                fields.attacks.append(record)
                gallery.attacks[attack.id] = _attack_gallery(done, self.shown)
                bar.advance(attack.id)

    def _reference(self) -> Model | None:
        """The original for attacks that use it: the same object serves, they lift its edits."""
        if self.original is not None:
            return self.original
        return self.model if self._changed else None

    @property
    def _changed(self) -> bool:
        """Whether there is something on the model that can be lifted."""
        return bool(self.edits or len(self.model.edits) or self.model.controls)

    def _measure(
        self, fields: ConceptFields, seen: dict[str, Observed], sets: PromptSets, notes: Notes
    ) -> None:
        original = seen.get("original")
        records = {}
        for name, observed in seen.items():
            record = measuring.arm_record(observed, self.judge, notes, sets.missing, self.clip)
            measuring.distances_of(record, observed, original, self.judge, notes, self.clip)
            records[name] = record
        fields.models = Models(**records)
        erased = records["erased"]
        fields.differences = measuring.differences(seen["erased"], original, self.judge, notes)
        fields.composites = measuring.composite_numbers(erased, notes)
        for name in (
            "frechet_to_original",
            "kid_to_original",
            "cmmd_to_original",
            "perceptual_distance",
            "unrecognisable",
        ):
            setattr(fields, name, getattr(erased, name))
            _repeat(notes, f"models.erased.{name}", name)
        if not any(part.features for part in seen["erased"].parts.values()):
            fields.features = None

    @staticmethod
    def _false_positives(fields: ConceptFields) -> float:
        """How often the judge sees the concept where it was not asked for, on the best arm for it."""
        assert fields.models is not None
        for arm in (fields.models.never, fields.models.original, fields.models.erased):
            if arm is not None and arm.false_positive is not None:
                return arm.false_positive
        # Without kept outputs, what labelled ones say of the judge.
        known = fields.calibration.false_positive_rate if fields.calibration is not None else None
        return known or 0.0


def _repeat(notes: Notes, source: str, path: str) -> None:
    tables: tuple[dict[str, Any], ...] = (notes.intervals, notes.protocols, notes.n, notes.reasons)
    for table in tables:
        if source in table:
            table[path] = table[source]


def _gallery(seen: Mapping[str, Observed]) -> Gallery:
    def rows(key: tuple[str, str], limit: int | None = None) -> list[Shown]:
        base = seen["erased"].parts[key]
        found = []
        for i, prompt in enumerate(base.prompts[: len(base.shown)][:limit]):
            row = Shown(prompt.text, prompt.seed, concept=key[1] or None)
            for arm, observed in seen.items():
                part = observed.parts[key]
                row.outputs[arm], row.hits[arm] = part.shown[i], part.hit[i]
            found.append(row)
        return found

    keys = list(seen["erased"].parts)
    kept = [row for key in keys if key[0] == "kept" for row in rows(key, 1)]
    return Gallery(target=rows(("target", "")), kept=kept)


def _attack_gallery(done: attacking.Attacked, limit: int) -> list[Shown]:
    """Rows of one attack, those that succeeded on the erased model first."""
    base = done.attempts.get("erased")
    if base is None:
        return []
    order = sorted(
        range(len(base.items)), key=lambda i: (not base.items[i].hit, base.items[i].pre_hit, i)
    )
    found = []
    for i in order[:limit]:
        row = Shown(base.items[i].prompt.text, base.items[i].prompt.seed)
        for arm in ARMS:
            attempts = done.attempts.get(arm)
            if attempts is not None:
                row.outputs[arm] = attempts.outputs[i] if i < len(attempts.outputs) else None
                row.hits[arm], row.text[arm] = attempts.items[i].hit, attempts.items[i].text
        found.append(row)
    return found


@contextlib.contextmanager
def _stage(
    name: str, model: Model | None, stages: list[Stage], models: Sequence[Model] = ()
) -> Iterator[dict[str, int]]:
    """A stage of the work; the block fills in what it found ready."""
    counted = list(models) or ([model] if model is not None else [])
    before = [m.cost.snapshot() for m in counted]
    start = time.perf_counter()
    found: dict[str, int] = {}
    yield found
    cost: dict[str, int] = {}
    for m, counts in zip(counted, before, strict=True):
        for key, value in m.cost.since(counts).items():
            cost[key] = cost.get(key, 0) + value
    stages.append(
        Stage(
            name=name,
            seconds=time.perf_counter() - start,
            peak_bytes=_peak(),
            cost=cost,
            found=found,
        )
    )


@contextlib.contextmanager
def _outputs_found(cache: OutputCache | None, stage: dict[str, int]) -> Iterator[None]:
    before = cache.hits if cache is not None else 0
    yield
    if cache is not None and cache.hits > before:
        stage["outputs"] = cache.hits - before


def _count(stage: dict[str, int], rows: Mapping[str, int]) -> None:
    for name, value in rows.items():
        stage[name] = stage.get(name, 0) + value


def _peak() -> int | None:
    """Peak resident memory of the process so far, in bytes; ``None`` where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
