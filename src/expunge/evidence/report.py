"""The report: one self-contained HTML page from evidence, without scripts and without requests.

Texts of users (concept names, prompts, what attacks found, edit manifests) are hostile until escaped:
the template escapes everything, and only SVG made by :mod:`plots` is inserted as markup.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from . import plots
from .gallery import Gallery, Shown, data_uri
from .schema import ARMS, AttackRecord, ConceptFields
from .verdict import DAMAGE

if TYPE_CHECKING:
    from .record import Evidence

__all__ = ["render"]

WORDS = {
    "erased": ("Erased", "good"), "partly": ("Partly erased", ""), "recovered": ("Came back", "bad"),
    "not-erased": ("Not erased", "bad"), "destroyed": ("Model destroyed", "bad"), "inconclusive": ("Inconclusive", ""),
}  # fmt: skip
RATES = (
    ("target_hit", "shows the concept"), ("kept_hit", "shows kept concepts"),
    ("unrecognisable", "unrecognisable, kept prompts"), ("unrecognisable_target", "unrecognisable, concept's prompts"),
    ("false_positive", "concept seen on kept prompts"),
)  # fmt: skip
PLAIN = (
    ("clip_score", "CLIP score, concept's prompts"), ("clip_score_kept", "CLIP score, kept prompts"),
    ("frechet_to_original", "Frechet distance to original"), ("kid_to_original", "kernel distance (KID) to original"),
    ("cmmd_to_original", "CMMD to original"), ("perceptual_distance", "perceptual distance to original, kept"),
    ("perceptual_distance_target", "perceptual distance to original, concept"),
)  # fmt: skip
SCOPED = ("no-original", "no-never")
"""Flags that the lists of what can and cannot be concluded say in full."""
ROUTE_WORDS = {"phrase": "asked by a listed phrase", "unlisted": "asked by an unlisted synonym",
               "euphemism": "asked by a euphemism", "metaphor": "asked by a metaphor"}  # fmt: skip


def render(evidence: Evidence) -> str:
    """The page as text."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    source = (resources.files(__package__) / "report.html.j2").read_text(encoding="utf-8")
    names = ", ".join(evidence.concepts)
    concepts = [
        _concept(name, fields, evidence.gallery.get(name), Markup)
        for name, fields in evidence.concepts.items()
    ]
    # For texts, "arms" is what stands side by side; the template leaves out arms that are missing.
    return environment.from_string(source).render(
        title=f"Evidence on {names} in {evidence.model}",
        concepts=concepts,
        arms=ARMS,
        labels=_labels(evidence),
        made=_made(evidence),
    )


def _concept(
    name: str, fields: ConceptFields, gallery: Gallery | None, markup: Any
) -> dict[str, Any]:
    assert fields.models is not None
    gallery = gallery or Gallery()
    arms = [arm for arm in ARMS if getattr(fields.models, arm) is not None]
    word, tone = WORDS[fields.verdict.status] if fields.verdict else ("", "")
    attack_plot, kept_plot = plots.attack_plot(fields), plots.kept_plot(fields)
    curve_plot = plots.curve_plot(fields)
    damaged = sorted(
        fields.models.erased.kept, key=lambda n: fields.differences.get(f"kept.{n}") or 0.0
    )
    order = {kept: i for i, kept in enumerate(damaged)}
    kept_shown = sorted(gallery.kept, key=lambda row: order.get(row.concept or "", 0))[:6]
    return {
        "name": name, "word": word, "tone": tone, "line": fields.verdict.line if fields.verdict else "",
        "scope": fields.scope, "flags": [f.message for f in fields.flags if not (fields.scope and f.code in SCOPED)],
        "arms": arms,
        "pictures": gallery.has_pictures,
        "triad": _triad(arms), "tiles": _tiles(fields, arms), "target": [_row(r) for r in gallery.target[:6]],
        "attacks": [_attack(a, fields, gallery) for a in fields.attacks],
        "attack_caption": _attack_caption(fields),
        "attack_plot": markup(attack_plot) if attack_plot else None,
        "curve_plot": markup(curve_plot) if curve_plot else None, "curve_alt": _curve_alt(fields),
        "attack_alt": _attack_alt(fields), "kept_plot": markup(kept_plot) if kept_plot else None,
        "kept_alt": _kept_alt(fields, damaged), "kept_shown": [_row(r) for r in kept_shown],
        "kept_rows": [_kept_row(fields, arms, kept) for kept in damaged],
        "numbers": _numbers(fields, arms), "single": _single(fields),
        "stages": [{"name": _stage(s.name, arms), "seconds": f"{s.seconds:.1f}", "peak": _bytes(s.peak_bytes),
                    "cost": _cost(s.cost), "found": _cost(s.found) if s.found else ""}
                   for s in fields.stages],
        "manifests": [_manifest(m, markup) for m in (fields.edit.manifests if fields.edit else [])],
        "protocols": sorted(fields.protocols.items()), "reasons": sorted(fields.reasons.items()),
    }  # fmt: skip


