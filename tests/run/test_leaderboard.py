"""The leaderboard: its numbers against hand values, what attacks are worth, ranks, and its pages."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expunge.errors import RunError
from expunge.method.intervals import wilson
from expunge.run.sweep.board import board
from expunge.run.sweep.drawing import scatter
from expunge.run.sweep.numbers import Estimate, Table, harmonic, mean
from expunge.run.sweep.page import concepts, head, markdown, number, order, page, stability, write
from expunge.run.sweep.record import Bits, Record, Row, Told, read
from expunge.run.sweep.record import write as write_record

N = 20


def bits(hits: int, n: int = N) -> Bits:
    return Bits(hits="1" * hits + "0" * (n - hits))


def measures(
    concept: str, arm: str, kept: int, seed: int = 0, target: int = 0, mistaken: int = 0
) -> Row:
    return Row(
        kind="measures", concept=concept, seed=seed, arm=arm, target=bits(target), routes={"phrase": bits(target)},
        kept={"a": bits(kept), "b": bits(kept)}, lost=(2, 40), mistaken=(mistaken, 40), cost={"denoiser.forward": 800},
    )  # fmt: skip


def attacked(
    concept: str, arm: str, attack: str, hit: int, pre: int = 0, seed: int = 0, teaches: bool = False,
    curve: dict[str, int] | None = None, last: bool = False, typed: bool = True,
) -> Row:  # fmt: skip
    """``hit`` of 20 prompts, the first ones (or the last)."""
    hits = bits(hit)
    if last:
        hits = Bits(hits=hits.hits[::-1])
    return Row(
        kind="attack", concept=concept, seed=seed, arm=arm, attack=attack, hit=hits, pre=bits(pre), teaches=teaches,
        typed=typed,
        curve=None if curve is None else {k: bits(v).hits for k, v in curve.items()}, seconds=10.0,
        curve_of=None if curve is None else "updates",
        cost={"denoiser.forward": 30_000, "denoiser.backward": 10_000, "encoder.forward": 7},
    )  # fmt: skip


def recorded(rows: list[Row], **changes: Any) -> Record:
    options = {"concepts": sorted({r.concept for r in rows}), "seeds": sorted({r.seed for r in rows}), "n": N,
               "kept_n": 20, "attack_n": N, "budget": "world", "split": "test"}  # fmt: skip
    arms = dict.fromkeys(r.arm for r in rows if r.arm not in ("original", "never"))
    found = {"model": "world", "judge": "oracle/1", "options": options, "erasers": tuple(arms),
             "attacks": tuple(dict.fromkeys(r.attack for r in rows if r.attack)), "cells": len(rows),
             "rows": tuple(rows)} | changes  # fmt: skip
    return Record(**found)


def triad(
    concept: str, attack: str, original: int, never: int, seed: int = 0, **more: Any
) -> list[Row]:
    return [attacked(concept, "original", attack, original, seed=seed, **more),
            attacked(concept, "never", attack, never, seed=seed, **more)]  # fmt: skip


def controls(concept: str, seed: int = 0, mistaken: int = 0) -> list[Row]:
    return [
        measures(concept, "original", 20, seed, 18),
        measures(concept, "never", 20, seed, 0, mistaken),
    ]


@pytest.fixture(scope="module")
def full() -> Record:
    """Two erasers, three searching attacks of which one fools the judge, one that teaches, two seeds."""
    rows = []
    for seed in (0, 1):
        rows += controls("star", seed)
        rows += [*triad("star", "gcg", 20, 0, seed), *triad("star", "pez", 20, 0, seed)]
        rows += triad("star", "fool", 20, 12, seed)
        rows += triad("star", "inversion", 20, 10, seed, teaches=True, curve={"10": 5, "20": 10})
        for arm, hits, kept in (("uce", 16, 19), ("rece", 4 + 2 * seed, 15)):
            rows.append(
                Row(
                    kind="fit",
                    concept="star",
                    seed=seed,
                    arm=arm,
                    cost={"denoiser.forward": 10},
                    seconds=2.0,
                    bytes=99,
                )
            )
            rows.append(measures("star", arm, kept, seed, target=1))
            rows.append(attacked("star", arm, "gcg", hits, 1, seed))
            rows.append(attacked("star", arm, "pez", hits // 2, 1, seed, last=True))
            rows.append(attacked("star", arm, "fool", 20, 1, seed))
            rows.append(attacked("star", arm, "inversion", 15, 1, seed, True, {"10": 10, "20": 15}))
    return recorded(rows)


@pytest.fixture(scope="module")
def made(full: Record) -> dict[str, Any]:
    return board(full)


# -- numbers ---------------------------------------------------------------------------------------


def test_recovered_is_the_way_back_from_never_to_original() -> None:
    rows = [*triad("star", "gcg", 18, 2), attacked("star", "uce", "gcg", 10)]
    found = Table(recorded(rows)).recovered("star", "uce", ["gcg"])
    assert (
        found is not None
        and found.value == pytest.approx((0.5 - 0.1) / (0.9 - 0.1))
        and found.n == N
    )
    assert found.interval is not None and found.interval[0] < 0.5 < found.interval[1]
    # Equal to the paired bootstrap of an audit, up to the draws.
    from expunge.evidence.statistics import recovered

    hits = [row.hit.values() for row in (rows[2], rows[0], rows[1]) if row.hit]
    value, span = recovered(*hits, list(range(N)))
    assert value == pytest.approx(found.value) and span == pytest.approx(found.interval, abs=0.06)
    small = [*triad("star", "gcg", 3, 2), attacked("star", "uce", "gcg", 2)]
    assert Table(recorded(small)).recovered("star", "uce", ["gcg"]) is None


def test_any_attack_joins_hits_prompt_by_prompt_on_all_arms() -> None:
    rows = [*triad("star", "a", 20, 0), *triad("star", "b", 20, 0)]
    rows += [attacked("star", "uce", "a", 6), attacked("star", "uce", "b", 5, last=True)]
    table = Table(recorded(rows))
    found = table.recovered("star", "uce", ["a", "b"])
    assert found is not None and found.value == pytest.approx(11 / 20)
    assert table.recovered("star", "uce", ["a", "c"]) is None


def test_only_seeds_that_all_arms_have_are_compared() -> None:
    rows = [
        *triad("star", "a", 20, 0),
        attacked("star", "uce", "a", 10),
        attacked("star", "uce", "a", 20, seed=1),
    ]
    found = Table(recorded(rows)).recovered("star", "uce", ["a"])
    assert found is not None and found.value == 0.5 and found.n == N


def test_kept_is_what_is_left_of_the_originals_hits() -> None:
    rows = [*controls("star"), measures("star", "uce", 15)]
    found = Table(recorded(rows)).kept("star", "uce")
    assert found is not None and found.value == pytest.approx(0.75)
    low, high = found.interval or (0, 0)
    assert 0.55 < low < 0.75 < high < 0.92  # 40 prompts: 0.75 +- 0.13
    assert Table(recorded(rows)).plain("star", "original").value == pytest.approx(0.9)  # type: ignore[union-attr]


def test_seeds_that_disagree_widen_the_interval() -> None:
    def width(first: int, second: int) -> float:
        rows = [*triad("star", "a", 20, 0), *triad("star", "a", 20, 0, 1)]
        rows += [attacked("star", "uce", "a", first), attacked("star", "uce", "a", second, seed=1)]
        found = Table(recorded(rows)).recovered("star", "uce", ["a"])
        assert found is not None and found.interval is not None and found.value == 0.5
        return found.interval[1] - found.interval[0]

    assert width(0, 20) > 0.9 > 0.5 > width(10, 10)


def test_small_groups_weigh_as_much_in_the_resamples_as_in_the_value() -> None:
    rows = controls("star")
    few, many = Bits(hits="1" * 4), Bits(hits="0" * 20)
    row = rows[0].model_copy(update={"routes": {"euphemism": few, "phrase": many}})
    found = Table(recorded([row, rows[1]])).routes("star", "original")
    # Of 24 prompts, pooled, a sixth shows it: the interval was around that, far below the value.
    assert (
        found is not None
        and found.value == 0.5
        and found.draws.mean() == pytest.approx(0.5, abs=0.05)
    )
    assert found.interval is not None and found.interval[0] < 0.5 < found.interval[1]


def test_means_and_harmonic_means_carry_their_resamples() -> None:
    one, two = (Estimate(v, np.full(3, v), 5) for v in (0.5, 1.0))
    both = mean([one, None, two])
    assert both is not None and both.value == 0.75 and both.n == 10 and mean([None]) is None
    score = harmonic(one, two)
    assert (
        score is not None
        and score.value == pytest.approx(2 / 3)
        and score.draws == pytest.approx(2 / 3)
    )
    assert harmonic(one, Estimate(-0.2, np.full(3, -0.2))).value == 0  # type: ignore[union-attr]
    assert Estimate(0.1, np.full(3, np.nan)).interval is None


# -- attacks ---------------------------------------------------------------------------------------


def test_attacks_are_judged_by_never_original_and_weak_erasers(made: dict[str, Any]) -> None:
    state = {a["label"]: a for a in made["attacks"]}
    assert state["gcg"]["status"] == "valid" and state["gcg"]["weak"] == ["uce", "rece"]
    assert state["fool"]["status"] == "measures-nothing" and "60%" in state["fool"]["reason"]
    assert state["fool"]["recovered"] is None
    assert state["inversion"]["status"] == "valid" and state["inversion"]["recovered"] is None
    assert state["inversion"]["advantage"]["value"] == pytest.approx(0.25)
    assert [(p["point"], p["advantage"]["value"]) for p in state["inversion"]["curve"]] == [
        ("10", 0.25),
        ("20", 0.25),
    ]
    assert state["inversion"]["curve_of"] == "updates" and state["gcg"]["curve_of"] is None
    assert "| updates | advantage |" in markdown(made, None)
    assert '<th scope="col">updates</th>' in page(made)
    older = {**made, "attacks": [{**a, "curve_of": None} for a in made["attacks"]]}
    assert "| point of the budget | advantage |" in markdown(older, None)
    assert [a["label"] for a in made["attacks"]] == ["gcg", "pez", "fool", "inversion"]
    assert state["gcg"]["rows_per_prompt"] == 2_000 and state["gcg"]["seconds_per_prompt"] == 0.5


def one_attack(*rows: Row, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = board(
        recorded([*controls("star"), measures("star", "uce", 19), *rows], **changes)
    )["attacks"][0]
    return found


def test_an_attack_that_helps_no_eraser_measures_nothing() -> None:
    idle = one_attack(*triad("star", "a", 20, 0), attacked("star", "uce", "a", 9, pre=9))
    assert idle["status"] == "measures-nothing" and "no eraser" in idle["reason"]
    works = one_attack(*triad("star", "a", 20, 0), attacked("star", "uce", "a", 15, pre=9))
    assert works["status"] == "valid" and works["weak"] == ["uce"]


def test_an_attack_that_fails_on_the_original_or_has_no_never_says_so() -> None:
    void = one_attack(*triad("star", "a", 1, 0), attacked("star", "uce", "a", 1))
    assert void["status"] == "void" and "original too" in void["reason"]
    alone = [attacked("star", "original", "a", 20), attacked("star", "uce", "a", 10)]
    unchecked = one_attack(*alone, without={"star": "it has none"})
    assert unchecked["status"] == "unchecked" and unchecked["reason"] == "star: it has none"
    said = Row(
        kind="attack", concept="star", seed=0, arm="original", attack="a", refused="no <b>U-Net</b>"
    )
    refused = one_attack(said, attacked("star", "uce", "a", 10))
    assert (
        refused["status"] == "unchecked"
        and "refuses the original: no <b>U-Net</b>" in refused["reason"]
    )


def test_a_judges_own_errors_do_not_condemn_an_attack() -> None:
    rows = [
        measures("star", "original", 20),
        measures("star", "never", 20, mistaken=8),
        measures("star", "uce", 20),
    ]
    rows += [*triad("star", "a", 20, 6), attacked("star", "uce", "a", 15)]
    assert (
        board(recorded(rows))["attacks"][0]["status"] == "valid"
    )  # 30 % on never, of which 20 % are the judge's
    rows[1] = measures("star", "never", 20)
    assert board(recorded(rows))["attacks"][0]["status"] == "measures-nothing"


def test_the_order_says_where_a_lead_is_clear(made: dict[str, Any]) -> None:
    assert [one["label"] for one in made["order"]] == ["gcg", "pez"]
    assert made["order"][0]["clear"] and made["order"][0]["lead"]["value"] == pytest.approx(
        0.2625, abs=1e-3
    )
    assert "gcg 0.53 > pez 0.26" in order(made)
    tied = [*controls("star"), measures("star", "uce", 19), *triad("star", "a", 20, 0), *triad("star", "b", 20, 0),
            attacked("star", "uce", "a", 10), attacked("star", "uce", "b", 9, last=True)]  # fmt: skip
    assert "a 0.50 \u2248 b 0.45" in order(board(recorded(tied)))


# -- erasers ---------------------------------------------------------------------------------------


def test_head_rows_join_searches_leave_out_teachers_and_name_the_strongest(
    made: dict[str, Any],
) -> None:
    first, second = made["erasers"]
    assert (first["label"], second["label"]) == ("rece", "uce")
    # uce: 16 by gcg, and 8 of the last ones by pez, of which 4 are new: all 20.
    assert second["robustness"]["value"] == pytest.approx(0.0) and second["kept"][
        "value"
    ] == pytest.approx(0.95)
    assert (
        first["robustness"]["value"] == pytest.approx(1 - (6 + 9) / 40)
        and first["kept"]["value"] == 0.75
    )
    assert first["score"]["value"] == pytest.approx(2 * 0.625 * 0.75 / 1.375, abs=1e-4)
    assert first["strongest"] == "gcg" and first["strongest_recovered"]["value"] == 0.25
    assert (
        first["attacks_run"] == first["attacks_counted"] == 2 and first["taught"]["value"] == 0.25
    )
    assert (first["fit_seconds"], first["fit_rows"], first["bytes"]) == (2.0, 10, 99)
    assert first["unrecognisable"] == 0.05


def test_ranks_are_compared_between_seeds(made: dict[str, Any]) -> None:
    found = made["stability"]
    assert found["first"] == "rece" and found["seeds"]["first_in"] == [2, 2]
    assert found["seeds"]["mean_tau"] == 1 and found["concepts"]["scores"] == {}
    assert found["first_in_resamples"] == 1
    assert "first in 100 % of the resamples. rece is first in 2 of 2 seeds" in stability(made)
    rows = []
    for seed in (0, 1):
        rows += [*controls("star", seed), *triad("star", "a", 20, 0, seed)]
        for arm, hits in (("uce", (4, 16)), ("rece", (17, 3))):
            rows += [
                measures("star", arm, 20, seed),
                attacked("star", arm, "a", hits[seed], seed=seed),
            ]
    turned = board(recorded(rows))["stability"]
    assert (
        turned["seeds"]["mean_tau"] == -1
        and turned["seeds"]["first_in"] == [1, 2]
        and turned["first_in_resamples"] < 0.9
    )
    alone = board(recorded([r for r in rows if r.seed == 0]))
    assert "One seed says nothing" in stability(alone)


def test_refusals_stand_in_the_matrix_and_beside_the_eraser() -> None:
    rows = [
        *controls("star"),
        *triad("star", "a", 20, 0),
        attacked("star", "uce", "a", 10),
        measures("star", "uce", 20),
    ]
    words = "<script>alert(1)</script> cannot"
    rows += [Row(kind="fit", concept="star", seed=0, arm="sld", refused=words),
             Row(kind="attack", concept="star", seed=0, arm="sld", attack="a",
                 refused=f"not erased: {words}")]  # fmt: skip
    found = board(recorded(rows))
    cell = next(c for c in found["matrix"] if c["eraser"] == "sld")
    assert cell["refused"] and cell["number"] is None and words in cell["reason"]
    assert (
        found["erasers"][-1]["refused"] == [f"star: {words}"]
        and found["attacks"][0]["refused"] == []
    )
    assert "<script>" not in page(found) and "&lt;script&gt;" in page(found)
    assert "<script>" not in markdown(found, None)


# -- records and pages -----------------------------------------------------------------------------


def test_records_survive_writing_and_wrong_ones_are_named(full: Record, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    write_record(full, file)
    assert read(file) == full and len(file.read_text().splitlines()) < len(full.rows) + 80
    found = json.loads(file.read_text())
    for change, words in (
        ({"schema_version": 2}, "schema_version"), ({"unknown": 1}, "unknown"), ({"rows": found["rows"] * 2}, "twice"),
        ({"rows": [{**found["rows"][0], "target": {"hits": "012"}}]}, "target.hits"),
    ):  # fmt: skip
        file.write_text(json.dumps(found | change))
        with pytest.raises(RunError, match=words):
            read(file)
    file.write_bytes(b"\xff{}")
    with pytest.raises(RunError, match="UTF-8"):
        read(file)
    with pytest.raises(RunError, match="cannot be read"):
        read(tmp_path / "none.json")


class Inert(html.parser.HTMLParser):
    """Collects what a page could do."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "link", "form", "base"):
            self.bad.append(tag)
        for name, value in attrs:
            outside = name in ("src", "href", "xlink:href") and not (value or "").startswith(
                ("#", "data:")
            )
            if name.startswith("on") or outside:
                self.bad.append(f"{tag} {name}={value}")


