"""Prompt optimisers on a toy: a four-layer causal encoder, 200 tokens, a hidden string of four."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from expunge.core.prompt_search import (
    RULES,
    Gcg,
    Genetic,
    Ledger,
    Pez,
    Problem,
    RandomStrings,
    Simplex,
    Soft,
    nearest_tokens,
    project_simplex,
    rule,
)
from expunge.core.prompt_search.simplex import repaired
from expunge.errors import NonFiniteError, SettingError

VOCABULARY, WIDTH, PLACES, TOKENS = 200, 64, 4, 8
FORBIDDEN = (0, 1, 7, 11, 50)


@pytest.fixture(scope="module")
def encoder():
    config = CLIPTextConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPTextModel(config).eval().requires_grad_(False)
    table = model.get_input_embeddings().weight.detach()

    def encode(vectors):
        rows = len(vectors)
        tail = table[1].expand(rows, TOKENS - 1 - PLACES, -1)
        full = torch.cat([table[0].expand(rows, 1, -1), vectors, tail], 1)
        ids = torch.ones(rows, TOKENS, dtype=torch.long)
        handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: full)
        try:
            return model(ids)[0]
        finally:
            handle.remove()

    return table, encode


def allowed() -> torch.Tensor:
    mask = torch.ones(VOCABULARY, dtype=torch.bool)
    mask[list(FORBIDDEN)] = False
    return mask


def hidden_string(seed: int) -> torch.Tensor:
    tokens = allowed().nonzero().flatten()
    return tokens[
        torch.randint(len(tokens), (PLACES,), generator=torch.Generator().manual_seed(seed))
    ]


def problem(encoder, seeds=(0,), **changes) -> Problem:
    table, encode = encoder
    hidden = torch.stack([hidden_string(seed) for seed in seeds])
    target = encode(table[hidden])
    made = {
        "loss": lambda vectors, item: (encode(vectors) - target[item]).square().flatten(1).sum(1),
        "items": len(seeds),
    }
    return Problem(table, PLACES, allowed(), **{**made, **changes})


QUICK = {
    "soft": Soft(steps=30),
    "pez": Pez(steps=30),
    "simplex": Simplex(steps=30, keep="best"),
    "gcg": Gcg(steps=4, candidates=64),
    "genetic": Genetic(steps=4, population=30),
    "random": RandomStrings(steps=3, draws=40),
}


def test_every_rule_is_listed_and_unknown_ones_are_refused():
    assert set(QUICK) == set(RULES)
    assert rule("gcg", steps=3) == Gcg(steps=3)
    with pytest.raises(SettingError, match="did you mean 'gcg'"):
        rule("gcgg")


@pytest.mark.parametrize("name", sorted(QUICK))
def test_planted_solution_is_kept_with_loss_zero(encoder, name):
    """A rule started at the hidden string answers it; started elsewhere it does not have loss 0 at once."""
    hidden = hidden_string(0)
    planted = QUICK[name].run(problem(encoder, start=hidden[None]), seed=3)[0]
    assert planted.loss < 1e-8
    assert torch.equal(planted.ids, hidden)
    few = Ledger(1, max(6, QUICK[name].price(problem(encoder))))
    other = QUICK[name].run(problem(encoder, start=hidden_string(1)[None]), few, seed=3)[0]
    assert other.loss > 1.0


@pytest.mark.parametrize("name", sorted(QUICK))
def test_a_budget_without_one_step_is_refused(encoder, name):
    """An unsearched string must not be shown as found."""
    toy = problem(encoder)
    price = QUICK[name].price(toy)
    with pytest.raises(SettingError, match=f"takes up to {price} rows an item, but the budget"):
        QUICK[name].run(toy, Ledger(1, price - 1))
    assert QUICK[name].run(toy, Ledger(1, price))[0].evaluations > 0


def test_a_reached_goal_ends_the_search(encoder):
    ledger = Ledger(1)
    made = Pez(steps=50).run(problem(encoder, start=hidden_string(0)[None], goal=1e-6), ledger)
    assert made[0].loss <= 1e-6 and int(ledger.spent) == 2


@pytest.mark.parametrize("name", sorted(QUICK))
def test_forbidden_tokens_never_appear(encoder, name):
    seen = []

    def watch(step, ids, active):
        seen.append(ids.clone())
        return active

    # The hidden string is made of forbidden tokens, so an unmasked search would walk into them.
    table, encode = encoder
    target = encode(table[torch.tensor([[7, 11, 50, 7]])])
    masked = problem(
        encoder, loss=lambda vectors, item: (encode(vectors) - target).square().flatten(1).sum(1)
    )
    made = QUICK[name].run(masked, watch=watch)
    strings = torch.cat([*seen, made[0].ids[None]])
    assert not any(int(token) in FORBIDDEN for token in strings.flatten())
    if name == "gcg":  # the control: without the mask it does
        free = Problem(table, PLACES, torch.ones(VOCABULARY, dtype=torch.bool), loss=masked.loss)
        assert any(
            int(t) in FORBIDDEN for t in Gcg(steps=20, candidates=128, top=64).run(free)[0].ids
        )


def test_row_of_the_gradient_belongs_to_its_place(encoder):
    """First-order predictions of single swaps agree with finite substitution; rows shifted by one do not."""
    toy = problem(encoder)
    ids, everyone = hidden_string(5)[None], torch.zeros(1, dtype=torch.long)
    _, slope = toy.gradient(toy.table[ids], everyone)
    generator = torch.Generator().manual_seed(0)
    predicted, shifted, actual = [], [], []
    for place in range(PLACES):
        for token in torch.randint(VOCABULARY, (30,), generator=generator).tolist():
            step = (toy.table[token] - toy.table[ids[0, place]]) * 1e-2
            moved = toy.table[ids].clone()
            moved[0, place] += step
            actual.append(float(toy.loss(moved, everyone)))
            predicted.append(float(slope[0, place] @ step))
            shifted.append(float(slope[0, (place + 1) % PLACES] @ step))
    base = float(toy.loss(toy.table[ids], everyone))
    change = torch.tensor(actual) - base
    right = torch.corrcoef(torch.stack([torch.tensor(predicted), change]))[0, 1]
    wrong = torch.corrcoef(torch.stack([torch.tensor(shifted), change]))[0, 1]
    assert right > 0.98
    assert wrong < right - 0.1


def test_projection_on_the_simplex_is_exact():
    """Against brute force over every support set, which the optimality conditions allow."""
    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2
    found = project_simplex(rows)
    for row, point in zip(rows, found, strict=True):
        best, brute = float("inf"), None
        for bits in range(1, 2**5):
            support = torch.tensor([(bits >> k) & 1 == 1 for k in range(5)])
            candidate = torch.zeros(5, dtype=torch.float64)
            candidate[support] = row[support] + (1 - row[support].sum()) / support.sum()
            if (candidate >= 0).all() and (candidate - row).norm() < best:
                best, brute = float((candidate - row).norm()), candidate
        assert torch.allclose(point, brute, atol=1e-12)
    large = project_simplex(torch.rand(3, 4000) / 100)
    assert torch.allclose(large.sum(-1), torch.ones(3), atol=1e-5) and (large >= 0).all()


def test_nearest_token_is_by_cosine_and_allowed():
    table = torch.tensor([[1.0, 0.0], [10.0, 1.0], [0.0, 3.0]])
    vector = torch.tensor([[2.0, 0.15]])
    assert (
        nearest_tokens(vector, table, torch.tensor([True, True, True])).item() == 1
    )  # Euclid says 0
    assert nearest_tokens(vector, table, torch.tensor([True, False, True])).item() == 0


@pytest.mark.parametrize("name", sorted(QUICK))
def test_ledger_counts_every_row_and_is_never_overdrawn(encoder, name):
    toy = problem(encoder, seeds=(0, 1))
    rows = {"forward": 0, "backward": 0}
    inner = toy.loss

    def loss(vectors, item):
        rows["forward"] += len(item)
        return inner(vectors, item)

    counted = problem(
        encoder,
        seeds=(0, 1),
        loss=loss,
        counted=lambda n: rows.__setitem__("backward", rows["backward"] + n),
    )
    ledger = Ledger(2, 131)
    rule(name).run(counted, ledger) if name != "genetic" else Genetic(population=30).run(
        counted, ledger
    )
    assert int(ledger.spent.sum()) == rows["forward"] + rows["backward"]
    assert int(ledger.spent.max()) <= 131
    assert int(ledger.spent.min()) > 60  # the allowance was used, not refused


@pytest.mark.parametrize("name", sorted(QUICK))
def test_same_seed_same_answer_whoever_else_searches(encoder, name):
    """Private generators: the answer depends neither on the batch nor on the global random state."""
    alone = QUICK[name].run(problem(encoder, seeds=(4,), keys=["x"]), seed=9)[0]
    torch.rand(3)
    state = torch.random.get_rng_state()
    beside = QUICK[name].run(problem(encoder, seeds=(2, 4), keys=["y", "x"]), seed=9)[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(alone.ids, beside.ids)
    assert alone.loss == pytest.approx(beside.loss, rel=1e-4)
    other = QUICK[name].run(problem(encoder, seeds=(4,), keys=["x"]), seed=10)[0]
    assert name in ("soft", "pez", "simplex") or not torch.equal(alone.ids, other.ids)


@pytest.mark.parametrize("name", ["gcg", "genetic", "random"])
def test_what_others_have_left_does_not_matter(encoder, name):
    """Inadmissible strings cost nothing, so items come to their limit at different steps."""

    def even_sum(ids, item):
        return ids.sum(1) % 2 == 0

    found = []
    for seeds, keys in (((4,), ["x"]), ((2, 3, 4), ["y", "z", "x"])):
        made = dataclasses.replace(QUICK[name], steps=100)
        ledger = Ledger(len(seeds), 300)
        toy = problem(encoder, seeds=seeds, keys=keys, admissible=even_sum)
        found.append((made.run(toy, ledger, seed=9)[-1], ledger.spent.tolist()))
    (alone, own), (beside, spent) = found
    assert torch.equal(alone.ids, beside.ids)
    assert [rows for rows, _ in alone.trace] == [rows for rows, _ in beside.trace]
    assert own == spent[-1:] and max(spent) <= 300


def test_watch_stops_an_item_and_spares_its_rows(encoder):
    def watch(step, ids, active):
        return active & torch.tensor([step < 4, True])

    ledger = Ledger(2)
    Simplex(steps=10).run(problem(encoder, seeds=(0, 1)), ledger, watch=watch)
    assert ledger.spent.tolist() == [10, 20]


def test_the_last_string_of_simplex_has_no_loss_of_its_own(encoder):
    """With keep "last" the loss is of another string than the answer, and is named so."""
    toy, everyone = problem(encoder), torch.zeros(1, dtype=torch.long)
    last = Simplex(steps=30).run(toy, seed=1)[0]
    best = Simplex(steps=30, keep="best").run(toy, seed=1)[0]
    assert last.loss is None and last.last_draw_loss > 0
    assert abs(last.last_draw_loss - float(toy.scores(last.ids[None], everyone))) > 1e-3
    assert best.last_draw_loss is None
    assert best.loss == pytest.approx(float(toy.scores(best.ids[None], everyone)), rel=1e-4)
    with pytest.raises(SettingError, match="no loss to reach a goal"):
        Simplex(steps=3).run(problem(encoder, goal=1.0))


def test_given_generators_are_used_from_the_first_step(encoder):
    """So that a caller can rewind them: two runs from one state draw the same strings."""
    generator = torch.Generator().manual_seed(5)

    def losses(**changes):
        found = []
        toy = problem(encoder, **changes)

        def loss(vectors, item):
            made = toy.loss(vectors, item)
            found.append(float(made.detach()))
            return made

        Simplex(steps=4).run(problem(encoder, loss=loss, **changes), seed=7)
        return found

    own, one = losses(), losses(generators=[generator])
    generator.manual_seed(5)
    assert losses(generators=[generator]) == one != own


def test_elitism_never_loses_the_best(encoder):
    def currents(elitism):
        losses = []
        toy = problem(encoder)

        def watch(step, ids, active):
            losses.append(float(toy.scores(ids, torch.zeros(1, dtype=torch.long))))
            return active

        Genetic(steps=40, population=20, mutation=0.6, elitism=elitism).run(toy, watch=watch)
        return torch.tensor(losses)

    assert (currents(True).diff() <= 1e-4).all()
    assert (currents(False).diff() > 1e-4).any()  # the official form


def test_genetic_scores_survivors_once(encoder):
    ledger = Ledger(1)
    Genetic(steps=20, population=40, mutation=0.25).run(problem(encoder), ledger)
    assert int(ledger.spent) < 0.8 * 20 * 40


def test_gcg_alignment_matters(encoder):
    """Aligned rows reach a lower loss than rows shifted by one, at equal rows, over five hidden strings."""
    seeds = (0, 1, 2, 3, 4)
    lows = {}
    for aligned in (True, False):
        made = Gcg(candidates=32, top=8, aligned=aligned).run(
            problem(encoder, seeds=seeds), Ledger(5, 600)
        )
        lows[aligned] = sum(result.loss for result in made)
    assert lows[True] < 0.5 * lows[False]


def test_inadmissible_strings_are_never_the_answer(encoder):
    def even_sum(ids, item):
        return ids.sum(1) % 2 == 0

    for name, made in QUICK.items():
        if name in ("soft",):
            continue
        result = made.run(problem(encoder, seeds=(0, 1, 2), admissible=even_sum))
        assert all(found.admissible and int(found.ids.sum()) % 2 == 0 for found in result), name
    toy = problem(encoder, admissible=even_sum)
    preference = torch.zeros(1, PLACES, int(toy.allowed.sum()))
    preference[..., 0], preference[..., 1], preference[0, 2, 1] = 3.0, 1.0, 2.5
    swapped = repaired(toy, toy.tokens, preference, torch.zeros(1, dtype=torch.long))
    start = toy.tokens[torch.zeros(PLACES, dtype=torch.long)]
    assert int(start.sum()) % 2 == 0 and torch.equal(swapped[0], start)  # nothing to mend
    odd = problem(encoder, admissible=lambda ids, item: ids.sum(1) % 2 == 1)
    mended = repaired(odd, odd.tokens, preference, torch.zeros(1, dtype=torch.long))
    assert (mended[0] != start).nonzero().flatten().tolist() == [2]  # the cheapest swap


def test_gcg_drops_candidates_whose_text_tokenises_otherwise(encoder):
    """Before they are scored; without the setting such strings are scored and accepted."""

    def good(ids):
        return ids.sum(1) % 3 == 0

    scored = []

    def realise(ids, item):
        return ["x"] * len(ids), [list(row) for row in ids.tolist()], good(ids).tolist()

    def score(ids, item):
        scored.append(ids)
        return toy.scores(ids, item)

    toy = problem(encoder, seeds=(0, 1))
    strict = problem(encoder, seeds=(0, 1), realise=realise, score=score)
    made = Gcg(steps=4, candidates=64).run(strict, seed=2)
    assert len(scored) == 4 and all(bool(good(ids).all()) for ids in scored)
    assert all(result.realisable and result.loss is not None for result in made)
    scored.clear()
    loose = Gcg(steps=4, candidates=64, realisable=False).run(strict, seed=2)
    assert not bool(good(torch.cat(scored)).all())
    assert not all(result.realisable for result in loose)

    def never(ids, item):
        return ["x"] * len(ids), [[0]] * len(ids), [False] * len(ids)

    none = problem(encoder, realise=never)
    found = Gcg(steps=2, candidates=8).run(none)[0]
    assert found.loss is None and not found.realisable and found.evaluations == 4


def test_results_are_decoded_tokenised_and_scored_again(encoder):
    texts = ["ab", "cd"]
    asked = []

    def realise(ids, item):
        return [texts[int(i)] for i in item], [[9, 9] for _ in item], [bool(i) for i in item]

    def rescore(found, item):
        asked.extend(found)
        return torch.full((len(found),), 7.0)

    made = Gcg(steps=2, candidates=8).run(
        problem(encoder, seeds=(0, 1), realise=realise, rescore=rescore)
    )
    assert [r.text for r in made] == texts and asked == texts
    assert [r.realisable for r in made] == [False, True]
    assert made[0].retokenised == (9, 9) and made[0].realised_loss == 7.0
    soft = Soft(steps=2).run(problem(encoder, seeds=(0, 1), realise=realise, rescore=rescore))
    assert not soft[1].realisable and soft[1].realised_loss is None


def test_rules_against_random_strings_at_equal_rows(encoder):
    """gcg and genetic reach at most 20 % of the best random loss; soft reaches less than random."""
    rows, seeds = 4_000, (0, 1, 2)
    loss = {
        name: sum(
            r.loss
            for r in made.run(problem(encoder, seeds=seeds, goal=1e-6), Ledger(3, rows), seed=1)
        )
        for name, made in {
            "random": RandomStrings(steps=10**6),
            "gcg": Gcg(candidates=128, top=64, steps=10**6),
            "genetic": Genetic(population=60, steps=10**6),
        }.items()
    }
    loss["soft"] = sum(
        r.loss for r in Soft(steps=200, lr=0.01).run(problem(encoder, seeds=seeds), seed=1)
    )
    assert loss["gcg"] <= 0.2 * loss["random"]
    assert loss["genetic"] <= 0.2 * loss["random"]
    assert loss["soft"] <= loss["random"]


def test_bad_problems_are_refused(encoder):
    table, _ = encoder
    with pytest.raises(SettingError, match="mask"):
        Problem(
            table, 2, torch.zeros(VOCABULARY, dtype=torch.bool), score=lambda ids, item: ids.sum(1)
        )
    with pytest.raises(SettingError, match="missing"):
        Problem(table, 2, allowed())
    with pytest.raises(SettingError, match="not allowed"):
        Problem(
            table, 2, allowed(), score=lambda ids, item: ids.sum(1), start=torch.tensor([[7, 2]])
        )
    with pytest.raises(SettingError, match="only a score"):
        Pez(steps=1).run(Problem(table, 2, allowed(), score=lambda ids, item: ids.sum(1).float()))


def test_small_gradients_survive_half_precision():
    """A mean over a picture has gradients near float16's smallest number, 2^-24, wherever they pass through it."""
    table = torch.eye(8, 4).half()

    def loss(vectors, item):
        return (vectors * 2**-14).float().flatten(1).sum(1) * 2**-12

    problem = Problem(table, 2, torch.ones(8, dtype=torch.bool), loss)
    value, slope = problem.gradient(table[torch.tensor([[0, 1]])], torch.tensor([0]))
    assert slope.dtype == torch.float32 and slope.tolist() == [[[2.0**-26] * 4] * 2]
    assert float(value) == 2 * 2.0**-26
    for name in ("simplex", "pez", "gcg", "soft"):
        (found,) = rule(name, steps=2).run(problem, seed=1)
        assert bool(torch.isfinite(found.vectors).all())
    broken = dataclasses.replace(problem, loss=lambda v, item: v.flatten(1).sum(1) / 0)
    with pytest.raises(NonFiniteError, match="not finite"):
        rule("simplex", steps=2).run(broken, seed=1)
