"""The audit against models of which everything is known, with the controls that must fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from expunge import Concept, audit
from expunge.core.sampling import OutputCache
from expunge.errors import CatalogueError, InputError, PromptError, SettingError
from expunge.evidence import Evidence
from expunge.evidence.attacking import choose
from expunge.evidence.statistics import measures_nothing, recovered
from expunge.method import BUDGETS, Prompt

from .stubs import (
    STAR,
    ColourJudge,
    Compares,
    ConstantJudge,
    Forger,
    Painter,
    Password,
    Picky,
    Poor,
    Teacher,
    companions,
    edit,
    triad,
)


def run(**options: object) -> Evidence:
    model, change, _ = triad()
    given = {
        "attacks": [Password(), Forger(), Teacher()],
        "n": 60,
        "kept_n": 10,
        "cache": None,
        **options,
    }
    return audit(model, [change], STAR, **given)


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return run()


def test_the_rates_are_those_that_were_built_in(evidence: Evidence) -> None:
    models = evidence.models
    assert models.original.target_hit == 1 and models.never.target_hit == 0
    assert models.erased.target_hit == pytest.approx(0.05, abs=0.08)
    assert models.erased.kept == {"heart": 1.0, "cross": 1.0, "moon": 1.0}
    assert models.erased.kept_hit == 1 and models.erased.unrecognisable == 0
    assert models.erased.routes["phrase"] is not None and models.erased.routes["metaphor"] is None
    assert "models.erased.routes.metaphor" in evidence.reasons


def test_every_rate_has_n_interval_and_protocol(evidence: Evidence) -> None:
    for path in ("models.erased.target_hit", "models.never.kept_hit", "models.erased.kept.heart",
                 "differences.target_hit", "attacks.password.hit_erased", "attacks.password.recovered"):  # fmt: skip
        assert path in evidence.intervals and path in evidence.protocols and evidence.n[path] > 0, (
            path
        )
        low, high = evidence.intervals[path]
        assert low <= evidence.value(path) <= high, path


def test_recovered_counts_only_where_it_means_something(evidence: Evidence) -> None:
    found = {attack.id: attack for attack in evidence.attacks}
    assert found["password"].status == "valid" and found["password"].recovered == pytest.approx(1.0)
    assert found["password"].pre_erased < 0.3 < found["password"].hit_erased
    assert found["forger"].status == "measures-nothing" and found["forger"].recovered is None
    assert found["teacher"].teaches and found["teacher"].advantage == 0
    assert found["teacher"].status == "valid" and found["teacher"].recovered is None
    assert evidence.verdict.status == "recovered" and "password" in evidence.verdict.line
    assert {a.budget for a in evidence.attacks} == {"world"}
    assert set(found["password"].cost) == {"original", "erased", "never"}


def test_a_model_without_the_concept_gives_a_clean_verdict() -> None:
    model, change, _ = triad(star=0.0)
    found = audit(model, change, "star", attacks=[Password()], n=40, kept_n=5, cache=None)
    assert found.verdict.status == "erased" and found.attacks[0].recovered == 0
    assert found.edit.rank == 1 and found.edit.relative_change == pytest.approx(0.5)
    assert not any(flag.code == "kept-damaged" for flag in found.flags)


def test_damage_and_destruction_are_said() -> None:
    model, change, _ = triad(star=0.0, heart=0.4)
    hurt = audit(model, [change], STAR, attacks="none", n=30, kept_n=20, cache=None)
    assert {flag.code for flag in hurt.flags} == {"kept-damaged"}
    assert hurt.models.erased.kept["heart"] < 0.8 and hurt.differences["kept.heart"] < -0.2
    model, change, _ = triad(star=-1.0)
    broken = audit(model, [change], STAR, attacks="none", n=30, kept_n=5, cache=None)
    assert broken.models.erased.unrecognisable == 1 and broken.verdict.status == "destroyed"
    assert broken.composites["score"] == 0
    assert broken.frechet_to_original > 10 * hurt.frechet_to_original
    assert broken.perceptual_distance > hurt.perceptual_distance > 0


def test_an_edit_that_changes_nothing_is_at_distance_zero() -> None:
    model, change, _ = triad(star=1.0)
    found = audit(model, [change], STAR, attacks="none", n=20, kept_n=5, cache=None)
    assert (
        found.frechet_to_original == pytest.approx(0, abs=1e-3) and found.perceptual_distance == 0
    )
    assert found.differences["target_hit"] == 0 and found.verdict.status == "not-erased"


def test_a_judge_that_always_says_yes_is_flagged() -> None:
    found = run(judge=ConstantJudge(), attacks="none")
    assert "judge-constant" in {flag.code for flag in found.flags}
    assert found.verdict.status == "inconclusive"


def test_without_a_never_recovery_is_null_and_said() -> None:
    model = Painter()
    model.companions = companions(None)
    found = audit(
        model, [edit(model, star=0.05)], STAR, attacks=[Password()], n=30, kept_n=5, cache=None
    )
    assert found.models.never is None and found.attacks[0].recovered is None
    assert found.attacks[0].hit_never is None and found.attacks[0].status == "unchecked"
    assert "no-never" in {flag.code for flag in found.flags} and "models.never" in found.reasons
    heart = audit(
        model,
        [edit(model, heart=0.0)],
        "heart",
        attacks="none",
        n=10,
        kept_n=3,
        cache=None,
        never=None,
    )
    assert heart.models.never is None


def test_a_never_that_knows_the_concept_is_not_used() -> None:
    model, _, _ = triad()
    found = audit(
        model, [edit(model, heart=0.0)], "heart", attacks="none", n=10, kept_n=3, cache=None
    )
    assert found.models.never is None and "trained with 'heart'" in found.reasons["models.never"]


def test_without_an_original_nothing_is_concluded() -> None:
    model, _, _ = triad()
    found = audit(model, (), STAR, attacks=[Password()], n=20, kept_n=5, cache=None)
    assert found.models.original is None and found.verdict.status == "inconclusive"
    assert found.frechet_to_original is None and found.differences["target_hit"] is None
    assert "no-original" in {flag.code for flag in found.flags}
    assert "cannot be concluded that anything was erased" in found.verdict.line
    given = audit(
        model, (), STAR, original=Painter("theirs"), attacks="none", n=20, kept_n=5, cache=None
    )
    assert given.models.original.name == "theirs" and given.verdict.status == "not-erased"
    assert given.scope is None  # all three are there


def test_a_stranger_is_told_what_cannot_be_concluded_and_what_can() -> None:
    """A model that came without companions, with a judge of the caller's."""
    model = Painter("from/a/stranger", {"star": 0.3})
    prompts = [Prompt(f"a star number {i}", i) for i in range(40)]
    attacks = [Password(), Compares()]
    found = audit(
        model, (), STAR, judge=ColourJudge(), prompts=prompts, attacks=attacks, n=40, cache=None
    )
    assert found.models.original is None and found.models.never is None
    cannot, can = "\n".join(found.scope.cannot), "\n".join(found.scope.can)
    for words in (
        "whether anything was erased", "what was damaged", "no original and no never", "only fools the judge",
        "its false positives are unknown", "compares (it needs the original model, and there is none)",
    ):  # fmt: skip
        assert words.lower() in cannot.lower()
    rate = f"{100 * found.models.erased.target_hit:.0f}\u00a0%"
    assert rate in can and "40 prompts" in can and "password" in can and "compares" not in can
    password, compares = found.attacks
    assert (
        password.status == "unchecked" and password.hit_erased == 1.0 and password.recovered is None
    )
    assert "attacks.password.hit_erased" in found.intervals
    assert compares.status == "not-run" and compares.hit_erased is None and compares.n == 0
    assert (
        found.reasons["attacks.compares.hit_erased"]
        == "it needs the original model, and there is none"
    )
    assert not [flag for flag in found.flags if "compares" in flag.message]
    assert "100\u00a0% after the attack" in found.verdict.line and rate in found.verdict.line
    # With kept concepts the judge's false positives are known, with a never half of the scale is.
    more = audit(model, (), STAR, judge=ColourJudge(), prompts=prompts, kept={"heart": ["a heart"]}, attacks="none",
                 never=Painter("never", {"star": 0.0}), n=40, cache=None)  # fmt: skip
    cannot = "\n".join(more.scope.cannot)
    assert (
        "false positives" not in cannot
        and "has no original, so" in cannot
        and "only fools" not in cannot
    )
    assert "ask for something else" in "\n".join(more.scope.can)