@pytest.fixture(scope="module")
def both() -> dict[str, Any]:
    """Two concepts, on which two erasers change places; a search, a control and one that teaches."""
    rows = []
    hits = {"star": {"uce": (4, 8), "rece": (16, 12)}, "heart": {"uce": (16, 12), "rece": (0, 4)}}
    for concept, arms in hits.items():
        rows += [*controls(concept), *triad(concept, "gcg", 20, 0), *triad(concept, "luck", 20, 0)]
        rows += triad(concept, "inversion", 20, 10, teaches=True)
        for arm, (gcg, luck) in arms.items():
            rows += [measures(concept, arm, 20), attacked(concept, arm, "gcg", gcg)]
            rows.append(attacked(concept, arm, "luck", luck))
            rows.append(attacked(concept, arm, "inversion", 15, teaches=True))
    told = Told(id="luck", label="luck", version=1, tags=("control",))
    options = {"concepts": ["star", "heart"], "seeds": [0], "n": N, "kept_n": 20, "attack_n": N}
    return board(recorded(rows, methods=(told,), options=options))


def test_each_concept_is_shown_alone_and_ranks_are_compared_between_them(
    both: dict[str, Any],
) -> None:
    assert list(both["by_concept"]) == ["star", "heart"]
    alone = {
        (concept, row["label"]): row["robustness"]["value"]
        for concept, one in both["by_concept"].items()
        for row in one["erasers"]
    }
    # A prompt counts as hit by the search or the control, so the larger of both.
    wanted = {("star", "uce"): 0.6, ("star", "rece"): 0.2, ("heart", "uce"): 0.2, ("heart", "rece"): 0.8}  # fmt: skip
    assert alone == pytest.approx(wanted)
    whole = {row["label"]: row["robustness"]["value"] for row in both["erasers"]}
    assert whole == pytest.approx({"uce": 0.4, "rece": 0.5})
    pairs = {(c["eraser"], c["attack"]): c["number"] for c in both["by_concept"]["heart"]["matrix"]}
    assert (
        pairs["rece", "gcg"]["value"] == 0.0 and pairs["rece", "gcg"]["n"] == N
    )  # this concept's prompts alone
    found = both["stability"]["concepts"]
    assert found["mean_tau"] == -1 and found["first_in"] == [1, 2]
    assert "between concepts: mean \u22121.00 (star and heart: \u22121.00)" in stability(both)


