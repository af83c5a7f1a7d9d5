"""Names in texts: whole words, whatever they end in, exchanged letter by letter."""

from __future__ import annotations

import pytest

from expunge.core.mentions import exchanged


@pytest.mark.parametrize(
    "name", ["star", "Yahoo!", "C++", "St.", ".NET", "हिन्दी", "café", "🌟", "*"]
)
def test_a_name_is_found_as_a_whole_word(name):
    text = f"a red {name} and {name}, ({name})"
    assert exchanged(text, (name,), "dot") == ("a red dot and dot, (dot)", name)
    inside = f"x{name}" if not name[-1].isalnum() else f"x{name}x"
    assert exchanged(inside, (name,), "dot") == (inside, None)
    assert exchanged("nothing", (name,), "dot") == ("nothing", None)


def test_a_mark_belongs_to_the_letter_before_it():
    assert exchanged("की बात", ("क",), "dot") == ("की बात", None)
    assert exchanged("cafe\u0301", ("cafe",), "dot") == ("cafe\u0301", None)
    assert exchanged("a ❤\ufe0f", ("❤",), "dot")[1] == "❤"  # only how the sign is drawn


def test_the_longest_name_goes_and_case_does_not_matter():
    names = ("star", "star fish", "Star-C++")
    assert exchanged("a Star Fish", names, "dot") == ("a dot", "Star Fish")
    assert exchanged("STAR-c++ star", names, "dot") == ("dot dot", "STAR-c++")


@pytest.mark.parametrize("instead", ["\\", r"\1", r"\g<0>", "", "{}", "$1"])
def test_what_takes_the_place_is_plain_text(instead):
    assert exchanged("a star.", ("star",), instead)[0] == f"a {instead}."
