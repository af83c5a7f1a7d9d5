"""The work of a cell: fit an eraser, look at an arm's pictures, attack an arm."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ...core.sampling import SHARED
from ...errors import ExpungeError, MissingExtra, RunError
from ...evidence.arms import Arm, Part, observe
from ...measure.distances import frechet_of
from ...method import Attempts
from ..choices import packed
from .bench import Bench
from .plan import Cell
from .store import Store

__all__ = ["EDIT", "attempt"]

EDIT = "edit.safetensors"
FEATURES = "features.safetensors"


class Refused(Exception):
    """A method that does not do what it was asked, in its own words; this is a result."""


def attempt(cell: Cell, bench: Bench, store: Store) -> str:
    """Do a cell unless it is finished, in work elsewhere, or waits for another.

    Returns:
        ``done``, ``refused``, ``failed``; or ``found``, ``busy``, ``waits``, where nothing was done.
    """
    if store.finished(cell.key):
        return "found"
    if store.failed(cell.key) or any(map(store.failed, cell.needs)):
        return "failed"
    if not all(store.finished(key) for key in cell.needs):
        return "waits"
    with store.claim(cell.key) as free:
        if not free:
            return "busy"
        if store.finished(cell.key):  # between the look and the claim
            return "found"
        return _done(cell, bench, store)


def _done(cell: Cell, bench: Bench, store: Store) -> str:
    start = time.perf_counter()
    SHARED.recalled.clear()
    files: dict[str, bytes] = {}
    try:
        result = WORK[cell.kind](cell, bench, store, files)
    except Refused as refusal:
        result, files = {"refused": str(refusal)}, {}
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:  # one cell that fails must not stop the others
        told = str(error) if isinstance(error, ExpungeError) else traceback.format_exc(limit=-6)
        store.fail(cell.key, cell.title, told or type(error).__name__)
        return "failed"
    seconds = time.perf_counter() - start + SHARED.recalled["seconds"]
    store.publish(cell.request, cell.key, result, seconds, files)
    return "refused" if "refused" in result else "done"


def _refusing(work: Callable[[], Any]) -> Any:
    """What is raised on purpose is the method's answer, unless it speaks of this machine or folder."""
    try:
        return work()
    except (MissingExtra, RunError):
        raise
    except ExpungeError as error:
        raise Refused(str(error)) from error


# -- fits ------------------------------------------------------------------------------------------


def _fit(cell: Cell, bench: Bench, store: Store, files: dict[str, bytes]) -> dict[str, Any]:
    """The edit of one eraser; other cells read it from this cell's folder."""
    case, model = cell.case, bench.model
    before, start, scratch = model.cost.snapshot(), time.perf_counter(), store.scratch(cell.key)
    edit = _refusing(
        lambda: cell.eraser.erase(
            model, (case.concept,), keep=case.keep, judge=bench.judge, seed=case.seed, run=scratch / "run"
        )
    )  # fmt: skip
    seconds = time.perf_counter() - start
    edit.save(scratch / EDIT)
    files[EDIT] = (scratch / EDIT).read_bytes()
    return {
        "digest": edit.digest, "bytes": len(files[EDIT]), "cost": _cost(edit, model.cost.since(before)),
        # After a kill the training went on: the manifest knows all of its time.
        "fit_seconds": max(seconds, edit.manifest.seconds or 0.0),
    }  # fmt: skip


def _cost(edit: Any, counted: Mapping[str, int]) -> dict[str, int]:
    return dict(edit.manifest.cost) or dict(counted)


def _arm(cell: Cell, bench: Bench, store: Store) -> Arm:
    if cell.arm == "original":
        return Arm("original", bench.model, lift=True)
    if cell.arm == "never":
        return Arm("never", bench.never, lift=True)
    from ...edit import Edit

    (fit, *_) = cell.needs
    refused = store.read(fit)["result"].get("refused")
    if refused is not None:
        raise Refused(f"not erased: {refused}")
    return Arm("erased", bench.model, edits=(Edit.load(store.place(fit) / EDIT),))


# -- measures --------------------------------------------------------------------------------------


