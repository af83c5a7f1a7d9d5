"""Pooled vectors: cut and reused where that is exact, and the search for a direction."""

from __future__ import annotations

import itertools

import pytest
import torch

from expunge import Concept
from expunge.core.adversarial_prompts import Forbidden
from expunge.core.pooled_text import PooledText, direction_problem
from expunge.core.prompt_search import Gcg, Ledger, RandomStrings
from expunge.testing import tiny_diffusion

STAR = Concept("star", anchor="circle")
LENGTH = 6


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion(dtype=torch.float64)


def strings(model, count, seed=0):
    allowed = Forbidden(model.tokenizer, STAR, len(model.token_table())).allowed.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    return allowed[torch.randint(len(allowed), (count, LENGTH), generator=generator)]


@torch.no_grad()
def test_cut_and_whole_sequences_give_the_same_vector(model):
    """Against the encoder's own pooled output."""
    ids = strings(model, 5)
    cut, whole = PooledText(model, LENGTH), PooledText(model, LENGTH, cut=False)
    assert cut.cut and not whole.cut
    rows = whole._sequence(ids)
    own = model.text_encoder(rows).pooler_output
    assert torch.allclose(whole.of_ids(ids), own, atol=1e-12)
    assert torch.allclose(cut.of_ids(ids), own, atol=1e-12)
    for pooled in (cut, whole):
        made = pooled.of_vectors(model.token_table()[ids])
        assert torch.allclose(made, own, atol=1e-12)


@torch.no_grad()
def test_prefixes_are_reused_exactly_for_any_strings(model):
    """One swap each, at every place; the common string itself; strangers; two groups at once."""
    base = strings(model, 2, seed=1)
    swaps = base.repeat_interleave(LENGTH + 1, 0)
    group = torch.arange(2).repeat_interleave(LENGTH + 1)
    for b in range(2):
        for place in range(LENGTH):
            swaps[b * (LENGTH + 1) + place, place] = strings(model, 1, seed=9 + place)[0, 0]
    cases = torch.cat([swaps, strings(model, 3, seed=4)])
    groups = torch.cat([group, torch.tensor([0, 1, 1])])
    order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(0))
    whole = PooledText(model, LENGTH, cut=False).of_ids(cases[order])
    before = model.cost.snapshot()
    found = PooledText(model, LENGTH).of_ids(cases[order], groups[order])
    assert torch.allclose(found, whole, atol=1e-12)
    assert model.cost.since(before) == {"encoder.forward": len(cases)}


def test_texts_and_gradients(model):
    texts = ["a red star", "star", "a photo of a blue circle"]
    pooled = PooledText(model, 3)
    ids = model.token_ids(["a red star"])[:, 1:4]
    assert torch.allclose(pooled.of_texts(texts)[:1], pooled.of_ids(ids), atol=1e-12)
    vectors = model.token_table()[ids].clone().requires_grad_(True)
    slopes = []
    for cut in (True, False):
        value = PooledText(model, 3, cut=cut).of_vectors(vectors).square().sum()
        slopes.append(torch.autograd.grad(value, vectors)[0])
    assert slopes[0].abs().amax(-1).min() > 0
    assert torch.allclose(slopes[0], slopes[1], atol=1e-10)


def problem(model, **options):
    with torch.no_grad():
        wanted = PooledText(model, LENGTH).of_texts(["a red striped star"])
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()), pieces=True)
    return direction_problem(model, wanted, LENGTH, forbidden, **options)


def test_rows_of_the_gradient_belong_to_their_places(model):
    """Promised against actual change of small steps towards other tokens; rows shifted by one promise less well."""
    aim, item = problem(model), torch.zeros(1, dtype=torch.long)
    promised, shifted, actual = [], [], []
    for seed in range(3):
        ids = strings(model, 1, seed=20 + seed)
        loss, slope = aim.gradient(aim.table[ids], item)
        for place in range(LENGTH):
            for token in strings(model, 2, seed=40 + place).flatten():
                step = 1e-3 * (aim.table[token] - aim.table[ids[0, place]])
                moved = aim.table[ids].clone()
                moved[0, place] += step
                actual.append(float(aim.loss(moved, item) - loss))
                promised.append(float(step @ slope[0, place]))
                shifted.append(float(step @ slope[0, (place - 1) % LENGTH]))
    table = torch.corrcoef(torch.tensor([promised, shifted, actual], dtype=torch.float64))
    # The loss is float32, hence not exactly 1.
    assert table[0, 2] > 0.98 and table[0, 2] > table[1, 2] + 0.05, table


def test_the_search_beats_as_many_random_strings(model):
    ledger = 1_500
    found = Gcg(steps=99, candidates=64, top=64, places="spread", distinct=True).run(
        problem(model), Ledger(1, ledger)
    )[0]
    other = RandomStrings(steps=99, draws=200).run(problem(model), Ledger(1, ledger))[0]
    assert found.loss < other.loss and found.admissible and found.realisable
    assert found.realised_loss == pytest.approx(found.loss, abs=1e-6)
    assert found.evaluations <= ledger + 1


def test_the_encoders_rows_are_counted_both_ways(model):
    before = model.cost.snapshot()
    made = Gcg(steps=2, candidates=10, top=20).run(problem(model), Ledger(1, 100))[0]
    counted = model.cost.since(before)
    # The problem itself encodes its target once.
    assert sum(counted.values()) == made.evaluations + 1 and counted["encoder.backward"] == 2


def test_a_step_always_moves_where_copies_are_dropped(model):
    """Without it a candidate that is the current string can win, and the search stands still."""
    seen = {}
    for distinct in (True, False):
        ids = []
        Gcg(steps=12, candidates=6, top=2, distinct=distinct).run(
            problem(model),
            watch=lambda step, now, active, ids=ids: ids.append(now.clone()) or active,
        )
        seen[distinct] = sum(bool((a == b).all()) for a, b in itertools.pairwise(ids))
    assert seen[True] <= seen[False]


def test_an_encoder_with_a_mask_is_passed_whole(model, monkeypatch):
    monkeypatch.setattr(model.text_encoder.config, "use_attention_mask", True, raising=False)
    assert not PooledText(model, LENGTH).cut
