"""What UCE and RECE minimise, written out row by row and solved by generic least squares, for every token policy.

The solutions are compared in float64, before they are stored.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.core import debias, projections
from expunge.core.token_policy import POLICIES, kept_rows, paired_rows, span
from expunge.erase.diffusion import rece, uce
from expunge.method import Judge, Verdicts
from expunge.testing import tiny_diffusion

STAR = Concept("star", phrases=("red star",), anchor="circle")
PAIRS = [("star", "circle"), ("red star", "circle")]
KEPT = ["heart", "a blue square"]
A, B = 0.8, 0.3


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture
def solved(monkeypatch):
    """What was solved, by name of the matrix, in float64: filled by every edit that is made."""
    found: dict[str, torch.Tensor] = {}

    def shared(method, model, concepts, groups, **rest):
        for group, solution in groups:
            found.update({n: w.double() @ solution.change for n, w in group.weights.items()})
        return projections.shared_edit(method, model, concepts, groups, **rest)

    def own(method, model, concepts, groups, ridge, **rest):
        for _, moments in groups:
            found.update(moments.solve(ridge)[0])
        return projections.per_layer_edit(method, model, concepts, groups, ridge, **rest)

    for module in (uce, rece, debias):
        monkeypatch.setattr(module, "shared_edit", shared)
    monkeypatch.setattr(uce, "per_layer_edit", own)
    return found


def weights(model) -> dict[str, torch.Tensor]:
    return {name: model.tensors()[name].detach().double() for name in model.text_projections()}


def embedded(model, text):
    """Span and rows of one text."""
    found = span(model.tokenizer, model.token_ids([text])[0].tolist())
    return found, model.encode([text]).embeddings[0].double()


def mapped(model, pairs, policy):
    """Rows of every pair, one pair an entry."""
    found = []
    for old, new in pairs:
        (one, c), (two, g) = embedded(model, old), embedded(model, new)
        a, b = paired_rows(policy, one, two)
        found.append((c[a], g[b]))
    return found


def held(model, texts, policy):
    found = []
    for text in texts:
        one, rows = embedded(model, text)
        found.append(rows[kept_rows(policy, one)])
    return torch.cat(found)


def kept_under(policy):
    return ["", *KEPT] if policy == "last_token_to_end_aligned" else KEPT


def least_squares(old, blocks, ridge):
    """The minimiser of ``sum weight ||W x - y||^2 + ridge ||W - old||^2`` over blocks ``(x, y, weight)``."""
    left = [weight**0.5 * x for x, _, weight in blocks]
    right = [weight**0.5 * y for _, y, weight in blocks]
    left.append(ridge**0.5 * torch.eye(old.shape[1]).double())
    right.append(ridge**0.5 * old.T)
    return torch.linalg.lstsq(torch.cat(left), torch.cat(right), driver="gelsd").solution.T


def worst(solved, old, new):
    return max(
        float((solved[n] - (new[n] - w)).norm() / (new[n] - w).norm()) for n, w in old.items()
    )


class Half(Judge):
    """All pictures show the first attribute when asked first, later all the second but a tenth."""

    id, protocol, threshold = "half", "half/1", 0.5

    def __init__(self):
        self.calls = 0

    def judge(self, outputs, concept, prompts):
        n = len(outputs)
        first, self.calls = concept.name == "red", self.calls + 1
        share = 1.0 if self.calls <= 2 else 0.4
        score = np.where(np.arange(n) < share * n, 0.9, 0.1) if first else np.full(n, 0.5)
        return Verdicts(score > 0.5, score, np.ones(n, bool))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("technique", ["replace", "tensor"])
def test_uce_minimises_its_objective(model, solved, policy, technique):
    made = uce.UCE(erase_scale=A, preserve_scale=B, ridge=0.2, tokens=policy, technique=technique)
    made.erase(model, STAR, keep=KEPT)
    old, p = weights(model), held(model, kept_under(policy), policy)
    new, other = {}, {}
    for name, w in old.items():
        blocks = [(p, p @ w.T, B)]
        for c, g in mapped(model, PAIRS, policy):
            values = g @ w.T
            if technique == "tensor":
                unit = c @ w.T / (c @ w.T).norm()
                values = values - (unit * values).sum() * unit
            blocks.append((c, values, A))
        new[name] = least_squares(w, blocks, 0.2)
        other[name] = least_squares(w, blocks, 0.21)
    assert worst(solved, old, new) < 1e-6
    assert worst(solved, old, other) > 1e-4  # control: another ridge is another objective


@pytest.mark.parametrize("policy", POLICIES)
def test_debiasing_minimises_its_objective(model, solved, policy):
    made = uce.UCE(
        erase_scale=A, preserve_scale=B, ridge=0.2, tokens=policy, technique="debias", rounds=2,
        attributes=("red", "a blue photo"), sampling_steps=1,
    )  # fmt: skip
    edit = made.erase(model, Concept("green star"), keep=KEPT, judge=Half())
    sums = edit.manifest.report["rounds"][-1]["green star"]["s"]
    np.testing.assert_allclose(sums, [-0.4, 0.4])
    one, rows = embedded(model, "green star")
    own, _ = paired_rows(policy, one, one)
    wished = rows.clone()
    for s, attribute in zip(sums, made.attributes, strict=True):
        two, other = embedded(model, attribute)
        a, b = paired_rows(policy, one, two)
        assert set(a) <= set(own)
        wished[a] += s * other[b]
    old, p = weights(model), held(model, kept_under(policy), policy)
    new = {
        name: least_squares(w, [(rows[own], wished[own] @ w.T, A), (p, p @ w.T, B)], 0.2)
        for name, w in old.items()
    }
    assert worst(solved, old, new) < 1e-6


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("together", [False, True], ids=["epochs", "accumulate"])
def test_rece_minimises_its_objectives(model, solved, policy, together):
    made = rece.RECE(
        epochs=2, derive_ridge=0.05, erase_scale=A, preserve_scale=B, ridge=0.2, tokens=policy,
        epoch_erase_scale=0.6, epoch_preserve_scale=0.4, epoch_ridge=0.3, accumulate=together,
    )  # fmt: skip
    made.erase(model, STAR, keep=KEPT)
    old, p = weights(model), held(model, kept_under(policy), policy)
    first = mapped(model, PAIRS, policy)
    whole = mapped(model, PAIRS, "all_rows")
    c, g = (torch.cat([pair[i] for pair in whole]) for i in (0, 1))
    again = held(model, ["", *KEPT], "all_rows")

    def stage(w, derived):
        blocks = [(p, p @ w.T, B), *((x, y @ w.T, A) for x, y in first)]
        return least_squares(w, [*blocks, *((x, g @ w.T, 0.6) for x in derived)], 0.2)

    derived: list[torch.Tensor] = []
    new = {name: stage(w, ()) for name, w in old.items()}
    for _ in range(2):
        # c' of all rows: min ||W c' - O c||^2 + r ||c'||^2, every layer's rows stacked.
        present = torch.cat([*new.values(), 0.05**0.5 * torch.eye(c.shape[1]).double()])
        values = torch.cat([c @ w.T for w in old.values()] + [torch.zeros_like(c)], dim=1).T
        derived.append(torch.linalg.lstsq(present, values, driver="gelsd").solution.T)
        if together:
            new = {name: stage(w, derived) for name, w in old.items()}
        else:
            new = {
                name: least_squares(
                    w, [(derived[-1], g @ w.T, 0.6), (again, again @ w.T, 0.4)], 0.3
                )
                for name, w in new.items()
            }
    assert worst(solved, old, new) < 1e-6