def _measures(cell: Cell, bench: Bench, store: Store, files: dict[str, bytes]) -> dict[str, Any]:
    """Hits of an arm one by one: by name, by other routes, on kept concepts; distance to the original."""
    from safetensors.numpy import load_file, save

    arm = _arm(cell, bench, store)
    before = arm.model.cost.snapshot()
    seen = _refusing(
        lambda: observe(
            arm, cell.case.sets, bench.judge, cache=None, options={}, batch=bench.options.batch, shown=0
        )
    )  # fmt: skip
    kept = seen.kept()
    lost = [not known for part in kept.values() for known in part.recognisable]
    wrong = [hit for part in kept.values() for hit in part.mistaken]
    result: dict[str, Any] = {
        "target": _bits(seen.target),
        "routes": {route: _bits(part) for route, part in seen.routes().items()},
        "kept": {name: _bits(part) for name, part in kept.items()},
        "lost": [sum(lost), len(lost)],
        "mistaken": [sum(wrong), len(wrong)],
        "frechet": None,
        "cost": arm.model.cost.since(before),
    }
    features = _features(kept.values())
    if features is not None:
        if cell.arm == "original":
            files[FEATURES] = save({"kept": features})
        elif (store.place(cell.needs[-1]) / FEATURES).is_file():
            theirs = load_file(store.place(cell.needs[-1]) / FEATURES)["kept"]
            result["frechet"] = frechet_of(features, theirs, bench.judge.id).value
    return result


def _bits(part: Part) -> dict[str, Any]:
    return packed(part.hit, part.texts)


def _features(parts: Any) -> np.ndarray | None:
    found = [matrix for part in parts if (matrix := part.matrix()) is not None]
    whole = np.concatenate(found).astype(np.float32) if found else None
    return whole if whole is not None and len(whole) >= 2 else None


# -- attacks ---------------------------------------------------------------------------------------


def _attack(cell: Cell, bench: Bench, store: Store, files: dict[str, bytes]) -> dict[str, Any]:
    """Hits before and after one attack, prompt by prompt, and along its budget where it says so."""
    arm = _arm(cell, bench, store)
    # Pictures of earlier cells would be free for this one and for no other: rows are to be comparable.  Searches that
    # read nothing of the arm are not run again for each; what they cost counts for each.
    SHARED.clear(searches=False)
    with arm.ready() as model:
        attempts: Attempts = _refusing(
            lambda: cell.attack.attack(
                model, cell.case.concept, bench.judge, bench.options.allowance, prompts=cell.case.attacked,
                reference=bench.model, seed=cell.case.seed,
            )
        )  # fmt: skip
    texts = [item.prompt.text for item in attempts.items]
    return {
        "pre": packed([item.pre_hit for item in attempts.items], texts),
        "hit": packed([item.hit for item in attempts.items], texts),
        "skipped": sum("skipped" in item.details for item in attempts.items),
        "teaches": attempts.teaches,
        "typed": any(item.text is not None for item in attempts.items),
        "curve": _curve(attempts),
        "curve_of": attempts.items[0].details.get("curve_of") if attempts.items else None,
        "cost": _with_recalled(attempts.cost),
    }


def _with_recalled(cost: Mapping[str, int]) -> dict[str, int]:
    """The rows of an attack as if it had run alone."""
    whole = Counter[str](cost)
    whole.update({name: round(rows) for name, rows in SHARED.recalled.items() if name != "seconds"})
    return dict(sorted(whole.items()))


def _curve(attempts: Attempts) -> dict[str, str] | None:
    """Share of the budget (steps, rows) -> hits of all items, where every item has the same points."""
    curves = [item.details.get("curve") for item in attempts.items]
    if not curves or not all(isinstance(curve, Mapping) and curve for curve in curves):
        return None
    points: Sequence[Any] = list(curves[0])  # type: ignore[arg-type]
    if any(list(curve) != points for curve in curves):  # type: ignore[arg-type]
        return None
    return {
        str(point): "".join("1" if curve[point] else "0" for curve in curves)  # type: ignore[index]
        for point in points
    }


WORK: Mapping[str, Callable[[Cell, Bench, Store, dict[str, bytes]], dict[str, Any]]] = {
    "fit": _fit, "measures": _measures, "attack": _attack,
}  # fmt: skip
