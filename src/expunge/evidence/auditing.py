"""audit: the same prompts, seeds and attacks on the original, the erased and the never model.

The erased model is the model with the edits on; the original is the same weights with every edit
lifted (or a model of the caller's); never was trained the same way without the concept, where a world
has such a model.  Only differences between the three are evidence.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..concept import Concept, as_concepts, common_kind
from ..core.sampling import SHARED, OutputCache
from ..errors import InputError, MissingPart
from ..method import Budget, Judge
from ..method import budget as named_budget
from . import attacking
from .gallery import Gallery
from .prompts import prompt_sets
from .record import Evidence
from .schema import ConceptFields
from .triad import Triad

if TYPE_CHECKING:
    from ..edit import Edit
    from ..models.base import Model

__all__ = ["audit", "chosen_concepts", "chosen_judge", "now"]

SIZES = ("n", "kept_n", "attack_n", "seeds", "batch")


def audit(
    model: Model,
    edits: Edit | Sequence[Edit] = (),
    concept: Concept | str | Sequence[Concept | str] | None = None,
    *,
    attacks: Any = "all",
    budget: str | Budget = "world",
    judge: Judge | str | None = None,
    calibrate: int | None = None,
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
        judge: A judge, or what :func:`expunge.measure.judges.open_judge` takes; default: the world's.
        calibrate: Labelled pictures with and without the concept; default: some for the world's own judge.
        original: Default: the model with its edits lifted, if there are any.
        never: Default: the world's, if it lacks the concept.
        prompts: Texts or prompts that name the concept; a mapping by name for several concepts.
        kept: Names or a mapping to prompts; default: all neighbours of the kind and unrelated ones.
        n, kept_n, attack_n: Prompts for the concept, for each kept concept and route, and attacked.
        seeds: Outputs of each prompt; intervals resample prompts.
        seed, split: Choose the prompts (``development`` while choosing settings); the seed of attacks.
        batch: Outputs at a time; halve it when memory runs out.
        shown: Outputs of each set kept for the report.
        clip: A :class:`~expunge.measure.clip_score.ClipScore`; default: the companions' one.
        cache: Outputs and attacks made before; ``None`` keeps nothing.
        rebase, sibling: As for :meth:`Edit.on`.
        progress, command: Show a progress line (``None``: where a terminal looks); what was typed.
        options: Passed to ``model.generate`` (``steps``, ``guidance``, ...).

    Raises: InputError: no concept, no judge or (PromptError) nothing to ask.
    """
    from ..edit import Edit

    edits = (edits,) if isinstance(edits, Edit) else tuple(edits)
    concepts = chosen_concepts(concept, edits, model, original)
    companions = model.companions or (original.companions if original is not None else None)
    judge = chosen_judge(judge, companions, model)
    _whole_numbers(n, kept_n, attack_n, seeds, batch)
    allowance = named_budget(budget)
    run = Triad(
        model, edits, original, never, companions, judge, allowance,
        attacking.choose(attacks, model.family, allowance, common_kind(concepts)), cache, batch, shown,
        _clip(clip, companions), seed, attack_n, rebase, sibling, progress, options, calibrate,
    )  # fmt: skip
    asked = {"n": n, "kept_n": kept_n, "seeds": seeds, "seed": seed, "split": split}
    return _evidence(run, concepts, asked, prompts, kept, command)


def chosen_judge(judge: Judge | str | None, companions: Any, model: Model) -> Judge:
    """The judge that was given or named, else the world's own."""
    if isinstance(judge, str):
        from ..measure.judges import open_judge

        return open_judge(judge, model)
    if judge is not None:
        return judge
    if companions is None or companions.judge is None:
        raise InputError(f"{model.name} has no judge of its own; give one with judge=")
    own: Judge = companions.judge()
    return own


def _whole_numbers(*values: Any) -> None:
    for name, value in zip(SIZES, values, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name} is {value!r}; a whole number of at least 1 is needed")


def _evidence(
    run: Triad,
    concepts: Sequence[Concept],
    asked: Mapping[str, Any],
    prompts: Any,
    kept: Any,
    command: str | None,
) -> Evidence:
    start = time.perf_counter()
    found: dict[str, ConceptFields] = {}
    gallery: dict[str, Gallery] = {}
    # All of them first: a mistake in the last concept's prompts shows before any work is done.
    sets = [
        prompt_sets(
            one, run.companions, family=run.model.family, prompts=prompts, kept=kept, **asked
        )
        for one in concepts
    ]
    for one, own in zip(concepts, sets, strict=True):
        found[one.name], gallery[one.name] = run.concept(one, own)
    chosen = {
        **asked, "attack_n": run.attack_n, "budget": run.allowance.name, "attacks": [a.id for a in run.attacks],
        "options": {k: _plain(v) for k, v in run.options.items()},
        "original": run.original.name if run.original is not None else None,
        "own_prompts": prompts is not None, "own_kept": kept is not None,
    }  # fmt: skip
    evidence = Evidence(
        expunge_version=__version__, created=now(), command=command, model=run.model.name, family=run.model.family,
        judge=run.judge.protocol, settings=chosen, libraries=_libraries(), machine=_machine(run.model),
        cost=_total(found), found=_found(found), seconds=time.perf_counter() - start, concepts=found,
    )  # fmt: skip
    evidence.gallery.update(gallery)
    return evidence


def _total(found: Mapping[str, ConceptFields]) -> dict[str, int]:
    """Rows of all stages; an edit that erased several concepts was made once."""
    cost: Counter[str] = Counter()
    made: set[str] = set()
    for fields in found.values():
        for stage in fields.stages:
            if stage.edit is None or stage.edit not in made:
                cost.update(stage.cost)
            if stage.edit is not None:
                made.add(stage.edit)
    return dict(cost)


def _found(concepts: Mapping[str, ConceptFields]) -> dict[str, int]:
    """What did not have to be made, all stages."""
    found: Counter[str] = Counter()
    for fields in concepts.values():
        for stage in fields.stages:
            found.update(stage.found)
    return dict(found)


def chosen_concepts(
    concept: Any, edits: Sequence[Edit], model: Model, original: Model | None
) -> tuple[Concept, ...]:
    """The concepts that were given, by name as the world knows them, else those that the edits name."""
    companions = model.companions or (original.companions if original is not None else None)
    if concept is None:
        on = [*model.edits, *edits]
        named = {
            entry["name"]: Concept.from_dict(entry)
            for edit in on
            for entry in edit.manifest.concepts
        }
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


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _libraries() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "diffusers", "numpy", "safetensors"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _machine(model: Model) -> dict[str, Any]:
    import torch

    return {"system": platform.system(), "processor": platform.machine(), "python": platform.python_version(),
            "processors": os.cpu_count(), "threads": torch.get_num_threads(),
            "device": str(getattr(model, "device", "cpu"))}  # fmt: skip


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