def test_a_concept_attacked_in_part_shows_no_robustness() -> None:
    rows = []
    for concept in ("heart", "star"):
        rows += [*controls(concept), measures(concept, "uce", 19)]
        for search in ("a", "b"):
            rows += [*triad(concept, search, 20, 0), attacked(concept, "uce", search, 5)]
    del rows[-1]
    (row,) = concepts(board(recorded(rows)))["rows"]
    heart, star = row["cells"][:4], row["cells"][4:]
    assert heart[0][0] == "0.75" and star[:2] == [("\u2013", "1 to be run")] * 2
    assert star[2][0] == "0.95"


def test_a_search_is_held_against_the_control_pair_by_pair(both: dict[str, Any]) -> None:
    attacks = {one["label"]: one for one in both["attacks"]}
    # gcg 4, 16, 16, 0 and luck 8, 12, 12, 4 of 20.
    assert attacks["gcg"]["over_control"]["value"] == pytest.approx(0.0)
    assert attacks["luck"]["over_control"] is None and attacks["inversion"]["over_control"] is None
    alone = {one["label"]: one for one in both["by_concept"]["star"]["attacks"]}
    assert alone["gcg"]["over_control"]["value"] == pytest.approx(0.0)


def test_pages_show_each_concept(both: dict[str, Any], made: dict[str, Any]) -> None:
    text, single = page(both), page(made)
    check = Inert()
    check.feed(text)
    assert check.bad == []
    assert "Each concept alone" in text and text.count("<details>") == 2
    assert "Each concept alone" not in single and "<details>" not in single
    words = markdown(both, None)
    assert "## Each concept alone" in words and "### heart" in words and "star: robustness" in words
    assert "Each concept alone" not in markdown(made, None)


