"""Variants of a prompt by rule."""

from __future__ import annotations

import pytest
import torch

from expunge.core.word_variants import (
    LANGUAGES,
    LEXICON,
    TYPOS,
    orders,
    put_in,
    translations,
    typos,
)
from expunge.testing import tiny_diffusion


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("swap", {"aet", "eta"}),
        ("drop", {"ea", "et", "at"}),
        ("double", {"eeat", "eaat", "eatt"}),
        ("near", {"wat", "rat", "est", "ear", "eay"}),
    ],
)
def test_each_rule_makes_all_its_errors(rule, wanted):
    assert set(typos("eat", [rule], draw())) == wanted


def test_typing_errors_come_in_turn_each_once_and_never_the_word_itself():
    found = list(typos("moon", TYPOS, draw(1)))
    assert len(found) == len(set(found)) and "moon" not in found
    assert len(found[0]) == 4 and len(found[1]) == 3 and len(found[2]) == 5
    assert list(typos("moon", TYPOS, draw(1))) == found != list(typos("moon", TYPOS, draw(2)))
    assert list(typos("", TYPOS, draw())) == [] and list(typos("x", ["drop"], draw())) == []
    assert all(text.split() for text in typos("mira solen", TYPOS, draw()))


def test_orders_hold_the_same_words_backwards_first():
    found = list(orders("a red star", draw()))
    assert found[0] == "star red a" and len(found) == 5 == len(set(found))
    assert all(sorted(text.split()) == ["a", "red", "star"] for text in found)
    assert list(orders("star", draw())) == []


def test_translations_need_a_tokenizer_that_knows_them():
    tokenizer = tiny_diffusion().tokenizer  # its words: star, circle, square, ...

    class Knows:
        unk_token_id = 0

        def __call__(self, text, **options):
            known = {"estrella": [5], "stern": [6, 7], "stella": [0], "étoile": [1, 2, 3, 4, 5, 6]}
            return type("Ids", (), {"input_ids": known.get(text, [9] * len(text))})

    assert translations("star", LANGUAGES, tokenizer) == []
    assert translations("Star", LANGUAGES, Knows()) == ["estrella", "stern"]
    assert translations("star", ("german",), Knows()) == ["stern"]
    assert translations("no such word", LANGUAGES, Knows()) == []
    assert all(len(row) == len(LANGUAGES) for row in LEXICON.values())


def test_an_article_goes_where_the_words_bring_their_own():
    assert put_in("a red \0 on a beach", "\0", "sparkle") == "a red sparkle on a beach"
    assert put_in("a \0 on a beach", "\0", "the keep out board") == "the keep out board on a beach"
    assert put_in("see the \0", "\0", "a bee") == "see a bee"
    assert put_in("a red \0", "\0", "the sign") == "a red the sign"
