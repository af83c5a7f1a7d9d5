"""Gradient surgery: what is orthogonal, what is left alone, and what the published form does instead."""

import pytest
import torch

from expunge.core.gradient_surgery import projected
from expunge.errors import SettingError


def product(one, two, names):
    return float(sum((one[n].double() * two[n].double()).sum() for n in names))


def gradients(seed):
    draw = torch.Generator().manual_seed(seed)
    return {n: torch.randn(3, 4, generator=draw) for n in ("left", "right")}


def test_exact_is_orthogonal_where_they_conflict_and_nothing_changes_elsewhere():
    a = {"with": torch.tensor([1.0, 2.0]), "against": torch.tensor([1.0, -3.0])}
    b = {"with": torch.tensor([1.0, 0.0]), "against": torch.tensor([0.0, 2.0])}
    found, conflicts = projected(a, b)
    assert conflicts == 0.5
    assert torch.equal(found["with"], a["with"])
    assert found["against"].tolist() == [1.0, 0.0]
    assert a["against"].tolist() == [1.0, -3.0]  # the input is not changed


@pytest.mark.parametrize("whole", [False, True])
def test_the_projected_gradient_never_raises_the_protected_loss(whole):
    """Of all gradients that do not oppose b it is the nearest to a."""
    for seed in range(20):
        a, b = gradients(seed), gradients(seed + 100)
        found, _ = projected(a, b, whole=whole)
        groups = [["left", "right"]] if whole else [["left"], ["right"]]
        for names in groups:
            against, after = product(a, b, names), product(found, b, names)
            assert after == pytest.approx(max(against, 0.0), abs=1e-5)
            # Nearest: what was taken away is a multiple of b.
            away = {n: a[n] - found[n] for n in names}
            lengths = product(away, away, names) * product(b, b, names)
            assert product(away, b, names) ** 2 == pytest.approx(lengths, rel=1e-5)


def test_whole_and_each_differ():
    a = {"x": torch.tensor([1.0]), "y": torch.tensor([-1.0])}
    b = {"x": torch.tensor([3.0]), "y": torch.tensor([1.0])}
    assert projected(a, b, whole=True) == (a, 0.0)
    each, conflicts = projected(a, b)
    assert (each["y"].item(), conflicts) == (0.0, 0.5)


def test_the_official_form_over_corrects_below_unit_length_and_agrees_at_it():
    b = {"w": torch.tensor([0.0, 5.0])}
    unit = {"w": torch.tensor([0.6, -0.8])}
    short = {"w": 0.5 * unit["w"]}
    made = [
        projected(gradient, b, form=form)[0]["w"]
        for gradient, form in ((unit, "official"), (short, "official"), (short, "exact"))
    ]
    # |cos| (1 - ||a||) along b^ is what the official form leaves: 0.8 * 0.5.
    expected = torch.tensor([[0.6, 0.0], [0.3, 0.4], [0.3, 0.0]])
    torch.testing.assert_close(torch.stack(made), expected, atol=1e-6, rtol=0)


def test_strength_zero_tensors_and_names_that_only_one_side_has():
    a, b = {"w": torch.tensor([0.0, -1.0]), "own": torch.ones(2)}, {"w": torch.tensor([0.0, 2.0])}
    assert projected(a, b, strength=0.5)[0]["w"].tolist() == [0.0, -0.5]
    assert projected(a, b)[0]["own"] is a["own"]
    still, conflicts = projected(a, {"w": torch.zeros(2)})
    assert conflicts == 0.0 and torch.equal(still["w"], a["w"])
    with pytest.raises(SettingError, match="'exact', 'official'"):
        projected(a, b, form="eksact")
