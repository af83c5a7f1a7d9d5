"""A concept's direction in text embeddings, its pairs, and the problem of matching an embedding."""

from __future__ import annotations

import pytest
import torch

from expunge import Concept
from expunge.core.adversarial_prompts import Forbidden
from expunge.core.concept_direction import (
    concept_pairs,
    concept_vector,
    matching_problem,
    read_pairs,
)
from expunge.errors import SettingError
from expunge.testing import tiny_diffusion

STAR = Concept("star", phrases=("pentagram",), anchor="circle")


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def test_pairs_differ_by_the_concept_only(model):
    pairs = concept_pairs(model, STAR)
    assert len(pairs) == 12
    assert all("star" in a and b == a.replace("star", "circle") for a, b in pairs)
    plain = concept_pairs(model, Concept("star"))
    assert all(b == a.replace("star", "thing") for a, b in plain)
    assert concept_pairs(model, Concept("ada", kind="identity"))[0][1] == "a person"


@pytest.mark.parametrize("name", ["Yahoo!", "C++", "St.", "हिन्दी", "star"])
def test_names_that_end_in_a_sign_have_pairs_and_the_anchor_is_plain_text(model, name):
    other = r"back\slash \1"
    pairs = concept_pairs(model, Concept(name, anchor=other))
    assert len(pairs) == 12
    assert all(name in a and b == a.replace(name, other) for a, b in pairs)


def test_direction_is_zero_before_the_first_differing_token(model):
    """The encoder is causal; after that token the direction is not zero."""
    vector = concept_vector(
        model, [("a red star", "a red circle"), ("a blue star", "a blue circle")]
    )
    assert vector.shape == (16, 32)
    assert vector[:3].abs().max() == 0 and (vector[3:].norm(dim=-1) > 0.1).all()
    with pytest.raises(SettingError, match="no prompt pair"):
        concept_vector(model, [])


def test_pairs_are_read():
    assert read_pairs(["a star | a dot"]) == [("a star", "a dot")]
    for bad in ("one", "a|b|c", "a|"):
        with pytest.raises(SettingError, match="two texts"):
            read_pairs([bad])


def test_matching_scores_are_distances_to_the_wanted_embedding(model):
    """Zero at the text itself, positive elsewhere; ids and texts agree where the text is realisable."""
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    with torch.no_grad():
        wanted = model.encode(["red circle", "blue circle"]).embeddings
    for realised in (True, False):
        problem = matching_problem(model, wanted, 2, forbidden, realised=realised)
        ids = model.token_ids(["red circle", "blue circle"])[:, 1:3]
        right = problem.scores(ids, torch.tensor([0, 1]))
        wrong = problem.scores(ids, torch.tensor([1, 0]))
        assert right.max() < 1e-6 and wrong.min() > 0.1
    assert problem.rescore(["red circle"], torch.tensor([0])).item() < 1e-6
