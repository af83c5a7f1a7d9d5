"""What an audit without an original or a never cannot say, and what it still can."""

from __future__ import annotations

from collections.abc import Iterator

from .schema import AttackRecord, ConceptFields, Scope
from .verdict import percent

__all__ = ["scope"]


def scope(fields: ConceptFields, name: str, kind: str, judge: str) -> Scope | None:
    """Both lists, one sentence an entry; ``None`` where all three models were there.

    Args:
        fields: The finished fields of one concept.
        name: The concept.
        kind: ``pictures`` or ``answers``.
        judge: Id of the judge.
    """
    assert fields.models is not None
    if fields.models.original is not None and fields.models.never is not None:
        return None
    return Scope(
        cannot=list(_cannot(fields, name, kind)), can=list(_can(fields, name, kind, judge))
    )


def _cannot(fields: ConceptFields, name: str, kind: str) -> Iterator[str]:
    assert fields.models is not None
    original, never = fields.models.original, fields.models.never
    if original is None:
        yield (
            f"Whether anything was erased: without the original, a model that never showed {name} looks the same as "
            "one that forgot it."
        )
        yield (
            "What was damaged: no change of kept concepts, no distance to the original and no drift can be given; a "
            "model that was weak before looks the same as one that was damaged."
        )
    missing = [word for word, arm in (("original", original), ("never", never)) if arm is None]
    ends = "from never to original"
    yield f"How much an attack recovered: the scale {ends} has no {' and no '.join(missing)}, so no share is given."
    if never is None:
        yield (
            f"Whether an attack brings {name} back, teaches it, or only fools the judge: that takes a model which was "
            "trained without it."
        )
    left_out = [attack for attack in fields.attacks if attack.status == "not-run"]
    if left_out:
        yield (
            "What these attacks would bring back, which were not run: "
            + "; ".join(f"{attack.id} ({attack.reason})" for attack in left_out)
            + "."
        )
    if fields.models.erased.false_positive is None and fields.calibration is None:
        yield (
            f"How often the judge errs: it was not calibrated and judged no {kind} of other concepts, so its false "
            "positives are unknown and the rates below are what it says, not what is there."
        )


def _can(fields: ConceptFields, name: str, kind: str, judge: str) -> Iterator[str]:
    assert fields.models is not None
    model = fields.models.erased
    asked = _rate(fields, "models.erased.target_hit", model.target_hit)
    yield f"How often the model shows {name} when it is asked for by name, as {judge} judges: {asked}."
    ways = [
        f"by {route} {_rate(fields, f'models.erased.routes.{route}', value)}"
        for route, value in model.routes.items()
        if value is not None
    ]
    if ways:
        yield f"The same where it is asked for otherwise: {', '.join(ways)}."
    ran = [attack for attack in fields.attacks if attack.hit_erased is not None]
    if ran:
        yield (
            "How often before and after attacks that need nothing but the model: "
            f"{'; '.join(_attacked(fields, attack) for attack in ran)}."
        )
    if model.kept_hit is not None:
        kept = _rate(fields, "models.erased.kept_hit", model.kept_hit)
        yield f"How often it shows other concepts when they are asked for: {kept}."
    if model.false_positive is not None:
        wrong = _rate(fields, "models.erased.false_positive", model.false_positive)
        yield f"How often the judge sees {name} in {kind} that ask for something else: {wrong}."
    known = fields.calibration
    if known is not None and known.false_positive_rate is not None:
        span = _span(known.intervals.get("false_positive_rate"))
        yield (
            f"How often the judge errs on {known.n} labelled {kind}: it sees {name} in "
            f"{percent(known.false_positive_rate)}{span} of those that lack it and in "
            f"{percent(known.true_positive_rate)} of those that show it. A rate that is no higher than the first "
            "cannot be told from none."
        )


def _attacked(fields: ConceptFields, attack: AttackRecord) -> str:
    after = _rate(fields, f"attacks.{attack.id}.hit_erased", attack.hit_erased)
    teaches = ", may teach" if attack.teaches else ""
    return f"{attack.id}{teaches}: {percent(attack.pre_erased)} before, {after} after"


def _rate(fields: ConceptFields, path: str, value: float | None) -> str:
    count = f", {fields.n[path]} prompts" if path in fields.n else ""
    return f"{percent(value)}{_span(fields.intervals.get(path), count)}"


def _span(interval: tuple[float, float] | None, more: str = "") -> str:
    if interval is None:
        return f" ({more.removeprefix(', ')})" if more else ""
    return f" ({100 * interval[0]:.0f} to {100 * interval[1]:.0f}\u00a0%{more})"