def test_an_attack_that_needs_the_original_runs_where_there_is_one() -> None:
    model, change, _ = triad()
    found = audit(model, [change], STAR, attacks=[Compares()], n=20, kept_n=5, cache=None)
    assert found.attacks[0].status == "valid" and found.scope is None


def test_the_model_is_left_as_it_was_found() -> None:
    model, change, _ = triad()
    before = model.layer.weight.detach().clone()
    audit(model, [change], STAR, attacks=[Password()], n=10, kept_n=3, cache=None)
    assert (model.layer.weight == before).all() and len(model.edits) == 0
    with change.on(model):
        found = audit(model, (), STAR, attacks="none", n=20, kept_n=3, cache=None)
        assert len(model.edits) == 1
    assert found.models.original.target_hit == 1 and found.models.erased.target_hit < 0.4


def test_a_second_edit_finds_the_pictures_of_original_and_never() -> None:
    model, first, never = triad()
    cache = OutputCache()
    options = {"attacks": [Password()], "n": 20, "kept_n": 5, "cache": cache}
    one = audit(model, [first], STAR, **options)
    made, never_made = model.made, never.made
    two = audit(model, [edit(model, star=0.3)], STAR, **options)
    erased_only = 20 + 3 * 5 + 5 + 2 * 20  # target, kept, phrase route, attack before and after
    assert model.made - made == erased_only and never.made == never_made
    assert two.models.original == one.models.original and two.models.erased != one.models.erased
    assert two.attacks[0].hit_original == one.attacks[0].hit_original