def test_a_refusal_is_told_once_for_all_concepts_it_was_said_of() -> None:
    rows = []
    for concept in ("star", "heart"):
        rows += [*controls(concept), measures(concept, "uce", 20), *triad(concept, "gcg", 20, 0)]
        said = {"arm": "uce", "attack": "gcg", "refused": "no walk"}
        rows.append(Row(kind="attack", concept=concept, seed=0, **said))
    (attack,) = board(recorded(rows))["attacks"]
    assert attack["refused"] == ["uce (heart, star): no walk"]


def test_nothing_is_shown_as_minus_zero() -> None:
    assert number({"value": -0.001}) == "0.00" and number({"value": -0.01}) == "\u22120.01"


def test_pages_hold_the_numbers_and_do_nothing(made: dict[str, Any], tmp_path: Path) -> None:
    written = write(made, tmp_path / "leaderboard")
    assert set(written) == {"md", "html", "json", "svg"}
    text = written["html"].read_text()
    check = Inert()
    check.feed(text)
    assert check.bad == [] and "Content-Security-Policy" in text and "http://www.w3.org" in text
    for page_text in (text, written["md"].read_text()):
        for words in (
            "rece",
            "0.68",
            "measures-nothing",
            "gcg 0.53 &gt; pez" if page_text is text else "gcg 0.53 > pez",
        ):
            assert words in page_text
    assert json.loads(written["json"].read_text()) == json.loads(json.dumps(made))
    assert write(made, tmp_path / "leaderboard")["svg"].read_text() == written["svg"].read_text()


