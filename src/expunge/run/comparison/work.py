"""Measures the cells of the comparison: pictures of an arm, an attack on it, a sequence of requests."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...concept import Concept
from ...core.resampling import mean_rate, rate
from ...core.sampling import SEED_STEP, SHARED, OutputCache
from ...errors import ModelError
from ...evidence.arms import Arm, Observed, Part, PromptSets, observe
from ...evidence.attacking import attack_arms
from ...evidence.edits import edit_record
from ...evidence.measuring import Notes
from ...measure.distances import frechet_of
from ...method import budget
from ..choices import Choice, key, packed, plain
from .units import CONTROLS, Case, record, recorded

__all__ = ["BUDGET", "Bench", "Cell", "measure", "tallied"]

BUDGET = "world"
KEPT = ("neighbours", "unrelated")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One piece of work and what it will be recorded as.

    Attributes:
        part: ``star`` and the like for one concept, ``people``, ``objects``, ``sequence``.
        what: ``pictures``, ``sequence``, or ``attack``.
        arm: ``original``, ``never``, or a method.
        case: Concepts and prompts.
        attack: The attack, for ``attack``.
    """

    part: str
    what: str
    arm: str | Choice
    case: Case
    seed: int
    pictures: int
    attack: Choice | None = None

    @property
    def title(self) -> str:
        """A line for the terminal."""
        arm = self.arm if isinstance(self.arm, str) else self.arm.label
        what = self.attack.label if self.attack is not None else self.what
        return f"{self.part}, {len(self.case.concepts)} erased, {arm}, {what}, seed {self.seed}"

    def request(self, bench: Bench) -> dict[str, Any]:
        """Everything that can change the answer, and the words to find it by."""
        arm = {"id": self.arm} if isinstance(self.arm, str) else self.arm.described("erase")
        attack = self.attack.described("attack") | {"n": self.attack.n} if self.attack else None
        return plain(
            {
                "part": self.part, "what": self.what, "arm": arm, "attack": attack, **self.case.described(),
                "number": len(self.case.concepts), "seed": self.seed, "pictures": self.pictures,
                "split": bench.split, "judge": bench.judge.protocol, "model": bench.state,
            }
        )  # fmt: skip


class Bench:
    """The model, its world, and what is kept between cells and processes.

    Args:
        model: A model with companions (judge, prompts); edits on it are refused.
        folder: Where pictures of the original and of never, and fitted edits, are kept.
        split: ``test``, or ``development``.

    Attributes:
        pictures: The controls' pictures; those of erased models are kept in memory only.
    """

    def __init__(self, model: Any, folder: Path, split: str = "test") -> None:
        companions = model.companions
        if companions is None or companions.judge is None or companions.prompts is None:
            raise ModelError(
                f"{model.name} has no world beside it; the comparison needs prompts and a judge"
            )
        if len(model.edits):
            raise ModelError(f"{model.name} has edits on it; the comparison starts from the base")
        ask = functools.partial(companions.prompts, split=split)
        self.model, self.folder, self.split = model, folder, split
        self.companions = dataclasses.replace(companions, prompts=ask)
        self.judge = companions.judge()
        self.pictures = OutputCache(folder / "pictures")
        self.state: str = model.state.key

    @functools.cached_property
    def never(self) -> Any:
        """The model that was never shown a reference concept."""
        if self.companions.never is None:
            raise ModelError(f"{self.model.name} has no never model")
        return self.companions.never()

    def edit(
        self, choice: Choice, concepts: Sequence[Concept], keep: Sequence[str], seed: int
    ) -> Any:
        """The edit of a method fitted on the model as it is now; fitted once for all cells."""
        from ...edit import Edit

        request = {
            **choice.described("erase"), "concepts": [c.to_dict() for c in concepts], "keep": list(keep),
            "seed": seed, "state": self.model.state.key,
        }  # fmt: skip
        name = key(plain(request))
        file = self.folder / "edits" / f"{name}.safetensors"
        if file.is_file():
            return Edit.load(file)
        made = choice.method("erase").erase(  # type: ignore[attr-defined]
            self.model, tuple(concepts), keep=tuple(keep), judge=self.judge, seed=seed,
            run=self.folder / "runs" / name,
        )  # fmt: skip
        made.save(file)
        return made

    def arm(self, cell: Cell) -> Arm:
        """The arm of a cell; an eraser runs here."""
        if cell.arm == "original":
            return Arm("original", self.model, lift=True)
        if cell.arm == "never":
            return Arm("never", self.never, lift=True)
        assert isinstance(cell.arm, Choice)
        made = self.edit(cell.arm, cell.case.concepts, cell.case.keep, cell.seed)
        return Arm("erased", self.model, edits=(made,))