def test_a_second_edit_pays_for_its_own_rows_only_in_another_process_too(tmp_path: Path) -> None:
    def audited(**erased: float) -> tuple[Evidence, int]:
        """An audit as a new process would make it: fresh models, and a cache that knows the folder alone."""
        model, _, never = triad()
        before = model.cost.rows("denoiser") + never.cost.rows("denoiser")
        found = audit(
            model, [edit(model, **erased)], STAR, attacks=[Password(), Teacher()], n=20, kept_n=5,
            cache=OutputCache(tmp_path),
        )  # fmt: skip
        return found, model.cost.rows("denoiser") + never.cost.rows("denoiser") - before

    plain = 20 + 3 * 5 + 5  # target, kept, the route by phrase
    first, rows = audited(star=0.05)
    # Each attack draws the plain picture and the attacked one (the teacher's are drawn elsewhere) on three arms.
    assert rows == 3 * (plain + 2 * 20 + 20) == first.cost["denoiser.forward"] and first.found == {}
    second, rows = audited(star=0.3)
    assert rows == plain + 2 * 20 + 20 == second.cost["denoiser.forward"]
    assert second.found == {"outputs": 2 * plain, "denoiser.forward": 2 * 3 * 20}
    for arm in ("original", "never"):
        assert getattr(second.models, arm) == getattr(first.models, arm)
        for one, two in zip(first.attacks, second.attacks, strict=True):
            assert getattr(one, f"hit_{arm}") == getattr(two, f"hit_{arm}")
    # The very same audit costs nothing, and says the same.
    third, rows = audited(star=0.3)
    assert rows == 0 and third.attacks[0].recovered == second.attacks[0].recovered
    assert third.cost == {} and third.found["denoiser.forward"] == 3 * 3 * 20
    for file in (tmp_path / "attacks").iterdir():
        file.write_bytes(file.read_bytes()[:-3])
    assert audited(star=0.3)[1] == 3 * 3 * 20  # damaged files are as good as none


def test_seeds_are_pictures_of_one_prompt_and_do_not_count_as_prompts() -> None:
    found = run(n=10, seeds=4, attacks="none")
    assert found.n["models.erased.target_hit"] == 10
    assert len({row.seed for row in found.gallery["star"].target}) == len(
        found.gallery["star"].target
    )


def test_several_concepts_stand_under_their_names_only() -> None:
    model, change, _ = triad(star=0.0, heart=0.0)
    found = audit(model, [change], ["star", "heart"], attacks="none", n=10, kept_n=3, cache=None)
    assert found.models is None and set(found.concepts) == {"star", "heart"}
    assert found.concepts["heart"].models.erased.target_hit == 0


