"""Concepts are validated at the door, and names never become paths by accident."""

from __future__ import annotations

import json

import pytest

from expunge.concept import Concept, as_concepts, names_of, read_concepts, safe_name
from expunge.core.projections import kept_texts
from expunge.errors import ConceptError, NameRefused
from expunge.method import Prompt

HOSTILE = [
    "", " ", ".", "..", "../x", "a/../b", "/etc/passwd", "a/b", "a\\b", "..\\x", "C:\\x", "C:x",
    "\\\\host\\share", "//host/share", "a\0b", "a\nb", "a\x1b[31m", "x" * 300, "é" * 60, "name.", "name ",
    " name", "CON", "con.txt", "nul", "LPT1", "~root", "-rf", "$HOME", "a:b", "a*b", "a?b", "\u202ename",
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_hostile_names_never_become_paths(name):
    with pytest.raises(NameRefused):
        safe_name(name)


@pytest.mark.parametrize(
    "name", ["star", "red star", "Ada Morn", "v1.2_a-b", "étoile", "星", "console"]
)
def test_ordinary_names_may(name):
    assert safe_name(name) == name


def test_what_is_no_concept():
    for bad in ("", "  ", "a\0b", "x" * 201, 3):
        with pytest.raises(ConceptError):
            Concept(bad)
    with pytest.raises(ConceptError, match="did you mean 'style'"):
        Concept("x", kind="stile")
    with pytest.raises(ConceptError, match="anchor"):
        Concept("star", anchor="Star")
    with pytest.raises(ConceptError, match="list of texts"):
        Concept("star", phrases="heart")
    with pytest.raises(ConceptError, match="repeats"):
        Concept("star", phrases=("STAR",))
    for bad in ([], ["star", "Star"]):
        with pytest.raises(ConceptError):
            as_concepts(bad)


def test_round_trip_and_files(tmp_path):
    star = Concept("star", "object", ("asterisk",), "circle")
    assert Concept.from_dict(json.loads(json.dumps(star.to_dict()))) == star
    assert star.names == ("star", "asterisk") and as_concepts("star") == (Concept("star"),)
    path = tmp_path / "c.yaml"
    path.write_text(
        "concepts:\n- {name: star, phrases: [asterisk], anchor: circle}\n- name: heart\n"
    )
    assert read_concepts(path) == (star, Concept("heart"))
    for text, match in (
        ("- nam: star\n", "did you mean 'name'"), ("a: &x 1\nb: *x\n", "aliases"), ("[]", "no concept"),
        ("{", "not valid"), ("- 3\n", "mapping"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ConceptError, match=match):
            read_concepts(path)
    path.write_bytes("name: étoile".encode("latin-1"))
    with pytest.raises(ConceptError, match="not UTF-8"):
        read_concepts(path)


def test_one_name_to_keep_is_a_name_and_not_its_letters():
    assert names_of("heart") == names_of(["heart"]) == names_of(Concept("heart")) == ["heart"]
    assert names_of([Concept("heart"), "a red cross"]) == ["heart", "a red cross"]
    assert names_of(()) == names_of(None) == []
    assert names_of([Prompt("a red heart", seed=3)]) == ["a red heart"]
    for odd in ([None], ["heart", 5]):
        with pytest.raises(ConceptError, match="neither a concept nor a text"):
            names_of(odd)


def test_nothing_is_erased_and_kept_at_the_same_time():
    star = Concept("star", phrases=("pentagram",))
    assert as_concepts(star, ["heart", "a red star", Concept("cross")]) == (star,)
    for kept in ("star", ["heart", "Star "], [Concept("pentagram")], [Prompt("star")]):
        with pytest.raises(ConceptError, match="also erased, with 'star'"):
            as_concepts(["circle", star], kept)
    spoken = ["heart", "a heart"]
    assert kept_texts("heart", ("a {}",)) == kept_texts([Concept("heart")], ("a {}",)) == spoken


@pytest.mark.parametrize("wrong", [None, 3, [3], [None], 2.5])
def test_what_is_no_concept_is_said_in_words(wrong):
    with pytest.raises(ConceptError):
        as_concepts(wrong)