def test_hits_that_are_all_alike_reach_as_far_as_wilson() -> None:
    rows = [
        *triad("star", "a", 20, 10),
        attacked("star", "uce", "a", 20),
        attacked("star", "rece", "a", 10),
    ]
    table = Table(recorded(rows))
    found = table.recovered("star", "uce", ["a"])
    low = wilson(N, N)[0]
    # The scale is half as wide as the rates', so that the way from it is twice as far.
    assert found is not None and found.interval == pytest.approx((1 - 2 * (1 - low), 1))
    assert found.left().interval == pytest.approx((0, 2 * (1 - low)))
    varied = table.recovered("star", "rece", ["a"])
    assert varied is not None and varied.below == varied.above == 0
    whole = mean([found, found])
    assert whole is not None and whole.below == pytest.approx(2 * (1 - low) / math.sqrt(2))
    apart = found.minus(found)
    assert apart.interval == pytest.approx((-2 * (1 - low), 2 * (1 - low)))
    text = markdown(board(recorded([*rows, *controls("star"), measures("star", "uce", 15)])), None)
    assert "reaches as far as Wilson's bounds" in text
    assert wilson(0, N)[1] == pytest.approx(4 / (N + 4), abs=0.01)


def test_a_score_reaches_as_far_as_its_parts() -> None:
    flat = np.ones(10)
    half, whole = Estimate(0.5, flat / 2, 9, 0.2, 0.1), Estimate(1.0, flat, 9, 0.5, 0.0)
    found = harmonic(half, whole)
    assert found is not None and found.value == pytest.approx(2 / 3)
    assert found.below == pytest.approx(math.hypot(2 / 3 - 0.6 / 1.3, 2 / 3 - 0.5))
    assert found.above == pytest.approx(1.2 / 1.6 - 2 / 3)


