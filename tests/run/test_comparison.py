"""The comparison: what a cell is, that it is measured once, what is recorded, and the page made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expunge import Concept, catalogue
from expunge.erase.diffusion.rece import RECE
from expunge.errors import CatalogueError, RunError, SettingError, UnsupportedModel
from expunge.method import Judge, Prompt, Verdicts
from expunge.models.base import Companions
from expunge.run import pages
from expunge.run.comparison import page, plots
from expunge.run.comparison.__main__ import main, methods
from expunge.run.comparison.units import (
    Choice,
    closed_forms,
    default_methods,
    many_case,
    read,
    table_case,
)
from expunge.run.comparison.work import Bench, Cell, measure
from expunge.testing import tiny_diffusion

OBJECTS = ("star", "circle", "square", "heart", "photo", "red", "blue", "green")
PEOPLE = ("tom", "ann")
OTHERS = ("striped", "plain")
UCE = "uce:context_prompts=0:general_prompts=0"


class Brightness(Judge):
    """Sees every concept in a bright picture."""

    id = "brightness"
    protocol = "brightness/1"
    threshold = 0.5

    def judge(self, outputs: Any, concept: Concept, prompts: Any) -> Verdicts:
        score = np.asarray(outputs, float).mean(axis=(1, 2, 3)) / 255
        return Verdicts(score >= 0.5, score, np.ones(len(score), bool))

    def features(self, outputs: Any) -> np.ndarray:
        return np.asarray(outputs, np.float32)[:, ::8, ::8].reshape(len(outputs), -1)


def concept(name: str) -> Concept | None:
    kind = "identity" if name in PEOPLE else "style" if name in OTHERS else "object"
    anchor = {"star": "circle", "circle": "square"}.get(name)
    return Concept(name, kind=kind, anchor=anchor) if name in OBJECTS + PEOPLE + OTHERS else None


def prompts(
    name: str, n: int, seed: int = 0, split: str = "test", route: str = "name"
) -> list[Prompt]:
    if route not in ("name", "phrase"):
        raise ValueError("no words of this kind")
    # Every second prompt of what is unrelated mentions an object.
    label = OBJECTS[seed % 2] if name in OTHERS else name
    return [
        Prompt(f"{route} {name} {i} {split}", 100 * seed + i, name, {"object": label if i % 2 else "none"})
        for i in range(n)
    ]  # fmt: skip


def neighbours(of: Concept) -> tuple[str, ...]:
    group = PEOPLE if of.name in PEOPLE else OBJECTS if of.name in OBJECTS else OTHERS
    return tuple(name for name in group if name != of.name)


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_diffusion()
    made.companions = Companions(
        world="tiny", never=lambda: tiny_diffusion(1), never_lacks=("star", "tom"), judge=Brightness,
        concept=concept, neighbours=neighbours, unrelated=(*OTHERS, "ann"), prompts=prompts,
    )  # fmt: skip
    return made


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EXPUNGE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results" / "comparison"


@pytest.fixture
def bench(model: Any, tmp_path: Path) -> Bench:
    return Bench(model, tmp_path / "cache")


def star(bench: Bench, arm: str, what: str = "pictures", attack: str | None = None) -> Cell:
    searched = Choice.parse(attack) if attack else None
    chosen = arm if arm in ("original", "never") else Choice.parse(arm)
    return Cell("star", what, chosen, table_case(bench.companions, "star", 0, 4), 0, 4, searched)


# -- names -----------------------------------------------------------------------------------------


def test_a_choice_reads_settings_and_prompts_and_gives_its_label_back() -> None:
    choice = Choice.parse("ring-a-bell:form=soft@7")
    assert choice == Choice("ring-a-bell", (("form", "soft"),), 7)
    assert choice.label == "ring-a-bell:form=soft"
    assert choice.described("attack")["settings"]["form"] == "soft"
    for text in ("", "uce:ridge", "uce@many"):
        with pytest.raises(SettingError, match="id:setting=value"):
            Choice.parse(text)


def test_unknown_ids_settings_and_verbs_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CatalogueError, match="'uec'"):
        methods(["uec"])
    with pytest.raises(SettingError, match="ridgy"):
        methods(["uce:ridgy=1"])
    with pytest.raises(SettingError, match="random-tokens is for attack"):
        methods(["random-tokens"])
    assert main(["--table", "star", "--methods", "uec"]) == 2
    assert "no system has the id 'uec'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--methods", "uce"])
    assert "nothing was asked for" in capsys.readouterr().err


def test_a_planned_method_is_told_in_one_sentence_and_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    planned = next(s.id for s in catalogue.systems() if not s.class_path)
    assert methods([planned, "uce"]) == [Choice("uce")]
    assert capsys.readouterr().err == f"{planned} is planned, not implemented yet; it is left out\n"
    with pytest.raises(SettingError, match="nothing to compare"):
        methods([planned])


def test_default_methods_are_the_closed_forms_and_the_fine_tunes_of_named_concepts() -> None:
    forms = {s.id for s in catalogue.systems("erase", "diffusion", "closed-form")}
    assert {choice.id for choice in closed_forms()} == forms
    ids = {choice.id for choice in default_methods()}
    tuned = {s.id: s for s in catalogue.systems("erase", "diffusion", "finetune")}
    assert forms < ids and "esd" in ids and ids - forms <= set(tuned)
    assert not any("implicit-concepts" in tuned[id].tags for id in ids - forms)
    assert all(tuned[id].class_path is not None for id in ids - forms)


# -- cases -----------------------------------------------------------------------------------------


def test_one_concept_is_asked_for_by_every_route_and_told_neighbours_are_not_measured(
    bench: Bench,
) -> None:
    case = table_case(bench.companions, "star", 0, 4)
    assert case.keep == ("circle", "square", "heart")
    assert list(case.sets) == ["target", "phrase", "neighbours", "unrelated"]
    assert list(case.sets["neighbours"]) == ["photo", "red", "blue", "green"]
    # The reserve of people does not hold an object; what is unrelated is of no erased kind.
    assert list(case.sets["unrelated"]) == ["striped", "plain", "ann"]
    with pytest.raises(SettingError, match="no concept 'sun'"):
        table_case(bench.companions, "sun", 0, 4)


def test_many_concepts_keep_the_same_sets_and_no_anchor_is_erased(bench: Bench) -> None:
    one, two = (many_case(bench.companions, "object", count, 0, 4) for count in (1, 2))
    assert [c.name for c in two.concepts] == ["star", "circle"]
    assert two.keep == one.keep == ("red", "blue", "green")
    assert one.sets["neighbours"] == two.sets["neighbours"]
    assert one.sets["unrelated"] == two.sets["unrelated"]
    # Circle is erased, so star's stand-in is the first of the told ones instead.
    assert [c.anchor for c in one.concepts] == ["circle"]
    assert [c.anchor for c in two.concepts] == ["red", "square"]
    labels = {p.labels["object"] for found in one.sets["unrelated"].values() for p in found}
    assert labels == {"none"} | ({"ann"} if "ann" in one.sets["unrelated"] else set())


def test_when_all_are_erased_only_others_are_left(bench: Bench) -> None:
    case = many_case(bench.companions, "identity", 2, 0, 4)
    assert case.keep == () and "neighbours" not in case.sets
    assert set(case.sets["unrelated"]) == {*OBJECTS[1:], *OTHERS}
    with pytest.raises(SettingError, match="the world has 1 to 2"):
        many_case(bench.companions, "identity", 3, 0, 4)


def test_another_seed_erases_other_concepts_but_the_reference_first(bench: Bench) -> None:
    names = [
        [c.name for c in many_case(bench.companions, "object", 4, seed, 4).concepts]
        for seed in range(3)
    ]
    assert all(one[0] == "star" for one in names) and len({tuple(one) for one in names}) > 1


# -- cells -----------------------------------------------------------------------------------------


def test_a_cell_is_measured_once_and_records_rates_with_intervals(
    bench: Bench, records: Path, monkeypatch: pytest.MonkeyPatch, no_shared_pictures: None
) -> None:
    cell = star(bench, UCE)
    file = measure(cell, bench)
    assert file is not None and file.parent == records and len(bench.model.edits) == 0
    entry = json.loads(file.read_text())
    assert entry["request"] == cell.request(bench) and entry["commit"] is not None
    target = entry["result"]["sets"]["target"]
    low, high = target["interval"]
    assert low <= target["rate"] <= high and target["n"] == 4
    assert target["names"]["star"]["hits"].count("1") == target["rate"] * 4
    assert entry["result"]["edit"]["rank"] >= 1 and entry["result"]["edit"]["seconds"] > 0
    assert set(entry["result"]["frechet"]) == {"neighbours", "unrelated"}

    monkeypatch.setattr(bench.model, "generate", None)  # nothing may be drawn again
    assert measure(cell, bench) is None
    other = star(bench, f"{UCE}:ridge=9.0")
    assert other.request(bench) != cell.request(bench)

    # A setting that the method got since, at the same version, is no reason to measure again.
    settings = entry["request"]["arm"]["settings"]
    settings.pop("technique")
    file.unlink()
    file.with_name("older.json").write_text(json.dumps(entry))
    assert measure(cell, bench) is None
    settings["ridge"] = 0.25
    file.with_name("older.json").write_text(json.dumps(entry))
    assert measure(cell, bench) is not None


def test_an_interrupted_run_goes_on_where_it_stopped(
    model: Any,
    bench: Bench,
    records: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_shared_pictures: None,
) -> None:
    monkeypatch.setattr("expunge.models.load", lambda name: model)
    command = ["--table", "star", "--methods", UCE, "--attacks", "none", "--pictures", "4",
               "--cache", str(bench.folder)]  # fmt: skip
    drawn = model.generate

    def stops(asked: Any, **options: Any) -> Any:
        if len(model.edits):
            raise KeyboardInterrupt
        return drawn(asked, **options)

    monkeypatch.setattr(model, "generate", stops)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert {e["request"]["arm"]["id"] for e in read()} == {"original", "never"}
    assert len(model.edits) == 0
    monkeypatch.setattr(model, "generate", drawn)
    before = model.cost.snapshot()
    assert main(command) == 0
    # Controls, fitted edit and the original's pictures are there; only the erased model draws: 4 + 4 + 4 + 6.
    assert model.cost.rows("denoiser", before) == 18 * 4 * 2
    assert len(read()) == 3
    assert main([*command, "--plan"]) == 0 and len(read()) == 3


def test_a_method_that_refuses_is_named_and_the_others_go_on(
    model: Any, tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("expunge.models.load", lambda name: model)
    command = [
        "--table",
        "star",
        "--methods",
        f"rece,{UCE}",
        "--attacks",
        "none",
        "--pictures",
        "2",
    ]
    command += ["--cache", str(tmp_path)]

    def refuses(*arguments: Any, **options: Any) -> Any:
        raise UnsupportedModel("rece: not for this one")

    monkeypatch.setattr(RECE, "erase", refuses)
    assert main(command) == 1
    assert "failed: rece: not for this one" in capsys.readouterr().out
    assert [e["request"]["arm"]["id"] for e in read()].count("uce") == 1


def test_an_attack_records_every_item(bench: Bench, records: Path) -> None:
    file = measure(star(bench, UCE, "attack", "closed-form:steps=2@3"), bench)
    assert file is not None
    result = json.loads(file.read_text())["result"]
    assert (
        result["hit"]["n"] == 3 and len(result["hit"]["hits"]) == 3 and result["teaches"] is False
    )
    broke = measure(star(bench, UCE, "attack", "closed-form:steps=900@3"), bench)
    assert broke is not None and "budget" in json.loads(broke.read_text())["result"]["failure"]


def test_a_sequence_can_be_taken_back_bit_for_bit(bench: Bench, records: Path) -> None:
    case = many_case(bench.companions, "object", 3, 0, 4, taken=True)
    file = measure(Cell("sequence", "sequence", Choice.parse(UCE), case, 0, 4), bench)
    assert file is not None and len(bench.model.edits) == 0
    result = json.loads(file.read_text())["result"]
    assert result["removal_exact"] is True and result["base_exact"] is True
    assert result["taken"] == "circle" and set(case.sets["taken"]) == {"circle"}
    assert [result["states"][s]["edit"]["edits"] for s in ("stacked", "taken back")] == [3, 2]


def test_a_sequence_of_one_leaves_nothing_when_it_is_taken_back(
    bench: Bench, records: Path
) -> None:
    case = many_case(bench.companions, "object", 1, 0, 4, taken=True)
    file = measure(Cell("sequence", "sequence", Choice.parse(UCE), case, 0, 4), bench)
    assert file is not None
    states = json.loads(file.read_text())["result"]["states"]
    assert states["stacked"]["edit"]["edits"] == 1 and states["taken back"]["edit"] is None


def test_the_check_of_exactness_can_fail(bench: Bench) -> None:
    from expunge.run.comparison import work

    base = {name: tensor.detach().clone() for name, tensor in bench.model.tensors().items()}
    case = many_case(bench.companions, "object", 2, 0, 4)
    one, two = (bench.edit(Choice.parse(UCE), (c,), (), 0) for c in case.concepts)
    with one.on(bench.model):
        assert work._equal(bench.model, work._recomputed(base, [one]))
        assert not work._equal(bench.model, work._recomputed(base, [two]))


# -- the page --------------------------------------------------------------------------------------


@pytest.fixture
def measured(bench: Bench, records: Path) -> Path:
    for arm in ("original", "never", UCE):
        measure(star(bench, arm), bench)
        measure(star(bench, arm, "attack", "random-tokens:pictures=1:steps=2@4"), bench)
    case = many_case(bench.companions, "object", 2, 0, 4)
    for many_arm in ("original", Choice.parse(UCE)):
        measure(Cell("objects", "pictures", many_arm, case, 0, 4), bench)
    return records


def rewrite(records: Path, arm: str, what: str, change: Any) -> None:
    for file in records.glob(f"star-{arm}-*.json"):
        entry = json.loads(file.read_text())
        if entry["request"]["what"] == what:
            change(entry)
            file.write_text(json.dumps(entry))


def row(text: str, arm: str, table: int = 0) -> list[str]:
    lines = [
        line for line in text.split("\n\n")[table].splitlines() if line.startswith(f"| {arm} |")
    ]
    assert len(lines) == 1
    return [cell.strip() for cell in lines[0].strip("|").split("|")]


def test_tables_show_what_was_recorded_and_what_was_not_run(measured: Path) -> None:
    def known(entry: dict[str, Any]) -> None:
        entry["result"]["sets"]["target"]["names"]["star"]["hits"] = "0001"

    rewrite(measured, "uce", "pictures", known)
    text = page.parts()["star"]
    assert row(text, f"`{UCE}`")[1] == "0.250 (0.046 to 0.699), 4"
    assert set(row(text, "`uce`")[1:]) == {page.MISSING}
    assert all(f"| `{choice.label}`" in text for choice in default_methods())
    assert page.parts()["hazard"] == page.parts()["people"] == page.NOTHING


def test_recovered_is_the_share_of_the_way_from_never_to_original(measured: Path) -> None:
    for arm, hits in (("original", "1111"), ("never", "0000"), ("uce", "0110")):
        rewrite(measured, arm, "attack", lambda e, h=hits: e["result"]["hit"].update(hits=h))
    text = page.parts()["star"]
    assert "recovered 0.50" in row(text, f"`{UCE}`", 1)[-1]
    rewrite(measured, "never", "attack", lambda e: e["result"]["hit"].update(hits="1110"))
    rewrite(measured, "never", "pictures", lambda e: e["result"].update(false_positive=0.0))
    assert "measures nothing" in row(page.parts()["star"], f"`{UCE}`", 1)[-1]
    rewrite(measured, "never", "attack", lambda e: e["request"].update(prompts="others"))
    assert "controls not run" in row(page.parts()["star"], f"`{UCE}`", 1)[-1]


def test_a_stale_version_and_development_prompts_do_not_count(measured: Path) -> None:
    rewrite(measured, "uce", "pictures", lambda e: e["request"]["arm"].update(version=0))
    rewrite(measured, "never", "pictures", lambda e: e["request"].update(split="development"))
    text = page.parts()["star"]
    assert row(text, f"`{UCE}`")[1] == row(text, "never")[1] == page.MISSING


def test_seeds_are_pooled_and_the_larger_record_of_a_seed_wins(measured: Path) -> None:
    found = json.loads(next(
        f for f in measured.glob("star-original-*.json") if '"what": "pictures"' in f.read_text()
    ).read_text())  # fmt: skip
    bits = found["result"]["sets"]["target"]["names"]["star"]
    for name, seed, pictures, hits in (("a", 0, 5, "11111"), ("b", 1, 5, "00000")):
        found["request"] |= {"seed": seed, "pictures": pictures}
        bits["hits"] = hits
        (measured / f"star-original-{name}.json").write_text(json.dumps(found))
    assert row(page.parts()["star"], "original")[1] == "0.500 (0.237 to 0.763), 10"


def test_each_seed_counts_the_one_that_it_takes_back_itself() -> None:
    target = {"names": {"ann": {"hits": "11"}, "tom": {"hits": "00"}}}
    alone = page.pooled(page._named([target, target], ["ann", "tom"], True))
    assert alone is not None and alone[::2] == (
        0.5,
        4,
    )  # both names of both seeds would be 8 pictures
    alone = page.pooled(page._named([target, target, target], ["ann", "ann", None], True))
    others = page.pooled(page._named([target, target], ["ann", "ann"], False))
    assert alone is not None and others is not None
    assert (alone[0], alone[2], others[0], others[2]) == (1.0, 4, 0.0, 4)


def test_plots_are_drawn_once_and_again_when_numbers_change(measured: Path, tmp_path: Path) -> None:
    plots.draw(tmp_path)
    file = tmp_path / page.PLOTTED["objects"]
    assert file.is_file() and not (tmp_path / page.PLOTTED["people"]).exists()
    assert page.PLOTTED["objects"] in page.parts()["objects"]
    file.touch()
    first = file.stat().st_mtime_ns
    plots.draw(tmp_path)
    assert file.stat().st_mtime_ns == first
    for one in measured.glob("objects-uce-*.json"):
        entry = json.loads(one.read_text())
        entry["result"]["frechet"]["unrelated"] = 1e4
        one.write_text(json.dumps(entry))
    plots.draw(tmp_path)
    assert file.stat().st_mtime_ns != first


def test_a_damaged_record_is_named_and_claims_do_not_read_it(records: Path) -> None:
    records.mkdir(parents=True)
    (records / "star-uce-0.json").write_text("[]")
    with pytest.raises(RunError, match=r"star-uce-0\.json"):
        read()
    assert pages.every_claim() == "No claim recorded yet."