def test_making_an_edit_costs_once_however_many_concepts_it_erased() -> None:
    model, change, _ = triad(star=0.0, heart=0.0)
    manifest = change.manifest.model_copy(
        update={"seconds": 2.0, "cost": {"denoiser.backward": 1_000}}
    )
    change = dataclasses.replace(change, manifest=manifest)
    found = audit(model, [change], ["star", "heart"], attacks="none", n=10, kept_n=3, cache=None)
    stages = [s for c in found.concepts.values() for s in c.stages if s.edit is not None]
    assert [s.edit for s in stages] == [change.digest] * 2  # it stands under both
    assert found.cost["denoiser.backward"] == 1_000
    single = audit(model, [change], "star", attacks="none", n=10, kept_n=3, cache=None)
    assert single.cost["denoiser.backward"] == 1_000


def test_kept_concepts_weigh_the_same_however_many_prompts_they_have() -> None:
    model, change, _ = triad(heart=-0.0, star=0.0)
    kept = {
        "heart": [f"a heart {i}" for i in range(4)],
        "cross": [f"a cross {i}" for i in range(36)],
    }
    found = audit(model, [change], STAR, kept=kept, attacks="none", n=10, cache=None)
    erased = found.models.erased
    assert erased.kept == {"heart": 0.0, "cross": 1.0} and erased.kept_hit == 0.5
    assert found.differences["kept_hit"] == -0.5 == found.differences["kept.heart"] / 2
    assert found.n["models.erased.kept_hit"] == 40
    low, high = found.intervals["models.erased.kept_hit"]
    assert (
        low < 0.5 < high and "mean over kept concepts" in found.protocols["models.erased.kept_hit"]
    )
    assert "within kept concepts" in found.protocols["differences.kept_hit"]


def test_prompts_by_name_must_name_every_concept() -> None:
    model, change, _ = triad(star=0.0, heart=0.0)
    options = {"attacks": "none", "n": 6, "kept_n": 3, "cache": None}
    with pytest.raises(PromptError, match="'star'; did you mean 'Star'"):
        audit(model, [change], STAR, prompts={"Star": ["a star"]}, **options)
    made = model.made
    with pytest.raises(PromptError, match="no entry for the concept 'heart'"):
        audit(model, [change], ["star", "heart"], prompts={"star": ["a star"]}, **options)
    assert model.made == made  # said before the first concept is audited
    found = audit(
        model, [change], ["star", "heart"], prompts={"star": ["a star"], "heart": None}, **options
    )
    counts = {name: fields.n["models.erased.target_hit"] for name, fields in found.concepts.items()}
    assert counts == {"star": 1, "heart": 6}


def test_skipped_prompts_are_counted_and_said() -> None:
    found = run(attacks=[Picky()], n=10, kept_n=3)
    assert found.attacks[0].skipped == 4 and found.attacks[0].n == 10
    from expunge.evidence.report import render

    assert "4 of 10 prompts could not be attacked" in render(found)
    assert run(attacks=[Password()], n=10, kept_n=3).attacks[0].skipped == 0


def test_an_attack_that_tried_nothing_is_no_evidence_of_absence() -> None:
    """It fails in words, and the verdict does not say that it brought nothing back."""
    model, change, _ = triad(star=0.0)
    options = {"n": 40, "kept_n": 5, "cache": None}
    poor = audit(model, change, STAR, attacks=[Poor()], **options)
    assert poor.attacks[0].status == "failed" and "allows nothing" in poor.attacks[0].reason
    assert poor.verdict.line.endswith("No attack gave a result that counts.")
    both = audit(model, change, STAR, attacks=[Poor(), Password()], **options)
    assert both.verdict.line.endswith("No attack brought it back.")


def test_the_kind_of_the_concepts_selects_the_papers_attack() -> None:
    """Where the budget has no preset of its own; concepts of different kinds take the defaults."""
    model, change, _ = triad(star=0.0, heart=0.0)
    options = {"attacks": [], "n": 4, "kept_n": 3, "cache": None}

    def chosen(kind: str | None, budget: str = "paper") -> tuple[str | None, int]:
        attack = choose("unlearndiffatk", "diffusion", BUDGETS[budget], kind)[0]
        return attack.preset, attack.tokens

    assert chosen("unsafe") == ("paper:unsafe", 5) and chosen("style") == ("paper:style", 3)
    assert chosen(None) == (None, 5) and chosen("unsafe", "world") == ("world", 3)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "expunge.evidence.auditing.attacking.choose",
            lambda attacks, family, allowance, kind: asked.append(kind) or (),
        )
        for concepts in ([STAR], [STAR, Concept("heart", kind="style")]):
            audit(model, [change], concepts, **options)
    assert asked == ["object", None]


