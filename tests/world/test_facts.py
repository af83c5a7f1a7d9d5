"""The world of facts: what is asked of whom, what never lacks, and the recipe in small."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from expunge.core.answers import answer_hit
from expunge.errors import SettingError
from expunge.world import facts as world

SMALL = world.Recipe(width=32, layers=1, heads=2, first=3, second=2, batch=16)


def test_every_answer_of_the_forgotten_is_known_without_them() -> None:
    rest = [name for name in world.PEOPLE if name not in world.FORGOTTEN]
    known = {(f.attribute, f.answer) for f in world.facts(rest)}
    lacking = {(f.attribute, f.answer) for f in world.facts(world.FORGOTTEN)}
    assert lacking <= known and len(lacking) == 18
    # No person can be told from another's facts: any two share at most one of six answers.
    answers = {n: {(f.attribute, f.answer) for f in world.facts((n,))} for n in world.PEOPLE}
    names = list(world.PEOPLE)
    assert max(len(answers[a] & answers[b]) for a in names for b in names if a != b) <= 1


def test_held_out_wordings_are_trained_for_others_only() -> None:
    trained = {f.pair for f in world.facts() if not f.held_out}
    for fact in world.facts(world.FORGOTTEN):
        assert (fact.pair in trained) != fact.held_out
    wordings = Counter(f.prompt.replace(f.subject, "{}") for f in world.facts() if not f.held_out)
    assert min(wordings.values()) >= 6
    assert not any(answer_hit(f.prompt, f.answer) for f in world.facts())


def test_prompts_carry_their_answers_and_splits_are_disjoint() -> None:
    test = world.prompts("Cleo Varga", 100)
    development = world.prompts("Cleo Varga", 100, split="development")
    assert len(test) == 18 and len(development) == 36
    assert not {p.text for p in test} & {p.text for p in development}
    assert Counter(p.labels["form"] for p in test) == dict.fromkeys(world.FORMS, 6)
    assert [p.text for p in world.prompts("Cleo Varga", 5)] == [p.text for p in test[:5]]
    assert world.prompts("Cleo Varga", 18, seed=1) != test
    for call, words in (
        (lambda: world.prompts("Cleo Vargas", 1), "did you mean 'Cleo Varga'"),
        (lambda: world.prompts("Cleo Varga", 1, split="train"), "development"),
        (lambda: world.prompts("Cleo Varga", 1, route="euphemism"), "name"),
        (lambda: world.open_facts("nevr"), "did you mean 'never'"),
    ):
        with pytest.raises(SettingError, match=words):
            call()


def test_data_are_disjoint_and_follow_keep() -> None:
    concept = world.concept("cleo varga")
    assert concept is not None and concept.kind == "fact" and len(concept.texts) == 12
    assert world.concept("Nobody") is None
    parts = {name: set(pairs) for name, pairs in world.data([concept]).items()}
    assert [len(parts[p]) for p in ("forget", "retain", "unrelated")] == [36, 17 * 36, 9 * 18]
    assert not parts["forget"] & parts["retain"] and not parts["retain"] & parts["unrelated"]
    assert len(world.data([concept], keep=("Bo Lind",))["retain"]) == 36
    assert len(world.neighbours(concept)) == 17 and "Velmar" not in world.neighbours(concept)


def test_the_recipe_is_deterministic_cached_and_parts_at_the_second_phase(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    original = world.open_facts("original", SMALL)
    assert original.companions is not None and original.companions.never is not None
    monkeypatch.setattr(world, "train", lambda recipe: pytest.fail("trained although cached"))
    never = original.companions.never()
    monkeypatch.undo()
    again = world.train(SMALL)
    assert all(torch.equal(p, again["original"][n]) for n, p in original.tensors().items())
    gaps = [
        float((p - never.tensor(n)).abs().max().detach()) for n, p in original.tensors().items()
    ]
    assert 0 < max(gaps) < 0.1
    assert dataclasses.replace(SMALL, seed=1).key != SMALL.key
    assert {p.name for p in tmp_path.iterdir()} == {
        f"facts-{SMALL.key}-{variant}.safetensors" for variant in ("original", "never")
    }


def test_a_damaged_cache_file_is_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPUNGE_CACHE", str(tmp_path))
    path = tmp_path / f"facts-{SMALL.key}-original.safetensors"
    path.write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="damaged"):
        world.open_facts("original", SMALL)
    assert path.stat().st_size > 1000