def measure(cell: Cell, bench: Bench) -> Path | None:
    """Do one cell and write its record; ``None`` where it is there already."""
    request = cell.request(bench)
    if recorded(request):
        return None
    began = time.perf_counter()
    work = {"pictures": _pictures, "attack": _attack, "sequence": _sequence}[cell.what]
    result = work(cell, bench)
    return record(request, result, time.perf_counter() - began)


# -- pictures --------------------------------------------------------------------------------------


def tallied(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The record of one set: mean over concepts of the hit rate, Wilson 95 % interval, hits one by one.

    ``n`` counts pictures.  ``hits`` has a digit a picture; ``units`` says which pictures share a prompt
    text and is left out where none do.
    """
    value, interval, prompts = mean_rate([(part.hit, part.texts) for part in parts.values()])
    lost = rate(
        [not seen for part in parts.values() for seen in part.recognisable],
        [f"{name}\n{text}" for name, part in parts.items() for text in part.texts],
    )
    return {
        "rate": value,
        "interval": list(interval),
        "n": sum(len(part.hit) for part in parts.values()),
        "prompts": prompts,
        "unrecognisable": lost[0],
        "names": {name: packed(part.hit, part.texts) for name, part in parts.items()},
    }


def _observed(bench: Bench, arm: Arm, case: Case) -> dict[str, dict[str, Part]]:
    """What the judge says of every set of a case under an arm."""
    named = {f"{group}/{name}": name for group, one in case.sets.items() for name in one}
    prompts = {
        f"{group}/{name}": listed
        for group, one in case.sets.items()
        for name, listed in one.items()
    }
    judged = {place: case.judged[name] for place, name in named.items()}
    sets = PromptSets(case.concepts[0], [], {}, prompts, judged)
    cache = bench.pictures if arm.name in CONTROLS else SHARED
    seen: Observed = observe(arm, sets, bench.judge, cache=cache, options={}, shown=0)
    found: dict[str, dict[str, Part]] = {group: {} for group in case.sets}
    for place, part in seen.kept().items():
        group, _, name = place.partition("/")
        found[group][name] = part
    return found


def _features(parts: Mapping[str, Part]) -> np.ndarray | None:
    found = [matrix for part in parts.values() if (matrix := part.matrix()) is not None]
    return np.concatenate(found) if found else None


def _distances(
    bench: Bench, mine: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, float | None]:
    """Frechet distance of each kept set to the same set of another arm, on the judge's features."""
    found: dict[str, float | None] = {}
    for group in KEPT:
        if group in mine:
            one, two = _features(mine[group]), _features(theirs[group])
            enough = one is not None and two is not None and min(len(one), len(two)) >= 2
            found[group] = frechet_of(one, two, bench.judge.id).value if enough else None  # type: ignore[arg-type]
    return found


def _shown(bench: Bench, arm: Arm, case: Case) -> dict[str, Any]:
    """Rates of all sets, distances to the original, false positives, and the size of the edits."""
    seen = _observed(bench, arm, case)
    if arm.name == "original":
        # What two draws of the same model differ by: the floor under every distance.
        reference = _observed(bench, arm, _redrawn(case))
    else:
        reference = _observed(bench, Arm("original", bench.model, lift=True), case)
    wrong = [
        (part.mistaken, part.texts)
        for group in KEPT
        for name, part in seen.get(group, {}).items()
        if name != case.concepts[0].name
    ]
    result: dict[str, Any] = {
        "sets": {group: tallied(parts) for group, parts in seen.items()},
        "frechet": _distances(bench, seen, reference),
        "false_positive": mean_rate(wrong)[0] if wrong else None,
        "edit": None,
    }
    if arm.name == "erased":
        with arm.ready() as model:
            result["edit"] = _size(bench, model, case)
    return result


def _redrawn(case: Case) -> Case:
    """The kept sets once more with other picture seeds."""
    sets = {
        group: {
            name: [dataclasses.replace(p, seed=(p.seed + SEED_STEP) % 2**62) for p in listed]
            for name, listed in case.sets[group].items()
        }
        for group in KEPT
        if group in case.sets
    }
    return dataclasses.replace(case, sets=sets)


def _size(bench: Bench, model: Any, case: Case) -> dict[str, Any] | None:
    """Rank, relative change, drift, seconds and rows of the edits on a model, taken together; ``None`` without any."""
    gone = {concept.name for concept in case.concepts}
    names = [name for name in bench.companions.unrelated if name not in gone]
    made = edit_record(model, names, Notes())
    if made is None:  # a sequence of one, taken back
        return None
    edits = list(model.edits)
    cost: dict[str, int] = {}
    for edit in edits:
        for name, rows in edit.manifest.cost.items():
            cost[name] = cost.get(name, 0) + rows
    return {
        "rank": made.rank,
        "relative_change": made.relative_change,
        "drift": made.drift,
        "parameters": made.parameters,
        "edits": len(edits),
        "seconds": sum(edit.manifest.seconds or 0.0 for edit in edits),
        "cost": cost,
    }


def _pictures(cell: Cell, bench: Bench) -> dict[str, Any]:
    return _shown(bench, bench.arm(cell), cell.case)


# -- attacks ---------------------------------------------------------------------------------------


def _attack(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Hits before and after one attack, item by item; the reason where the attack gives no result."""
    assert cell.attack is not None
    concept, arm = cell.case.concepts[0], bench.arm(cell)
    asked = cell.case.sets["target"][concept.name][: cell.attack.n]
    method: Any = cell.attack.method("attack")
    done = attack_arms(
        method, [arm], concept, bench.judge, budget(BUDGET), asked, reference=bench.model, seed=cell.seed, cache=None
    )  # fmt: skip
    if arm.name in done.failures:
        return {"failure": done.failures[arm.name]}
    attempts = done.attempts[arm.name]
    texts = [item.prompt.text for item in attempts.items]
    found = {}
    for name, hits in (
        ("pre", [item.pre_hit for item in attempts.items]),
        ("hit", [item.hit for item in attempts.items]),
    ):
        value, interval, prompts = rate(hits, texts)
        found[name] = {
            "rate": value, "interval": list(interval), "n": len(hits), "prompts": prompts, **packed(hits, texts),
        }  # fmt: skip
    skipped = sum("skipped" in item.details for item in attempts.items)
    return {
        **found,
        "skipped": skipped,
        "budget": BUDGET,
        "teaches": attempts.teaches,
        "cost": dict(attempts.cost),
    }


# -- one after another -----------------------------------------------------------------------------


def _sequence(cell: Cell, bench: Bench) -> dict[str, Any]:
    """Requests one after another, each fitted on the state before; then the middle one taken back."""
    assert isinstance(cell.arm, Choice)
    model, case = bench.model, cell.case
    base = {name: tensor.detach().clone() for name, tensor in model.tensors().items()}
    try:
        for concept in case.concepts:
            model.edits.push(bench.edit(cell.arm, (concept,), case.keep, cell.seed))
        edits = list(model.edits)
        stacked = _shown(bench, Arm("erased", model), case)
        middle = edits[len(edits) // 2]
        model.edits.remove(middle, although=tuple(edit.digest for edit in edits))
        rest = [edit for edit in edits if edit.digest != middle.digest]
        removal = _equal(model, _recomputed(base, rest))
        back = _shown(bench, Arm("erased", model), case)
    finally:
        model.edits.clear()
    return {
        "states": {"stacked": stacked, "taken back": back},
        "taken": case.concepts[len(edits) // 2].name,
        "removal_exact": removal,
        "base_exact": _equal(model, base),
    }


def _recomputed(base: Mapping[str, Any], edits: Sequence[Any]) -> dict[str, Any]:
    """The base with edits on it, computed without the stack that is checked."""
    values = dict(base)
    for edit in edits:
        for target in edit.manifest.targets:
            before = values[target.name]
            change = edit.change(target.name, before)
            values[target.name] = (before.double() + change).to(before.dtype)
    return values


def _equal(model: Any, values: Mapping[str, Any]) -> bool:
    """Whether every tensor of the model is what it should be, bit for bit."""
    import torch

    return all(torch.equal(tensor, values[name]) for name, tensor in model.tensors().items())
