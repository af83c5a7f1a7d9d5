"""Prompt optimisers behind the attacks: one problem, one ledger of rows, six rules.

    soft     free vectors (textual inversion): the upper bound, no text
    pez      descend on vectors, evaluate at the nearest tokens
    simplex  a distribution over tokens for each place, projected (UnlearnDiffAtk)
    gcg      swaps proposed by the gradient, the best of a batch accepted
    genetic  crossover and mutation, scores only (Ring-A-Bell)
    random   uniform strings: the control

    results = rule("gcg", steps=200).run(problem, Ledger(problem.items, limit=20_000), seed=1)

Comparisons mean something only at equal rows: give every rule the same ``limit``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import SettingError, nearest
from .common import Ledger, Problem, Watch, nearest_tokens, project_simplex
from .gcg import Gcg
from .genetic import Genetic
from .pez import Pez
from .random import RandomStrings
from .rule import Rule
from .search import Result, Search
from .simplex import Simplex
from .soft import Soft

__all__ = [
    "RULES",
    "Gcg",
    "Genetic",
    "Ledger",
    "Pez",
    "Problem",
    "RandomStrings",
    "Result",
    "Rule",
    "Search",
    "Simplex",
    "Soft",
    "Watch",
    "nearest_tokens",
    "project_simplex",
    "rule",
]

RULES: Mapping[str, type[Rule]] = {
    kind.name: kind for kind in (Soft, Pez, Simplex, Gcg, Genetic, RandomStrings)
}


def rule(name: str, **settings: Any) -> Rule:
    """A rule by name with its settings.

    Raises:
        SettingError: An unknown rule, with the nearest name.
    """
    if name not in RULES:
        raise SettingError(f"prompt search {name!r} is unknown{nearest(name, RULES)}")
    return RULES[name](**settings)