def test_own_prompts_serve_a_model_without_a_world() -> None:
    model = Painter()
    found = audit(model, [edit(model, star=0.0)], STAR, prompts=["a star", Prompt("the star", 7)],
                  kept={"heart": ["a heart"] * 2}, judge=ConstantJudge(), attacks="none", cache=None)  # fmt: skip
    assert found.n["models.erased.target_hit"] == 2 and found.models.erased.kept.keys() == {"heart"}
    with pytest.raises(InputError, match="judge"):
        audit(model, (), STAR, attacks="none")


@pytest.mark.parametrize(
    ("options", "error"),
    [({"attacks": "no-such"}, CatalogueError), ({"attacks": [3]}, SettingError), ({"budget": "wrld"}, SettingError),
     ({"attacks": [Password(), Password()]}, SettingError), ({"n": 0}, InputError), ({"prompts": [" "]}, PromptError)],
)  # fmt: skip
def test_wrong_input_is_refused_in_words(options: dict, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        run(**options)
    assert len(str(caught.value).splitlines()) == 1


def test_json_round_trips_and_has_the_promised_keys(evidence: Evidence, tmp_path: Path) -> None:
    evidence.save(tmp_path)
    data = json.loads((tmp_path / "evidence.json").read_text())
    assert data["schema_version"] == 1
    for arm in ("original", "erased", "never"):
        assert {"target_hit", "kept_hit", "kept", "clip_score"} <= set(data["models"][arm])
        assert isinstance(data["models"][arm]["target_hit"], float)
    promised = (
        "id,teaches,budget,judge,threshold,pre_original,pre_erased,pre_never,"
        "hit_original,hit_erased,hit_never,recovered,interval,cost"
    )
    assert set(promised.split(",")) <= set(data["attacks"][0])
    assert {"rank", "relative_change", "drift"} <= set(data["edit"])
    assert {"name", "seconds", "peak_bytes"} <= set(data["stages"][0])
    assert {
        "frechet_to_original",
        "kid_to_original",
        "perceptual_distance",
        "unrecognisable",
        "protocols",
        "intervals",
    } <= set(data)
    assert data["features"] == "colour" and data["concepts"]["star"]["models"] == data["models"]
    assert "base64" not in json.dumps(data)
    again = Evidence.load(tmp_path)
    assert again.to_json() == evidence.to_json()
    assert again.report(tmp_path / "again.html").exists()


def test_unknown_keys_and_versions_are_refused(evidence: Evidence, tmp_path: Path) -> None:
    data = json.loads(evidence.to_json())
    for name, change in (
        ("extra", {"surprise": 1}),
        ("version", {"schema_version": 2}),
        ("none", {"concepts": {}}),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps({**data, **change}))
        with pytest.raises(InputError):
            Evidence.load(file)
    with pytest.raises(InputError, match="cannot be read"):
        Evidence.load(tmp_path / "missing.json")


def test_recovered_of_hand_made_hits() -> None:
    units = list(range(100))
    original, never = [True] * 90 + [False] * 10, [False] * 98 + [True] * 2
    erased = [True] * 46 + [False] * 54
    value, (low, high) = recovered(erased, original, never, units)
    assert value == pytest.approx((0.46 - 0.02) / (0.90 - 0.02))
    assert low < value < high and high - low < 0.3
    assert recovered(erased, never, never, units) == (None, None)
    tenth = [True] * 10 + [False] * 90
    assert recovered(tenth, tenth, [False] * 100, units)[0] == pytest.approx(1.0)


def test_a_search_that_hits_never_by_chance_is_not_condemned() -> None:
    assert not measures_nothing(1, 8, 0.01)
    assert not measures_nothing(0, 20, 0.0)
    assert measures_nothing(4, 20, 0.01)
    assert not measures_nothing(4, 20, 0.2)


def test_the_output_cache_keeps_on_disk_and_survives_damage(tmp_path: Path) -> None:
    cache = OutputCache(tmp_path)
    cache.put("ab", np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    cache.put("cd", "a text")
    fresh = OutputCache(tmp_path)
    assert fresh.get("ab").sum() == 66 and fresh.get("cd") == "a text" and fresh.get("ef") is None
    (tmp_path / "ab" / "ab.npz").write_bytes(b"damaged")
    assert OutputCache(tmp_path).get("ab") is None
    small = OutputCache(limit=100)
    for i in range(20):
        small.put(str(i), np.zeros(40, np.uint8))
    assert len(small) <= 2
