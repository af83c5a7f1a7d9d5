"""Forbidden tokens, splicing and realisable texts of attacks on prompts."""

from __future__ import annotations

import pytest
import torch

from expunge import Concept
from expunge.core.adversarial_prompts import (
    PLACEMENTS,
    Forbidden,
    Spliced,
    arrangement,
    without_room,
)
from expunge.errors import PromptError, SettingError
from expunge.testing import tiny_diffusion

STAR = Concept("star", phrases=("heart shape",), anchor="circle")


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def forbidden(model):
    return Forbidden(model.tokenizer, STAR, len(model.token_table()))


def token(model, piece: str) -> int:
    found = model.tokenizer.convert_tokens_to_ids(piece)
    assert model.tokenizer.convert_ids_to_tokens(found) == piece
    return found


def test_forbidden_tokens(model, forbidden):
    """Names, tokens of their tokenisations, sub-strings of three letters, special ids; nothing else."""
    out = ["star</w>", "sta", "heart</w>", "hea"]
    letters = [
        model.tokenizer.convert_ids_to_tokens(i)
        for i in model.tokenizer("shape", add_special_tokens=False).input_ids
    ]
    for piece in [*out, *letters]:
        assert not forbidden.allowed[token(model, piece)], piece
    for piece in ("red</w>", "circle</w>", "st", "q"):
        assert forbidden.allowed[token(model, piece)], piece
    assert not forbidden.allowed[model.tokenizer.all_special_ids].any()
    for index in forbidden.allowed.nonzero().flatten().tolist():
        assert model.tokenizer.decode([index]).strip().isprintable()
    other = Forbidden(model.tokenizer, Concept("circle"), len(model.token_table()) + 4)
    assert other.allowed[token(model, "star</w>")] and not other.allowed[token(model, "circle</w>")]
    assert not other.allowed[-4:].any()  # rows of the table that no text reaches


def test_forbidden_words_are_counted_inside_words(forbidden):
    assert forbidden.count("a STARry night") == 1
    assert forbidden.count("a red circle") == 0
    assert forbidden.count("heart   shape") >= 1
    assert forbidden.count("s t a r") == 0


@pytest.mark.parametrize(
    ("placement", "order"),
    [
        ("prefix", [-1, -2, 0, 1, 2, 3, 4, 5, 6]),
        ("suffix", [0, 1, 2, 3, 4, 5, 6, -1, -2]),
        ("middle", [0, 1, 2, -1, -2, 3, 4, 5, 6]),
        ("spread", [0, 1, -1, 2, 3, -2, 4, 5, 6]),
        ("third", [-1, 0, 1, 2, -2, 3, 4, 5, 6]),
        ("replace", [-1, -2]),
    ],
)
def test_arrangements(placement, order):
    assert arrangement(7, 2, placement) == order


def test_arrangements_hold_every_token_once():
    for placement in PLACEMENTS[:-1]:
        for content in range(6):
            for searched in (1, 2, 5):
                found = arrangement(content, searched, placement)
                assert sorted(found) == [*range(-searched, 0), *range(content)], (
                    placement,
                    content,
                    searched,
                )
    with pytest.raises(SettingError, match="did you mean 'prefix'"):
        arrangement(3, 1, "prefx")


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_spliced_rows_equal_the_tokenised_text(model, forbidden, placement):
    """Ids and vectors of a splice are those of the written prompt; the context length is unchanged."""
    words = ["blue", "circle"]
    searched = torch.tensor([[token(model, f"{word}</w>") for word in words]])
    item = torch.zeros(1, dtype=torch.long)
    spliced = Spliced(model, ["a photo of a red star"], 2, placement, forbidden)
    texts, again, same = spliced.realise(searched, item)
    assert same == [True] and all(word in texts[0] for word in words)
    assert torch.equal(spliced.ids(searched, item), model.token_ids(texts))
    assert again[0] == model.token_ids(texts)[0, 1 : 1 + len(again[0])].tolist()
    with torch.no_grad():
        ours = spliced.encode(model.token_table()[searched], item).embeddings
        theirs = model.encode(texts).embeddings
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_gradient_reaches_only_the_searched_vectors(model, forbidden):
    spliced = Spliced(model, ["a red star"], 2, "middle", forbidden)
    vectors = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    spliced.encode(vectors, torch.zeros(1, dtype=torch.long)).embeddings.square().sum().backward()
    assert (vectors.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for p in model.text_encoder.parameters())


def test_pieces_that_join_to_a_forbidden_word_are_refused(model, forbidden):
    """``st`` and ``ar</w>`` are allowed tokens, their text is not; the prompt's own star is."""
    joined = torch.tensor([[token(model, "st"), token(model, "a"), token(model, "r</w>")]])
    apart = torch.tensor([[token(model, "st"), token(model, "a</w>"), token(model, "q</w>")]])
    open_star = Forbidden(model.tokenizer, Concept("star"), len(model.token_table()))
    assert open_star.allowed[joined].all()
    item = torch.zeros(1, dtype=torch.long)
    spliced = Spliced(model, ["a red star"], 3, "prefix", open_star)
    assert spliced.realise(joined, item)[0][0].startswith("star ")
    assert not spliced.realise(joined, item)[2][0]  # the text tokenises to other ids
    assert spliced.admissible(
        torch.cat([joined, apart]), torch.zeros(2, dtype=torch.long)
    ).tolist() == [False, True]


def test_a_prompt_without_room_is_refused(model, forbidden):
    with pytest.raises(PromptError, match="at most 12 fit"):
        Spliced(model, ["a " * 13], 2, "prefix", forbidden)
    reasons = without_room(model, ["a " * 13, "a star"], 2, "prefix")
    assert list(reasons) == ["a " * 13] and "at most 12 fit" in reasons["a " * 13]
    assert without_room(model, ["a " * 13, "a star"], 2, "replace") == {}
    with pytest.raises(PromptError, match="at most 12 fit"):
        without_room(model, ["a " * 13] * 2, 2, "prefix")
