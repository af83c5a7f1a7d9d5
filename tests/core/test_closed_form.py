"""Closed forms against brute force, identities, streaming, thin factors, guards and RECE's figures."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from scipy.optimize import minimize

from expunge.core.closed_form import (
    Moments,
    ValueMoments,
    gram,
    layer_changes,
    moved,
)
from expunge.core.derivation import REGULARISATIONS, derive, norm_budgeted, residuals
from expunge.core.factors import thin_factors
from expunge.errors import NonFiniteError, NumericalError, SettingError

WIDTH = 24


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def matrices(seed: int = 0, count: int = 3) -> dict[str, torch.Tensor]:
    return {f"layer{i}": draw(seed * 100 + i, 10 + 7 * i, WIDTH) / WIDTH**0.5 for i in range(count)}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def stacked_least_squares(rows, values, weights, old, ridge):
    """Brute force: the weighted least-squares problem written out with every row, and ridge rows."""
    left = torch.cat(
        [rows * weights.sqrt()[:, None], ridge**0.5 * torch.eye(rows.shape[1]).double()]
    )
    right = torch.cat([values * weights.sqrt()[:, None], ridge**0.5 * old.T])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def minimised(objective, start: torch.Tensor) -> torch.Tensor:
    """The minimiser that a general optimiser finds, from gradients alone."""

    def value_and_gradient(flat):
        x = torch.from_numpy(flat).reshape(start.shape).requires_grad_()
        loss = objective(x)
        gradient = torch.autograd.grad(loss, x)[0]
        return float(loss.detach()), gradient.reshape(-1).numpy()

    found = minimize(
        value_and_gradient, start.reshape(-1).numpy(), jac=True, method="L-BFGS-B",
        options={"maxiter": 20_000, "maxfun": 20_000, "maxcor": 60, "ftol": 0, "gtol": 1e-11},
    )  # fmt: skip
    return torch.from_numpy(found.x).reshape(start.shape)


@pytest.mark.parametrize("ridge", [0.01, 0.5, 30.0])
def test_the_solution_is_that_of_the_stacked_least_squares_problem(ridge):
    c, g, p = draw(1, 9, WIDTH), draw(2, 9, WIDTH), draw(3, 14, WIDTH)
    weights = draw(4, 9).abs() + 0.1
    moments = Moments(WIDTH)
    moments.erase(c, g, 1.7, weights)
    moments.keep(p, 0.3)
    change = moments.solve(ridge).change
    for old in matrices().values():
        wanted = stacked_least_squares(
            torch.cat([c, p]),
            torch.cat([g, p]) @ old.T,
            torch.cat([1.7 * weights, torch.full((14,), 0.3).double()]),
            old,
            ridge,
        )
        assert relative(old + old @ change, wanted) < 1e-6
        # Control: another ridge is another solution.
        assert relative(old + old @ moments.solve(3 * ridge).change, wanted) > 1e-4


def test_a_gradient_method_does_not_find_a_better_solution():
    c, g, p = draw(1, 5, WIDTH), draw(2, 5, WIDTH), draw(3, 6, WIDTH)
    moments = Moments(WIDTH)
    moments.erase(c, g)
    moments.keep(p, 0.5)
    old = matrices()["layer1"]

    def objective(w):
        erase = (w @ c.T - old @ g.T).square().sum() + 0.5 * (w @ p.T - old @ p.T).square().sum()
        return erase + 0.1 * (w - old).square().sum()

    best = minimised(objective, old)
    mine = old + old @ moments.solve(0.1).change
    assert relative(mine, best) < 1e-6
    assert objective(mine) < objective(old) / 2


def test_nothing_to_erase_and_erasing_onto_itself_change_nothing():
    c, g, p = draw(1, 5, WIDTH), draw(2, 5, WIDTH), draw(3, 6, WIDTH)
    nothing, itself, something = Moments(WIDTH), Moments(WIDTH), Moments(WIDTH)
    for moments in (nothing, itself, something):
        moments.keep(p)
    itself.erase(c, c.clone())
    something.erase(c, g)
    assert not nothing.solve(0.5).change.any()
    assert not itself.solve(0.5).change.any()
    assert something.solve(0.5).change.norm() > 0.1
    left, right, error = thin_factors(nothing.solve(0.5).change, 0)
    assert left.shape == (WIDTH, 1) and not (left @ right).any() and error == 0


def test_preserving_holds_what_is_kept():
    c, g, p = draw(1, 5, WIDTH), draw(2, 5, WIDTH), draw(3, 6, WIDTH)
    values = gram(matrices())
    drift = []
    for scale in (0.0, 1.0, 100.0):
        moments = Moments(WIDTH)
        moments.erase(c, g)
        moments.keep(p, scale)
        change = moments.solve(0.1).change
        drift.append(moved(change.T @ values @ change, values, p))
    assert drift[0] > 3 * drift[1] > 9 * drift[2]


def test_streamed_moments_equal_those_of_one_batch(monkeypatch):
    c, g, p = draw(1, 50, WIDTH), draw(2, 50, WIDTH), draw(3, 31, WIDTH)
    whole = Moments(WIDTH)
    whole.erase(c, g, 2.0)
    whole.keep(p, 0.5)
    monkeypatch.setattr("expunge.core.closed_form.CHUNK", 7)
    pieces = Moments(WIDTH)
    for start in range(0, 50, 13):
        pieces.erase(c[start : start + 13], g[start : start + 13], 2.0)
    pieces.keep(p, 0.5)
    sums = Moments(WIDTH)
    sums.erase(c, g)
    assert pieces.erase_rows == 50 and pieces.keep_rows == 31
    for name in ("shift", "source", "target", "kept"):
        assert relative(getattr(pieces, name), getattr(whole, name)) < 1e-13
    doubled = Moments(WIDTH).plus(sums, erase=2.0)
    assert relative(doubled.shift, whole.shift) < 1e-13


def test_values_per_matrix_agree_with_the_shared_solution_and_with_brute_force():
    c, g, p = draw(1, 6, WIDTH), draw(2, 6, WIDTH), draw(3, 8, WIDTH)
    weights, other = matrices(), matrices(seed=1)
    shared = Moments(WIDTH)
    shared.erase(c, g, 0.7)
    shared.keep(p, 0.2)
    own = ValueMoments(weights)
    own.erase(c, {name: g @ w.T for name, w in weights.items()}, 0.7)
    own.keep_moment(p.T @ p, len(p), 0.2)
    change = shared.solve(0.1).change
    for name, delta in own.solve(0.1)[0]:
        assert relative(delta, weights[name] @ change) < 1e-9
    # Fusion: the ridge pulls to ``weights``, kept rows keep the value of ``other``.
    fusion = ValueMoments(weights)
    wished = {name: draw(9, 6, w.shape[0]) for name, w in weights.items()}
    fusion.erase(c, wished, 0.7)
    fusion.keep_moment(p.T @ p, len(p), 0.2, originals=other)
    scales = torch.cat([torch.full((6,), 0.7), torch.full((8,), 0.2)]).double()
    for name, delta in fusion.solve(0.1)[0]:
        values = torch.cat([wished[name], p @ other[name].T])
        wanted = stacked_least_squares(torch.cat([c, p]), values, scales, weights[name], 0.1)
        assert relative(weights[name] + delta, wanted) < 1e-6


@pytest.mark.parametrize("rows", [2, 5, 40])
def test_thin_factors_are_exact_in_float32_and_close_in_float16(rows):
    width = 96
    moments = Moments(width)
    moments.erase(4 * draw(1, rows, width), 4 * draw(2, rows, width))
    moments.keep(4 * draw(3, 20, width))
    solution = moments.solve(0.5)
    left, right, error = thin_factors(solution.change, solution.rank_bound)
    assert left.shape == (width, rows) and right.shape == (rows, width) and error < 1e-7
    weight = draw(4, 50, width)
    wanted = weight @ solution.change
    assert relative(weight @ left.float().double() @ right.float().double(), wanted) < 1e-5
    assert relative(weight @ left.half().double() @ right.half().double(), wanted) < 1e-3
    # Control: one column short is no longer the same change.
    assert relative(weight @ left[:, :-1] @ right[:-1], wanted) > 1e-5


def test_thin_factors_survive_a_wrong_rank_bound():
    matrix = draw(1, 60, 40) @ draw(2, 40, 60)
    left, _, error = thin_factors(matrix, 3)
    assert left.shape[1] == 40 and error < 1e-7


def test_solutions_compose_as_the_matrices_do():
    first, second = Moments(WIDTH), Moments(WIDTH)
    first.erase(draw(1, 3, WIDTH), draw(2, 3, WIDTH))
    second.erase(draw(3, 2, WIDTH), draw(4, 2, WIDTH))
    one, two = first.solve(0.5), second.solve(0.1)
    weight = draw(5, 7, WIDTH)
    stepwise = weight + weight @ one.change
    stepwise = stepwise + stepwise @ two.change
    both = one.then(two)
    assert relative(weight + weight @ both.change, stepwise) < 1e-12
    assert both.rank_bound == 5 and thin_factors(both.change, 5)[0].shape[1] == 5
    assert both.condition == max(one.condition, two.condition)


def test_the_condition_number_is_estimated_and_hopeless_systems_are_refused():
    moments = Moments(WIDTH)
    moments.erase(draw(1, 4, WIDTH), draw(2, 4, WIDTH))
    exact = torch.linalg.cond(moments.source + 1e-3 * torch.eye(WIDTH), p=1)
    assert 0.1 * exact < moments.solve(1e-3).condition < 10 * exact
    with pytest.raises(NumericalError, match="ridge"):
        moments.solve(0.0)
    with pytest.raises(NumericalError):
        moments.solve(1e-12)
    full = Moments(WIDTH)
    full.erase(draw(1, 4, WIDTH), draw(2, 4, WIDTH))
    full.keep(draw(3, 60, WIDTH))
    assert full.solve(0.0).condition < 1e6
    full.erase(torch.full((1, WIDTH), math.nan), torch.zeros(1, WIDTH))
    with pytest.raises(NonFiniteError):
        full.solve(0.5)


def test_rows_of_a_wrong_shape_are_refused():
    moments = Moments(WIDTH)
    with pytest.raises(SettingError, match="shape"):
        moments.erase(draw(1, 4, WIDTH), draw(2, 3, WIDTH))
    with pytest.raises(SettingError, match="shape"):
        moments.keep(draw(1, 4, WIDTH + 1))
    with pytest.raises(SettingError, match="weights"):
        moments.keep(draw(1, 4, WIDTH), weights=draw(1, 3))


def test_the_report_of_layers_is_the_change_of_the_layers():
    moments = Moments(WIDTH)
    moments.erase(draw(1, 4, WIDTH), draw(2, 4, WIDTH))
    solution = moments.solve(0.5)
    left, right, _ = thin_factors(solution.change, 4)
    weights = matrices()
    for name, ratio in layer_changes(weights, left, right).items():
        wanted = (weights[name] @ solution.change).norm() / weights[name].norm()
        assert ratio == pytest.approx(float(wanted), rel=1e-4)
    rows = draw(6, 5, WIDTH)
    stack = torch.cat(list(weights.values()))
    wanted = ((rows @ solution.change.T @ stack.T).norm(dim=1) / (rows @ stack.T).norm(dim=1)) ** 2
    shift = gram({name: w @ solution.change for name, w in weights.items()})
    assert moved(shift, gram(weights), rows) == pytest.approx(float(wanted.mean()))


def edited_and_original() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    moments = Moments(WIDTH)
    moments.erase(2 * draw(1, 4, WIDTH), draw(2, 4, WIDTH))
    weights = matrices(count=4)
    change = moments.solve(0.5).change
    original = torch.cat(list(weights.values()))
    edited = original + original @ change
    return edited, original, 2 * draw(7, 3, WIDTH), draw(8, 3, WIDTH)


@pytest.mark.parametrize("regularisation", REGULARISATIONS)
@pytest.mark.parametrize("ridge", [1e-3, 0.5])
def test_derived_rows_minimise_their_objective(regularisation, ridge):
    edited, original, c, t = edited_and_original()
    derivation = derive(edited.T @ edited, edited.T @ original, ridge, regularisation)
    mine = derivation.rows(c, t)

    def objective(x):
        loss = (x @ edited.T - c @ original.T).square().sum()
        if regularisation == "zero":
            loss = loss + ridge * x.square().sum()
        if regularisation == "standard":
            loss = loss + ridge * (x - t).square().sum()
        if regularisation in ("first", "both"):
            loss = loss + ridge * ((x - c) @ edited.T).square().sum()
        if regularisation in ("second", "both"):
            loss = loss + ridge * (x - c).square().sum()
        return loss

    assert relative(mine, minimised(objective, c)) < 1e-6
    assert objective(mine) < objective(c)


@pytest.mark.parametrize("regularisation", REGULARISATIONS)
def test_moments_of_derived_rows_follow_from_those_of_the_concept(regularisation):
    edited, original, c, t = edited_and_original()
    derivation = derive(edited.T @ edited, edited.T @ original, 0.1, regularisation)
    moments = Moments(WIDTH)
    moments.erase(c, t, 1.3)
    direct = Moments(WIDTH)
    direct.erase(derivation.rows(c, t), t, 1.3)
    found = moments.derived(derivation)
    for name in ("shift", "source", "target"):
        assert relative(getattr(found, name), getattr(direct, name)) < 1e-10
    assert found.erase_rows == 3 and not found.kept.any()


def test_the_norm_budget_is_met_exactly_and_a_larger_one_recovers_more():
    edited, original, c, _ = edited_and_original()
    grams = edited.T @ edited, edited.T @ original
    before = torch.full((3,), math.inf).double()
    for budget in (0.2, 0.5, 1.0, 2.0, 4.0):
        rows, ridge = norm_budgeted(*grams, c, budget)
        norms = rows.norm(dim=1) / c.norm(dim=1)
        active = ridge > 1e-9
        assert (norms <= budget * (1 + 1e-9)).all()
        assert torch.allclose(norms[active], torch.full_like(norms[active], budget), rtol=1e-9)
        for row, r, source in zip(rows, ridge, c, strict=True):
            wanted = derive(*grams, float(r)).rows(source[None])[0] if r > 1e-6 else None
            assert wanted is None or relative(row, wanted) < 1e-8
        now = residuals(*grams, original.T @ original, rows, c)
        assert (now <= before + 1e-9).all()
        before = now
    assert (before < 0.5).all()


def test_an_unedited_model_gives_back_the_row_itself_or_shrunk():
    _, original, c, _ = edited_and_original()
    same = original.T @ original
    rows, _ = norm_budgeted(same, same, c, 2.0)
    assert relative(rows, c) < 1e-6
    rows, _ = norm_budgeted(same, same, c, 0.5)
    assert torch.allclose(rows.norm(dim=1), c.norm(dim=1) / 2)
    assert (torch.nn.functional.cosine_similarity(rows, c) > 0.9).all()


# -- RECE's linear experiment --------------------------------------------------------------------


@dataclasses.dataclass
class LinearWorld:
    """Eight 64 x 64 matrices and embeddings with a common mean, 85 % of their energy."""

    seed: int

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)
        width = 64

        def normal(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        weights = {str(i): normal(width, width) / width**0.5 for i in range(8)}
        mean = normal(width)

        def embeddings(n):
            return 4 * (0.85**0.5 * mean + 0.15**0.5 * normal(n, width)) / width**0.5

        self.c, self.g, self.kept, self.unrelated = (embeddings(n) for n in (1, 1, 8, 50))
        self.gram = gram(weights)
        self.pair, self.held = Moments(width), Moments(width)
        self.pair.erase(self.c, self.g)
        self.held.keep(self.kept)

    def run(
        self, epochs: int, ridge: float, accumulate: bool = False
    ) -> list[tuple[float, float, float]]:
        """(residual at budget 4, drift, residual of the concept itself) after UCE and each epoch."""
        stage = self.pair.plus(self.held)
        solution = stage.solve(0.5)
        found = [self.measure(solution)]
        for _ in range(epochs):
            right = torch.eye(64).double() + solution.change
            derived = self.pair.derived(
                derive(right.T @ self.gram @ right, right.T @ self.gram, ridge)
            )
            if accumulate:
                stage = stage.plus(derived)
                solution = stage.solve(0.5)
            else:
                solution = solution.then(derived.plus(self.held, keep=0.1).solve(0.1))
            found.append(self.measure(solution))
        return found

    def measure(self, solution):
        right = torch.eye(64).double() + solution.change
        grams = right.T @ self.gram @ right, right.T @ self.gram
        rows, _ = norm_budgeted(*grams, self.c, 4.0)
        budgeted = residuals(*grams, self.gram, rows, self.c)
        direct = residuals(*grams, self.gram, self.c, self.c)
        shift = solution.change.T @ self.gram @ solution.change
        return float(budgeted), moved(shift, self.gram, self.unrelated), float(direct)


def test_one_epoch_makes_the_budgeted_attack_fail_at_little_cost():
    found = torch.tensor([LinearWorld(seed).run(1, 1e-3) for seed in range(10)]).mean(0)
    uce, rece = found
    assert uce[0] < 0.05  # the attack sees through UCE
    assert rece[0] >= 4 * uce[0]
    assert rece[1] <= 1.5 * uce[1]


def test_keeping_all_pairs_costs_less_drift_and_resists_as_well():
    free = torch.tensor([LinearWorld(seed).run(4, 0.1) for seed in range(10)]).mean(0)
    kept = torch.tensor(
        [LinearWorld(seed).run(4, 0.1, accumulate=True) for seed in range(10)]
    ).mean(0)
    # More epochs are not free: at least three times the drift of UCE.
    assert free[-1, 1] > 3 * free[0, 1]
    assert kept[-1, 1] < 0.75 * free[-1, 1]
    assert kept[-1, 0] > 0.9 * free[-1, 0]
    # The concept's own embedding: between UCE's value and 1.5 times it in both.
    for run in (free, kept):
        assert (run[1:, 2] > 0.7 * run[0, 2]).all() and (run[1:, 2] < 1.5 * run[0, 2]).all()


def test_values_of_low_rank_changes_follow_from_the_moment_of_the_rows():
    c, weights = draw(1, 6, WIDTH), matrices()
    changes = {n: (draw(2, w.shape[0], 2), draw(3, 2, WIDTH)) for n, w in weights.items()}
    rows, moment = ValueMoments(weights), ValueMoments(weights)
    rows.erase(c, {n: c @ (w + changes[n][0] @ changes[n][1]).T for n, w in weights.items()}, 0.7)
    moment.erase_moment(c.T @ c, 6, changes, 0.7)
    assert moment.erase_rows == 6
    assert relative(moment.system, rows.system) < 1e-12
    wanted = dict(rows.solve(0.1)[0])
    for name, delta in moment.solve(0.1)[0]:
        assert relative(delta, wanted[name]) < 1e-9