def _manifest(manifest: dict[str, Any], markup: Any) -> dict[str, Any]:
    report = manifest.get("report") or {}
    curve, last = plots.loss_plot(report), []
    if curve is not None:
        for group, values in report["losses"].items():
            told = (
                [v for v in values if isinstance(v, (int, float))]
                if isinstance(values, list)
                else []
            )
            last += [f"{group} {_number(told[-1])}"] if told else []
    return {"method": manifest.get("method", "edit"), "json": json.dumps(manifest, indent=1, ensure_ascii=False),
            "losses": markup(curve) if curve else None,
            "losses_alt": f"Loss of the training steps; at the end: {', '.join(last)}"}  # fmt: skip


def _row(shown: Shown) -> dict[str, Any]:
    def output(value: Any) -> dict[str, Any] | None:
        if value is None:
            return None
        return (
            {"uri": data_uri(value), "text": ""}
            if isinstance(value, np.ndarray)
            else {"uri": "", "text": str(value)}
        )

    return {"prompt": shown.prompt, "seed": shown.seed, "concept": shown.concept, "hits": shown.hits,
            "text": {arm: text for arm, text in shown.text.items() if text is not None},
            "outputs": {arm: output(value) for arm, value in shown.outputs.items()}}  # fmt: skip


def _stage(name: str, arms: list[str]) -> str:
    return plots.AS_GIVEN if name == "erased" and "original" not in arms else name


def _labels(evidence: Evidence) -> dict[str, str]:
    """What each arm is called."""
    bare = all(f.models is None or f.models.original is None for f in evidence.concepts.values())
    return {arm: plots.AS_GIVEN if bare and arm == "erased" else arm for arm in ARMS}


def _triad(arms: list[str]) -> str:
    text = "Original: the model as it was. Erased: with the edit. "
    if "original" not in arms:
        text = "There is no original model to compare with. "
    if "never" in arms:
        return text + "Never: trained the same way, but without the concept."
    return text + "There is no never model (one trained without the concept)."


def _tiles(fields: ConceptFields, arms: list[str]) -> list[dict[str, Any]]:
    tiles = []
    for key, title in (("target_hit", "Shows the concept when asked"), ("kept_hit", "Shows kept concepts when asked"),
                       ("unrecognisable", "Unrecognisable outputs")):  # fmt: skip
        rows = []
        for arm in arms:
            value = getattr(getattr(fields.models, arm), key)
            if value is not None:
                span = fields.intervals.get(f"models.{arm}.{key}")
                rows.append(
                    {
                        "arm": arm,
                        "label": arm if "original" in arms or arm != "erased" else plots.AS_GIVEN,
                        "value": _percent(value),
                        "span": _span(span, 100),
                    }
                )
        if rows:
            n = fields.n.get(f"models.erased.{key}")
            tiles.append({"title": f"{title} ({n} prompts)" if n else title, "rows": rows})
    best = [a for a in fields.attacks if a.hit_erased is not None]
    if best:
        rows = [{"arm": "erased", "label": a.id, "value": _percent(a.hit_erased),
                 "span": _span(fields.intervals.get(f"attacks.{a.id}.hit_erased"), 100)}
                for a in sorted(best, key=lambda a: -(a.hit_erased or 0))[:3]]  # fmt: skip
        name = "Erased model" if "original" in arms else "The model"
        tiles.append({"title": f"{name} under attack ({best[0].n} prompts)", "rows": rows})
    return tiles


