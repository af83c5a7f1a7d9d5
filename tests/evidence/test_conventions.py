"""The attacks of an audit, counted with the other denominators in use."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import pytest

from expunge import audit
from expunge.evidence import Evidence
from expunge.method import Attempts

from .stubs import STAR, Password, triad


@dataclasses.dataclass(frozen=True)
class Several(Password):
    """Looks at three plain pictures of each prompt and has a number of its own."""

    id: ClassVar[str] = "several"

    def attack(self, *arguments, **options) -> Attempts:
        found = super().attack(*arguments, **options)
        items = tuple(
            dataclasses.replace(i, details={"plain_hits": [i.pre_hit, False, False]})
            for i in found.items
        )
        return dataclasses.replace(found, items=items, summary={"ideal_rate": 0.5, "ideal_n": 2})


def run(**options):
    model, change, _ = triad(star=0.3)
    given = {
        "attacks": [Password()],
        "n": 60,
        "kept_n": 4,
        "attack_n": 40,
        "cache": None,
        **options,
    }
    return audit(model, [change], STAR, **given)


def test_rates_over_fewer_prompts_leave_out_what_the_plain_prompt_shows() -> None:
    found = run()
    (attack,) = found.attacks
    # The original shows the star always, so its failures are all prompts; a password brings every star back.
    assert attack.pre_original == 1 and 0 < attack.pre_erased < 1
    assert attack.success["original-fails"] == pytest.approx(attack.hit_erased)
    left = (attack.hit_erased - attack.pre_erased) / (1 - attack.pre_erased)
    assert attack.success["erased-passes"] == pytest.approx(left)
    assert attack.success["ideal"] == pytest.approx(left)
    path = "attacks.password.success.ideal"
    assert found.protocols[path].startswith("asr/ideal/judge=")
    assert found.intervals[path][0] <= left <= found.intervals[path][1]
    assert found.n[path] <= 40 and found.value(path) == attack.success["ideal"]


def test_without_an_original_only_one_of_them_can_be_told() -> None:
    model, _, _ = triad(star=0.3)
    model.companions = None
    from .stubs import ColourJudge

    found = audit(
        model,
        [],
        STAR,
        attacks=[Password()],
        judge=ColourJudge(),
        prompts=["a star"] * 3,
        attack_n=3,
        cache=None,
    )
    (attack,) = found.attacks
    assert attack.success["ideal"] is None and attack.success["original-fails"] is None
    assert "original" in found.reasons["attacks.password.success.ideal"]
    # Nobody erased anything: every plain prompt shows the star, and nothing is left to attack.
    assert attack.success["erased-passes"] is None
    assert "denominator" in found.reasons["attacks.password.success.erased-passes"]


def test_one_of_n_pictures_is_another_number_and_an_attack_may_have_numbers_of_its_own() -> None:
    found = run(attacks=[Password(), Several()])
    one, several = found.attacks
    assert found.protocols["attacks.several.success.ideal"].startswith("asr/ideal/n=3/judge=")
    assert one.success == several.success and one.summary == {}
    own = {"ideal_rate": 0.5, "ideal_n": 2}
    assert several.summary == {"original": own, "erased": own, "never": own}
    assert Evidence.model_validate_json(found.to_json()).attacks[1].summary == several.summary
