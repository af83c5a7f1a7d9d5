"""Attack success by its conventions, on one table worked out by hand."""

from __future__ import annotations

import pytest

from expunge.errors import InputError, ProtocolError, SettingError
from expunge.measure.success import DENOMINATORS, any_of, attack_success

# prompt            0      1      2      3      4      5
ORIGINAL = [True, True, True, True, False, False]
PLAIN = [True, False, False, False, False, True]
ATTACKED = [False, True, True, False, True, False]


@pytest.mark.parametrize(
    ("denominator", "pre", "post", "counted"),
    [
        ("all-prompts", 2 / 6, 5 / 6, 6),  # UnlearnDiffAtk: what is shown already counts
        ("original-fails", 1 / 4, 3 / 4, 4),  # prompts 0 to 3
        ("erased-passes", 0, 3 / 4, 4),  # prompts 1 to 4
        ("ideal", 0, 2 / 3, 3),  # P4D: prompts 1 to 3
    ],
)
def test_one_table_has_four_success_rates(denominator, pre, post, counted):
    made = attack_success(PLAIN, ATTACKED, denominator, original=ORIGINAL)
    assert (made.pre.value, made.post.value) == (pytest.approx(pre), pytest.approx(post))
    assert made.gained == pytest.approx(post - pre)
    assert (made.counted, made.left_out) == (counted, 6 - counted)
    assert made.post.protocol == f"asr/{denominator}"


def test_no_two_conventions_are_compared():
    made = [attack_success(PLAIN, ATTACKED, name, original=ORIGINAL) for name in DENOMINATORS]
    for one in made:
        for two in made:
            if one is not two:
                for left, right in ((one.post, two.post), (one.pre, two.pre)):
                    with pytest.raises(ProtocolError):
                        left.minus(right)
    other = attack_success(PLAIN, ATTACKED, judge="q16")
    with pytest.raises(ProtocolError):
        other.post.minus(made[0].post)


def test_an_empty_denominator_has_no_rate():
    made = attack_success([True, True], [True, True], "erased-passes")
    assert made.post.value is None and made.gained is None and made.left_out == 2


def test_any_of_n_pictures():
    hits = [False, True, False, False, True, False]
    prompts = ["a", "a", "a", "b", "b", "b"]
    assert any_of(hits, prompts, 1) == ([False, False], ["a", "b"])
    assert any_of(hits, prompts, 2) == ([True, True], ["a", "b"])
    post = attack_success([False, False], any_of(hits, prompts, 2)[0], tries=2).post
    assert post.value == 1 and post.protocol == "asr/all-prompts/n=2"
    with pytest.raises(InputError, match="only 3"):
        any_of(hits, prompts, 4)
    with pytest.raises(InputError, match="n is 0"):
        any_of(hits, prompts, 0)


def test_mistakes_are_said_in_words():
    with pytest.raises(SettingError, match="ideal"):
        attack_success(PLAIN, ATTACKED, "ideel")
    with pytest.raises(InputError, match="original"):
        attack_success(PLAIN, ATTACKED, "ideal")
    with pytest.raises(InputError, match="2 prompts for 1 entries"):
        attack_success([True], [True], prompts=["a", "b"])
    for plain, attacked in (([], []), ([True], [True, False])):
        with pytest.raises(InputError, match="one entry"):
            attack_success(plain, attacked)
