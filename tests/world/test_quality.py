"""quality.json describes the shipped weights, and what it claims to have reached was reached."""

from __future__ import annotations

import json
from typing import Any

import pytest

from expunge.world import quality

pytestmark = pytest.mark.skipif(not quality.FILE.exists(), reason="the models are not measured yet")


def table() -> dict[str, Any]:
    """The stored table."""
    return json.loads(quality.FILE.read_text("utf-8"))


def rates(part: Any) -> list[dict[str, Any]]:
    """Every rate in a table."""
    if not isinstance(part, dict):
        return []
    own = [part] if {"value", "n", "interval"} <= part.keys() else []
    return own + [found for value in part.values() for found in rates(value)]


def test_every_rate_has_an_interval_around_it() -> None:
    found = rates(table())
    assert found
    for one in found:
        if one["n"]:
            low, high = one["interval"]
            assert low <= one["value"] <= high


def test_targets_are_judged_by_their_own_numbers() -> None:
    for one in rates(table()):
        if "target" in one:
            assert one["met"] == (one["n"] > 0 and one["value"] >= one["target"])


def test_what_is_below_target_is_listed_with_its_value() -> None:
    stored = table()
    listed = stored.pop("missed")
    assert listed == quality.misses(stored)
