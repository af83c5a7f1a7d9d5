"""audit: the same prompts, seeds and attacks on the original, the erased and the never model.

The erased model is the model with the edits on; the original is the same weights with every edit
lifted (or a model of the caller's); never was trained the same way without the concept, where a world
has such a model.  Only differences between the three are evidence.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..concept import Concept, as_concepts
from ..core.progress import Progress
from ..core.sampling import SHARED, OutputCache
from ..errors import InputError, MissingPart
from ..method import Attack, Budget, Judge, Prompt, budget as named_budget
from . import attacking, measuring
from .arms import Arm, Observed, PromptSets, observe, open_never
from .edits import edit_record
from .gallery import Gallery, Shown
from .measuring import Notes
from .prompts import prompt_sets
from .record import Evidence
from .schema import ARMS, ConceptFields, Models, Stage
from .verdict import flags, judge_flags, verdict

if TYPE_CHECKING:
    from ..edit import Edit
    from ..models.base import Model

__all__ = ["audit"]


def audit(
    model: Model,
    edits: Edit | Sequence[Edit] = (),
    concept: Concept | str | Sequence[Concept | str] | None = None,
    *,
    attacks: Any = "all",
    budget: str | Budget = "world",
    judge: Judge | None = None,
    original: Model | None = None,
    never: Model | None = None,
    prompts: Any = None,
    kept: Any = None,
    n: int = 100,
    kept_n: int = 20,
    attack_n: int = 20,
    seeds: int = 1,
    seed: int = 0,
    split: str = "test",
    batch: int = 64,
    shown: int = 8,
    clip: Any = None,
    cache: OutputCache | None = SHARED,
    rebase: bool = False,
    sibling: bool = False,
    progress: bool | None = None,
    command: str | None = None,
    **options: Any,
) -> Evidence:
    """Measure what is left of one or several concepts, what broke, and what attacks bring back.

    Args:
        model: The model; edits already on it belong to the erased arm.
        edits: Edits to put on, in order; the model is as it was found afterwards.
        concept: Concept(s) or names; default: those the edits name.
        attacks: ``all`` that are implemented for the family, ``none``, ids, or Attack objects.
        budget: Name of the allowance for each attacked prompt; the same on all arms.
        judge: Default: the world's.
        original: Default: the model with its edits lifted, if there are any.
        never: Default: the world's, if it lacks the concept.
        prompts: Texts or prompts that name the concept (a mapping by name for several concepts).
        kept: Names or a mapping to prompts; default: all neighbours of the kind and unrelated ones.
        n, kept_n, attack_n: Prompts for the concept, for each kept concept and route, and attacked.
        seeds: Outputs of each prompt; intervals resample prompts.
        seed: Chooses prompts and seeds the attacks.
        split: ``test``; ``development`` while choosing settings.
        batch: Outputs at a time; halve it when memory runs out.
        shown: Outputs of each set kept for the report.
        clip: A :class:`~expunge.measure.clip_score.ClipScore`; default: the companions' one.
        cache: Outputs and attacks made before; ``None`` keeps nothing.
        rebase, sibling: As for :meth:`Edit.on`.
        progress: Show a progress line; ``None`` where a terminal looks.
        command: What was typed, for the report.
        options: Passed to ``model.generate`` (``steps``, ``guidance``, ...).

    Returns:
        :class:`Evidence`, with a few outputs in ``gallery``.

    Raises:
        InputError: No concept, or no judge.
        PromptError: Nothing to ask.
    """
    from ..edit import Edit

    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    concepts = _concepts(concept, edits, model, original)
    companions = model.companions or (original.companions if original is not None else None)
    judge = judge or (companions.judge() if companions is not None and companions.judge else None)
    if judge is None:
        raise InputError(f"{model.name} has no judge of its own; give one with judge=")
    for name, value in (("n", n), ("kept_n", kept_n), ("attack_n", attack_n), ("seeds", seeds), ("batch", batch)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; a whole number of at least 1 is needed")
    run = _Run(model, edits, original, never, companions, judge, named_budget(budget),
               attacking.choose(attacks, model.family), cache, batch, shown, _clip(clip, companions), seed,
               attack_n, rebase, sibling, progress, options)  # fmt: skip
    start, before = time.perf_counter(), {id(m): (m, m.cost.snapshot()) for m in run.models()}
    found: dict[str, ConceptFields] = {}
    gallery: dict[str, Gallery] = {}
    for one in concepts:
        sets = prompt_sets(one, companions, family=model.family, prompts=prompts, kept=kept, n=n, kept_n=kept_n,
                           seeds=seeds, seed=seed, split=split)  # fmt: skip
        found[one.name], gallery[one.name] = run.concept(one, sets)
    cost: dict[str, int] = {}
    for m in run.models():
        for key, value in m.cost.since(before[id(m)][1] if id(m) in before else {}).items():
            cost[key] = cost.get(key, 0) + value
    chosen = {"n": n, "kept_n": kept_n, "attack_n": attack_n, "seeds": seeds, "seed": seed, "split": split,
              "budget": run.allowance.name, "attacks": [a.id for a in run.attacks],
              "options": {k: _plain(v) for k, v in options.items()},
              "original": original.name if original is not None else None,
              "own_prompts": prompts is not None, "own_kept": kept is not None}  # fmt: skip
    evidence = Evidence(
        expunge_version=__version__, created=_now(), command=command, model=model.name, family=model.family,
        judge=judge.protocol, settings=chosen, libraries=_libraries(), machine=_machine(model), cost=cost,
        seconds=time.perf_counter() - start, concepts=found,
    )  # fmt: skip
    evidence.gallery.update(gallery)
    return evidence


class _Run:
    """One audit: what all its concepts share."""

    def __init__(self, model: Model, edits: tuple[Edit, ...], original: Model | None, never: Model | None,
                 companions: Any, judge: Judge, allowance: Budget, attacks: tuple[Attack, ...],
                 cache: OutputCache | None, batch: int, shown: int, clip: Any, seed: int, attack_n: int,
                 rebase: bool, sibling: bool, progress: bool | None, options: Mapping[str, Any]) -> None:  # fmt: skip
        self.model, self.edits, self.original, self.never = model, edits, original, never
        self.companions, self.judge, self.allowance, self.attacks = companions, judge, allowance, attacks
        self.cache, self.batch, self.shown, self.clip = cache, batch, shown, clip
        self.seed, self.attack_n, self.options = seed, attack_n, options
        self.rebase, self.sibling, self.progress = rebase, sibling, progress
        self.kind = "pictures" if model.family != "language" else "answers"
        self.opened: Model | None = never

    def models(self) -> list[Model]:
        """The distinct models of this audit."""
        named = [self.model, self.original, self.opened]
        return list({id(m): m for m in named if m is not None}.values())

    def arms(self, concept: Concept, notes: Notes) -> list[Arm]:
        """The arms that can be had; the reason why one is missing goes to the notes."""
        arms = []
        changed = bool(self.edits or len(self.model.edits) or self.model.controls)
        if self.original is not None or changed:
            arms.append(Arm("original", self.original or self.model, lift=True))
        else:
            notes.null("models.original", "no original was given and the model has no edit to lift")
        arms.append(Arm("erased", self.model, edits=self.edits, rebase=self.rebase, sibling=self.sibling))
        opened, reason = open_never(concept, self.never, self.companions)
        if opened is not None:
            self.opened = opened
            arms.append(Arm("never", opened, lift=True))
        else:
            notes.null("models.never", reason or "")
        return arms

    def concept(self, concept: Concept, sets: PromptSets) -> tuple[ConceptFields, Gallery]:
        """Everything about one concept."""
        notes, stages = Notes(), []
        arms = self.arms(concept, notes)
        seen: dict[str, Observed] = {}
        with Progress(f"audit of {concept.name}", sets.size * len(arms), unit="output", shown=self.progress) as bar:
            for arm in arms:
                with _stage(arm.name, arm.model, stages):
                    seen[arm.name] = observe(
                        arm, sets, self.judge, cache=self.cache, options=self.options, batch=self.batch,
                        shown=self.shown, clip=self.clip, progress=lambda k, arm=arm: bar.advance(arm.name, k),
                    )  # fmt: skip
        fields = ConceptFields(concept=concept.to_dict(), features=self.judge.id)
        with _stage("measures", self.model, stages):
            self._measure(fields, seen, sets, notes)
        with arms[[a.name for a in arms].index("erased")].ready() as model:
            names = list(self.companions.unrelated) if self.companions is not None else []
            fields.edit = edit_record(model, names or list(sets.kept), notes)
        gallery = _gallery(seen)
        false = self._false_positives(fields)
        missing = {name: notes.reasons.get(f"models.{name}") for name in ARMS}
        asked = _attacked(sets.target, self.attack_n)
        with Progress(f"attacks on {concept.name}", len(self.attacks), unit="attack", shown=self.progress) as bar:
            for attack in self.attacks:
                with _stage(f"attack {attack.id}", None, stages, self.models()):
                    done = attacking.attack_arms(
                        attack, arms, concept, self.judge, self.allowance, asked,
                        reference=self._reference(), seed=self.seed, cache=self.cache,
                    )  # fmt: skip
                record = attacking.attack_record(done, self.judge, self.allowance, self.seed, notes, false, missing)
                fields.attacks.append(record)
                gallery.attacks[attack.id] = _attack_gallery(done, self.shown)
                bar.advance(attack.id)
        fields.stages = stages
        notes.into(fields)
        fields.flags = [*judge_flags(list(seen.values())), *flags(fields, self.kind)]
        fields.verdict = verdict(fields, concept.name, self.kind)
        return fields, gallery

    def _reference(self) -> Model | None:
        """The original for attacks that use it: the same object serves, they lift its edits."""
        if self.original is not None:
            return self.original
        return self.model if self.edits or len(self.model.edits) else None

    def _measure(self, fields: ConceptFields, seen: dict[str, Observed], sets: PromptSets, notes: Notes) -> None:
        original = seen.get("original")
        records = {}
        for name, observed in seen.items():
            record = measuring.arm_record(observed, self.judge, notes, sets.missing, self.clip)
            measuring.distances_of(record, observed, original, self.judge, notes)
            records[name] = record
        fields.models = Models(**records)
        erased = records["erased"]
        fields.differences = measuring.differences(seen["erased"], original, self.judge, notes)
        fields.composites = measuring.composite_numbers(erased, notes)
        for name in ("frechet_to_original", "kid_to_original", "perceptual_distance", "unrecognisable"):
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
        return 0.0


def _repeat(notes: Notes, source: str, path: str) -> None:
    for table in (notes.intervals, notes.protocols, notes.n, notes.reasons):
        if source in table:
            table[path] = table[source]  # type: ignore[index]


def _concepts(concept: Any, edits: Sequence[Edit], model: Model, original: Model | None) -> tuple[Concept, ...]:
    companions = model.companions or (original.companions if original is not None else None)
    if concept is None:
        on = [*model.edits, *edits]
        named = {entry["name"]: Concept.from_dict(entry) for edit in on for entry in edit.manifest.concepts}
        if not named:
            raise InputError("no concept was given and no edit names one; give concept=")
        return tuple(named.values())

    def known(entry: Concept | str) -> Concept:
        if isinstance(entry, Concept):
            return entry
        found = companions.concept(entry) if companions is not None else None
        return found if found is not None else Concept(entry)

    entries = [concept] if isinstance(concept, (Concept, str)) else list(concept)
    return as_concepts([known(entry) for entry in entries])


def _clip(clip: Any, companions: Any) -> Any:
    if clip is not None:
        return clip
    opener = getattr(companions, "clip", None)
    try:
        return opener() if callable(opener) else opener
    except (MissingPart, OSError):
        return None


def _attacked(target: Sequence[Prompt], count: int) -> list[Prompt]:
    """The first prompts with distinct texts (one seed each), repeated texts after them."""
    first = list({prompt.text: prompt for prompt in reversed(target)}.values())[::-1]
    rest = [prompt for prompt in target if prompt not in first]
    return [*first, *rest][:count]


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
    order = sorted(range(len(base.items)), key=lambda i: (not base.items[i].hit, base.items[i].pre_hit, i))
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
def _stage(name: str, model: Model | None, stages: list[Stage], models: Sequence[Model] = ()) -> Iterator[None]:
    counted = list(models) or ([model] if model is not None else [])
    before = [m.cost.snapshot() for m in counted]
    start = time.perf_counter()
    yield
    cost: dict[str, int] = {}
    for m, counts in zip(counted, before, strict=True):
        for key, value in m.cost.since(counts).items():
            cost[key] = cost.get(key, 0) + value
    stages.append(Stage(name=name, seconds=time.perf_counter() - start, peak_bytes=_peak(), cost=cost))


def _peak() -> int | None:
    """Peak resident memory of the process so far, in bytes; ``None`` where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _libraries() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "diffusers", "numpy", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _machine(model: Model) -> dict[str, Any]:
    import os

    import torch

    return {"system": platform.system(), "processor": platform.machine(), "python": platform.python_version(),
            "processors": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": str(getattr(model, "device", "cpu"))}  # fmt: skip


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