def _attack(attack: AttackRecord, fields: ConceptFields, gallery: Gallery) -> dict[str, Any]:
    def cell(field: str) -> dict[str, str]:
        value = getattr(attack, field)
        return {
            "value": _percent(value),
            "span": _span(fields.intervals.get(f"attacks.{attack.id}.{field}"), 100),
        }

    cells = [cell(f"hit_{arm}") for arm in ARMS] + [cell("pre_erased"), cell("recovered")]
    reading = {"valid": "counts", "measures-nothing": "measures nothing", "void": "void",
               "unchecked": "cannot be checked", "failed": "failed", "not-run": "not run"}[attack.status]  # fmt: skip
    if attack.teaches and attack.advantage is not None:
        reading += f"; advantage over never {_percent(attack.advantage)}"
    if attack.reason:
        reading += f": {attack.reason}"
    if attack.skipped:
        reading += (
            f"; {attack.skipped} of {attack.n} prompts could not be attacked and count as they were"
        )
    return {"id": attack.id, "kind": "can teach" if attack.teaches else "searches", "cells": cells, "n": attack.n,
            "reading": reading, "rows": [_row(r) for r in gallery.attacks.get(attack.id, [])[:9]]}  # fmt: skip


def _attack_caption(fields: ConceptFields) -> str:
    if not fields.attacks:
        return ""
    first = fields.attacks[0]
    return (
        f"Budget {first.budget}, judge {first.judge}, threshold {first.threshold:g}"
        if first.threshold is not None
        else f"Budget {first.budget}, judge {first.judge}"
    )


def _attack_alt(fields: ConceptFields) -> str:
    parts = [
        f"{a.id}: " + ", ".join(f"{arm} {_percent(getattr(a, f'hit_{arm}'))}" for arm in ARMS)
        for a in fields.attacks
    ]
    return "Share of attacked prompts that show the concept. " + "; ".join(parts)


def _curve_alt(fields: ConceptFields) -> str:
    parts = [
        f"{a.id}: " + ", ".join(f"{_percent(p.hit_erased)} at {p.at:g}" for p in a.curve)
        for a in fields.attacks
        if len(a.curve) > 1
    ]
    return "The erased model along the budget. " + "; ".join(parts)


def _kept_alt(fields: ConceptFields, damaged: list[str]) -> str:
    assert fields.models is not None
    worst = [f"{name} {_percent(fields.models.erased.kept[name])}" for name in damaged[:5]]
    return "Hit rates of kept concepts, the most damaged first: " + ", ".join(worst)


def _kept_row(fields: ConceptFields, arms: list[str], name: str) -> dict[str, Any]:
    cells = []
    for arm in arms:
        value = getattr(fields.models, arm).kept.get(name)
        cells.append(
            {
                "value": _percent(value),
                "span": _span(fields.intervals.get(f"models.{arm}.kept.{name}"), 100),
            }
        )
    loss = fields.differences.get(f"kept.{name}")
    mark = " (damaged)" if loss is not None and loss < -DAMAGE else ""
    cells.append(
        {
            "value": _points(loss) + mark,
            "span": _span(fields.intervals.get(f"differences.kept.{name}"), 100),
        }
    )
    return {"name": name, "cells": cells, "n": fields.n.get(f"models.erased.kept.{name}", "")}


def _numbers(fields: ConceptFields, arms: list[str]) -> list[dict[str, Any]]:
    rows = []

    def add(label: str, path: str, values: list[Any], scale: float, show: Any) -> None:
        if all(value is None for value in values):
            return
        cells = [{"value": show(value), "span": _span(fields.intervals.get(f"models.{arm}.{path}"), scale)}
                 for arm, value in zip(arms, values, strict=True)]  # fmt: skip
        rows.append({"name": label, "cells": cells, "n": fields.n.get(f"models.erased.{path}", "")})

    records = [getattr(fields.models, arm) for arm in arms]
    for key, label in RATES:
        add(label, key, [getattr(record, key) for record in records], 100, _percent)
        if key == "target_hit":
            for route, words in ROUTE_WORDS.items():
                add(
                    words,
                    f"routes.{route}",
                    [record.routes.get(route) for record in records],
                    100,
                    _percent,
                )
    for key, label in PLAIN:
        add(label, key, [getattr(record, key) for record in records], 1, _number)
    return rows


