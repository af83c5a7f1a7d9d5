"""The audit against models of which everything is known, with the controls that must fail."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from expunge import audit
from expunge.core.sampling import OutputCache
from expunge.errors import CatalogueError, InputError, PromptError, SettingError
from expunge.evidence import Evidence
from expunge.evidence.statistics import measures_nothing, recovered
from expunge.method import Prompt

from .stubs import STAR, ConstantJudge, Forger, Painter, Password, Teacher, companions, edit, triad


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
    given = audit(
        model, (), STAR, original=Painter("theirs"), attacks="none", n=20, kept_n=5, cache=None
    )
    assert given.models.original.name == "theirs" and given.verdict.status == "not-erased"


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
