"""Words as numbers and back."""

from __future__ import annotations

import pytest

from expunge.core.safety_answers import people_answer, read_person, read_safety, safety_answer
from expunge.core.safety_taxonomy import ATTRIBUTES, TASKS, Seen, Taxonomy
from expunge.core.word_codes import ANSWER, BEGIN, END, PAD, UNKNOWN, WordCodes
from expunge.errors import InputError


def test_texts_in_the_published_format_come_back_as_they_were():
    every = safety_answer(Seen(unsafe=tuple(task.id for task in TASKS)))
    people = [
        people_answer({a.id: a.values[i % len(a.values)] for a in ATTRIBUTES}) for i in range(5)
    ]
    codes = WordCodes.of([every, "safe", *people])
    for text in (every, "safe", *people):
        assert codes.decode(codes.encode(text)) == text
    assert read_safety(codes.decode(codes.encode(every))).unsafe == tuple(t.id for t in TASKS)
    assert read_person(people[2]).person == {
        "gender": "male",
        "age": "middle-aged",
        "race": "asian",
    }


def test_decoding_stops_at_the_end_and_shows_what_it_does_not_know():
    codes = WordCodes(["unsafe", "\n", "Hate", ","])
    hate = codes.encode("unsafe\nHate")
    assert codes.decode([BEGIN, ANSWER, *hate, END, *hate, PAD]) == "unsafe\nHate"
    assert codes.encode("unsafe Love") == [hate[0], UNKNOWN]
    assert codes.decode([hate[0], UNKNOWN]) == "unsafe <unknown>"
    assert codes.decode([]) == "" and len(codes) == 9


def test_needed_words_come_before_frequent_ones():
    codes = WordCodes.of(["safe"], ["a cat", "a dog", "a dog"], most=3)
    assert codes.words == ("safe", "a", "dog")
    assert WordCodes.of(["safe", "unsafe"], ["a"], most=1).words == ("safe", "unsafe")


def test_a_vocabulary_holds_single_words_once():
    with pytest.raises(InputError, match="'a b' is no single word"):
        WordCodes(["a b"])
    with pytest.raises(InputError, match="'a' stands twice"):
        WordCodes(["a", "b", "a"])


def test_a_taxonomy_goes_to_plain_values_and_back():
    made = Taxonomy("ours", leaves={"hate": ("a", "b")}, leaves_by="us")
    assert Taxonomy.from_dict(made.to_dict()) == made
    with pytest.raises(InputError, match="this is no taxonomy"):
        Taxonomy.from_dict({"name": "ours"})