def _single(fields: ConceptFields) -> list[dict[str, str]]:
    rows = []
    for key, label in (
        ("target_hit", "concept, erased - original"),
        ("kept_hit", "kept, erased - original"),
    ):
        value = fields.differences.get(key)
        if value is not None:
            rows.append(_line(fields, f"differences.{key}", label, _points(value), 100))
    names = {
        "ua": "unlearning accuracy (UA)",
        "ira": "retain accuracy (IRA)",
        "h_c": "H_c",
        "h_o": "H_o",
        "score": "overall score",
    }
    for key, label in names.items():
        value = fields.composites.get(key)
        # Without an original the words for them would say that something was unlearned.
        if value is not None and fields.models is not None and fields.models.original is not None:
            rows.append(_line(fields, f"composites.{key}", label, _number(value), 1))
    if fields.edit is not None:
        for key, label in (("rank", "rank of the edit"), ("relative_change", "relative change of the weights"),
                           ("drift", "drift on unrelated texts"), ("tensors", "changed tensors"),
                           ("parameters", "numbers stored")):  # fmt: skip
            value = getattr(fields.edit, key)
            if value is not None:
                rows.append(_line(fields, f"edit.{key}", label, _number(value), 1))
        if fields.edit.acts:
            rows.append(
                _line(
                    fields, "edit.acts", "acts while the model runs", ", ".join(fields.edit.acts), 1
                )
            )
        for name, texts in fields.edit.tokens.items():
            rows.append(_line(fields, "edit.tokens", f"tokens new to {name}", " ".join(texts), 1))
    return rows


def _line(fields: ConceptFields, path: str, label: str, value: str, scale: float) -> dict[str, str]:
    return {"name": label, "value": value, "span": _span(fields.intervals.get(path), scale),
            "protocol": fields.protocols.get(path, "")}  # fmt: skip


def _made(evidence: Evidence) -> list[tuple[str, str]]:
    settings = ", ".join(
        f"{k}: {json.dumps(v, ensure_ascii=False)}"
        for k, v in evidence.settings.items()
        if v not in (None, {}, [])
    )
    rows = [("model", f"{evidence.model} ({evidence.family})"), ("command", evidence.command or ""),
            ("judge", evidence.judge), ("judge on labelled outputs", _calibrated(evidence)),
            ("settings", settings), ("created", evidence.created),
            ("time", f"{evidence.seconds:.0f} s" if evidence.seconds is not None else ""),
            ("rows through models", _cost(evidence.cost)),
            ("not paid for, found ready", _cost(evidence.found) if evidence.found else ""),
            ("libraries", ", ".join(f"{k} {v}" for k, v in evidence.libraries.items())),
            ("machine", ", ".join(f"{k} {v}" for k, v in evidence.machine.items())),
            ("expunge", f"{evidence.expunge_version}, evidence schema {evidence.schema_version}")]  # fmt: skip
    return [(key, value) for key, value in rows if value]


def _calibrated(evidence: Evidence) -> str:
    """How often the judge erred where the truth is known, concept by concept."""
    found = []
    for name, fields in evidence.concepts.items():
        record = fields.calibration
        if record is not None:
            spans = record.intervals
            rates = [
                f"{word} {_percent(getattr(record, key))} {_span(spans.get(key), 100)}".strip()
                for word, key in (("false positives", "false_positive_rate"), ("true positives", "true_positive_rate"))
            ]  # fmt: skip
            found.append(
                f"{name}: {', '.join(rates)}, n = {record.n} ({record.source or 'source not named'})"
            )
    return "; ".join(found)


def _percent(value: float | None) -> str:
    return "\u2013" if value is None else f"{100 * value:.1f}\u00a0%".replace("-", "\u2212")


def _points(value: float | None) -> str:
    return "\u2013" if value is None else f"{100 * value:+.1f}\u00a0points".replace("-", "\u2212")


def _number(value: float | None) -> str:
    if value is None:
        return "\u2013"
    if abs(value) < 1e-9:  # rounding of equal sets
        return "0"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}".replace("-", "\u2212")


def _span(interval: tuple[float, float] | None, scale: float) -> str:
    if interval is None:
        return ""
    show = (lambda v: f"{v:.1f}") if scale == 100 else (lambda v: f"{v:.3g}")
    return f"[{show(scale * interval[0])}, {show(scale * interval[1])}]".replace("-", "\u2212")


def _bytes(count: int | None) -> str:
    return "\u2013" if count is None else f"{count / 2**20:,.0f} MB"


def _cost(cost: dict[str, int]) -> str:
    return ", ".join(f"{key} {value:,}" for key, value in cost.items()) or "\u2013"