def test_equal_scores_share_a_place_and_the_better_kept_stands_first() -> None:
    rows = [*controls("star"), *triad("star", "a", 20, 0)]
    for arm, hits, kept in (("uce", 20, 10), ("rece", 20, 19), ("esd", 0, 5), ("mace", 20, 15)):
        rows += [measures("star", arm, kept), attacked("star", arm, "a", hits)]
    found = head(board(recorded(rows)))
    assert [(row["label"], row["place"]) for row in found] == [
        ("esd", "1."), ("rece", "2."), ("mace", "2."), ("uce", "2."),
    ]  # fmt: skip


def test_far_ends_of_an_interval_do_not_squeeze_the_plot() -> None:
    def row(label: str, robustness: float, low: float, high: float) -> dict[str, Any]:
        return {"label": label, "pending": [], "kept": {"value": 0.9, "interval": [0.85, 0.95]},
                "robustness": {"value": robustness, "interval": [low, high]}}  # fmt: skip

    near = scatter([row("uce", 0.5, 0.0, 1.1), row("rece", 0.2, 0.0, 0.4)])
    far = scatter([row("uce", 0.5, 0.0, 3.0), row("rece", 0.2, -2.0, 0.4)])
    assert near and far and near.count("%") == far.count("%")  # the same ticks
    beyond = scatter([row("uce", 1.33, 1.0, 4.0)])
    assert beyond and "120 %" in beyond and "120 %" not in near  # a point is never cut


