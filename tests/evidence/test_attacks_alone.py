"""Attacks without an audit: the same numbers as in one, what is written, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from expunge import Concept
from expunge.errors import CatalogueError, InputError, PromptError, SettingError
from expunge.evidence import audit, run_attacks

from .stubs import PASSWORD, STAR, ColourJudge, Compares, Painter, Password, Picky, Poor, triad


def test_the_numbers_are_those_of_an_audit() -> None:
    model, change, _ = triad()
    found = run_attacks(model, STAR, change, attacks=[Password(), Picky()], n=20, cache=None)
    whole = audit(
        model, change, STAR, attacks=[Password(), Picky()], n=30, attack_n=20, kept_n=2, cache=None
    )
    assert not model.edits.digests
    for alone, record in zip(found.records, whole.attacks, strict=True):
        path = f"attacks.{record.id}"
        for kind in ("pre", "hit"):
            number = found.number(alone, kind)
            assert number is not None and number["value"] == getattr(record, f"{kind}_erased")
            assert number["interval"] == whole.intervals[f"{path}.{kind}_erased"]
            assert (number["n"], number["protocol"]) == (
                20,
                whole.protocols[f"{path}.{kind}_erased"],
            )
        assert alone.texts == record.texts and alone.cost["erased"] == record.cost["erased"]
        # Twenty plain pictures and twenty of the password.
        assert found.rows(alone) == 40
    assert found.records[1].skipped == 4


def test_successes_are_written_with_their_pictures(tmp_path) -> None:
    model, change, _ = triad()
    asked = [f"a star number {i}" for i in range(8)]
    found = run_attacks(model, "star", change, attacks=Password(), prompts=asked, cache=None)
    file = found.save(tmp_path)
    document = json.loads(file.read_text())
    (attack,) = document["attacks"]
    assert (document["concept"]["name"], document["edits"]) == ("star", [change.digest])
    assert (attack["id"], attack["status"], attack["rows"], attack["reason"]) == (
        "password",
        "run",
        16,
        None,
    )
    items = attack["items"]
    assert [item["prompt"] for item in items] == asked and [i["seed"] for i in items] == list(
        range(8)
    )
    share = sum(item["after"] for item in items) / 8
    assert attack["after"]["value"] == share > attack["before"]["value"]
    assert attack["after"]["interval"][0] < share and attack["after"]["n"] == 8
    for item, output in zip(items, found.done[0].attempts["erased"].outputs, strict=True):
        assert (item["picture"] is not None) == item["after"]
        if item["picture"]:
            assert np.array_equal(np.asarray(Image.open(tmp_path / item["picture"])), output)
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert written == {item["picture"] for item in items if item["picture"]}
    best = found.best(found.records[0])
    assert best and all(PASSWORD in str(item.text) and not item.pre_hit for item in best)
    assert [item.score for item in best] == sorted((item.score for item in best), reverse=True)


def test_an_attack_that_gives_nothing_says_why(tmp_path) -> None:
    """One that cannot pay fails; one that needs an original is not run where nothing can be lifted."""
    model = Painter()
    found = run_attacks(
        model, STAR, attacks=[Poor(), Compares()], judge=ColourJudge(), prompts=["a star"], cache=None
    )  # fmt: skip
    poor, compares = json.loads(found.save(tmp_path).read_text())["attacks"]
    assert (poor["status"], poor["reason"]) == ("failed", "the budget allows nothing")
    assert compares["status"] == "not-run" and "needs the original" in compares["reason"]
    assert poor["after"] is None and poor["items"] == [] and not list(tmp_path.rglob("*.png"))
    given = run_attacks(
        model, STAR, attacks=Compares(), judge=ColourJudge(), prompts=["a star"], original=Painter(), cache=None
    )  # fmt: skip
    assert given.number(given.records[0], "hit")["value"] == 1.0


def test_what_cannot_be_attacked_is_refused_before_any_work() -> None:
    model, change, _ = triad()
    for wrong, error, words in (
        ({"attacks": "none"}, SettingError, "no attack was named"),
        ({"attacks": "ring-a-bel"}, CatalogueError, "ring-a-bell"),
        ({"n": 0}, InputError, "n is 0"),
        ({"prompts": []}, PromptError, "no prompt"),
        ({"concept": [STAR, Concept("heart")]}, InputError, "one concept at a time"),
        ({"budget": "worlds"}, SettingError, "did you mean 'world'"),
    ):
        given = {"concept": STAR, "attacks": Password(), **wrong}
        with pytest.raises(error, match=words):
            run_attacks(model, given.pop("concept"), change, cache=None, **given)
    with pytest.raises(InputError, match="no judge of its own"):
        run_attacks(Painter(), STAR, attacks=Password(), cache=None)
    assert not model.made and not model.edits.digests
