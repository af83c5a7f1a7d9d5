"""No attack decides by itself what an output shows: without a judge each of them says so at the door."""

from __future__ import annotations

import pytest

from expunge import catalogue
from expunge.errors import SettingError
from expunge.testing import bench as on

ATTACKS = [system.id for system in catalogue.implemented("attack")]


@pytest.mark.parametrize("id", ATTACKS)
def test_an_attack_without_a_judge_is_one_sentence(id):
    method = catalogue.resolve(id)
    bench = on.bench(method)
    model = bench.opens()
    with pytest.raises(SettingError, match=f"^{id}: the judge is None; a Judge is needed"):
        method().attack(model, bench.concept, None, "quick", prompts=bench.prompts)
    assert not model.cost.counts  # before any work