def test_a_board_without_numbers_is_a_page_too(tmp_path: Path) -> None:
    empty = board(recorded([measures("star", "uce", 20)], cells=9))
    assert scatter(empty["erasers"]) is None and set(write(empty, tmp_path / "l")) == {
        "md",
        "html",
        "json",
    }
    assert "Unfinished: 1 of 9" in (tmp_path / "l.md").read_text()
    assert "no order" in stability(empty) and "no order" in order(empty)


def test_what_is_still_to_be_attacked_has_no_rank(full: Record, tmp_path: Path) -> None:
    # Without its rows of gcg, which hits more, rece would come out ahead by more.
    rows = [r for r in full.rows if (r.arm, r.attack) not in (("rece", "gcg"), ("rece", "pez"))]
    found = board(full.model_copy(update={"rows": tuple(rows)}))
    assert [row["label"] for row in found["erasers"]] == ["uce", "rece"]
    assert [row["pending"] for row in found["erasers"]] == [[], ["gcg", "pez"]]
    assert found["stability"]["reason"].startswith(
        "fewer than two erasers were attacked to the end"
    )
    text = write(found, tmp_path / "l")["md"].read_text()
    assert "| 1 | `uce` |" in text and "| \u2013 | `rece` |" in text and "2 to be run" in text
    assert "rece" not in (tmp_path / "l.svg").read_text()
    # A refusal is an answer.
    said = Row(kind="attack", concept="star", seed=0, arm="rece", attack="gcg", refused="no")
    half = board(full.model_copy(update={"rows": (*rows, said)}))
    assert half["erasers"][1]["pending"] == ["gcg", "pez"]
    whole = [
        said,
        *(
            said.model_copy(update={"seed": s, "attack": a})
            for s, a in ((1, "gcg"), (0, "pez"), (1, "pez"))
        ),
    ]
    assert board(full.model_copy(update={"rows": (*rows, *whole)}))["erasers"][-1]["pending"] == []


def test_an_attack_that_ran_on_no_eraser_yet_is_not_called_worthless(full: Record) -> None:
    rows = [r for r in full.rows if r.arm in ("original", "never") or r.attack != "pez"]
    pez = next(
        a
        for a in board(full.model_copy(update={"rows": tuple(rows)}))["attacks"]
        if a["label"] == "pez"
    )
    assert (pez["status"], pez["reason"]) == ("unchecked", "it was run on no eraser yet")


def test_embeddings_stand_apart_from_texts_and_a_control_may_find_nothing() -> None:
    told = {"id": "luck", "label": "luck", "version": 1, "tags": ("control",)}
    rows = [*controls("star"), measures("star", "uce", 20), *triad("star", "text", 20, 0),
            *triad("star", "vectors", 20, 0, typed=False), *triad("star", "luck", 20, 0),
            attacked("star", "uce", "text", 5), attacked("star", "uce", "vectors", 20, typed=False),
            attacked("star", "uce", "luck", 0)]  # fmt: skip
    found = board(recorded(rows, methods=(told,)))
    (row,) = found["erasers"]
    assert row["robustness"]["value"] == 0.75 and row["deep"]["value"] == 0.0
    assert row["strongest"] == "vectors" and row["attacks_run"] == row["attacks_counted"] == 3
    luck = next(a for a in found["attacks"] if a["label"] == "luck")
    assert luck["status"] == "valid" and luck["control"] and luck["recovered"]["value"] == 0
    kinds = markdown(found, None)
    assert "searches embeddings" in kinds and "searches texts" in kinds and "| control |" in kinds
