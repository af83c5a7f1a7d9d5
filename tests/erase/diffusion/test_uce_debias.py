"""UCE's debiasing loop with a judge whose shares are known: rounds, accumulation, solves, ends, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.core.token_policy import POLICIES, stream_pairs, stream_rows
from expunge.erase.diffusion.uce import UCE
from expunge.errors import NumericalError, SettingError
from expunge.method import Judge, Prompt, Verdicts
from expunge.models.base import Companions
from expunge.testing import tiny_diffusion

STAR = Concept("star")
ATTRIBUTES = ("red", "blue")


def method(**more):
    small = {"sampling_steps": 2, "technique": "debias", "attributes": ATTRIBUTES}
    return UCE(**(small | more))


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def stacked(model) -> torch.Tensor:
    tensors = model.tensors()
    return torch.cat([tensors[name].detach().double() for name in model.text_projections()])


class Scripted(Judge):
    """Says in which share of the pictures the first attribute prevails, one call of ``shares`` a measurement."""

    id, protocol, threshold = "scripted", "scripted/1", 0.5

    def __init__(self, shares, recognisable=None):
        self.shares, self.recognisable = shares, recognisable
        self.seen, self.prompts = [], []

    def judge(self, outputs, concept, prompts):
        n = len(outputs)
        if concept.name == ATTRIBUTES[0]:
            self.seen.append(np.array(outputs))
            self.prompts.append(list(prompts))
            self.now = np.arange(n) < round(self.shares(len(self.seen) - 1) * n)
        score = np.where(self.now, 0.9, 0.1) if concept.name == ATTRIBUTES[0] else np.full(n, 0.5)
        known = np.ones(n, bool) if self.recognisable is None else self.recognisable(n)
        return Verdicts(score >= 0.5, score, known)


def rounds(edit, name="star"):
    found = [entry[name] for entry in edit.manifest.report["rounds"]]
    return [entry["shares"] for entry in found], [entry["s"] for entry in found]


def expected(model, sums, ridge=0.5, kept=(), pairs=(("star", "red"), ("star", "blue"))):
    """Every matrix by generic least squares with the value ``W (c + sum s attr)`` for ``c``."""
    text = model.text_inputs()[0]
    rows = [next(iter(stream_pairs(text, [pair], "last_token"))) for pair in pairs]
    c = rows[0].sources.double()
    g = c + sum(s * block.targets.double() for s, block in zip(sums, rows, strict=True))
    held = [next(iter(stream_rows(text, [name], "last_token"))).double() for name in kept]
    left = torch.cat([c, *held, ridge**0.5 * torch.eye(c.shape[1]).double()])
    w = stacked(model)
    values = torch.cat([g @ w.T, *(p @ w.T for p in held), ridge**0.5 * w.T])
    return torch.linalg.lstsq(left, values, driver="gelsd").solution.T


def test_it_converges_where_the_pictures_follow_and_reports_every_round(model):
    judge = Scripted([1.0, 0.8, 0.6, 0.5].__getitem__)
    edit = method().erase(model, STAR, judge=judge)
    shares, sums = rounds(edit)
    assert shares == [[1.0, 0.0], [0.8, pytest.approx(0.2)], [0.6, 0.4], [0.5, 0.5]]
    # s accumulates: -0.5, -0.5 - 0.3, -0.5 - 0.3 - 0.1.
    np.testing.assert_allclose([row[0] for row in sums], [0, -0.5, -0.8, -0.9], atol=1e-12)
    np.testing.assert_allclose(np.sum(sums, axis=1), 0, atol=1e-12)
    report = edit.manifest.report
    assert report["met"] is True and report["wanted"] == [0.5, 0.5]
    assert report["attributes"] == list(ATTRIBUTES) and report["pairs"] == report["erase_rows"] == 1
    assert edit.manifest.cost["denoiser.forward"] > 0 and not len(model.edits)
    assert edit.manifest.data_digest is not None


def test_every_solve_starts_from_the_original_weights(model):
    old = stacked(model)
    for end in (2, 4):
        judge = Scripted(lambda number, end=end: 0.5 if number == end else 0.9)
        edit = method().erase(model, STAR, judge=judge, keep=["heart"])
        _, sums = rounds(edit)
        assert len(sums) == end + 1
        wanted = expected(model, sums[-1], kept=["heart"])
        with edit.on(model):
            found = stacked(model)
        assert float((found - wanted).norm() / (wanted - old).norm()) < 1e-4
        # Control: the sums of the round before are another edit.
        before = expected(model, sums[-2], kept=["heart"])
        assert float((found - before).norm() / (wanted - old).norm()) > 0.05
    assert torch.equal(stacked(model), old)


def test_the_edit_so_far_is_on_the_model_while_it_is_measured(model):
    judge = Scripted([1.0, 1.0, 0.5].__getitem__)
    edit = method(ridge=1e-3, pictures=2).erase(model, STAR, judge=judge)
    assert np.array_equal(judge.seen[0], model.generate(judge.prompts[0], steps=2))
    assert not np.array_equal(judge.seen[2], model.generate(judge.prompts[2], steps=2))
    with edit.on(model):
        assert np.array_equal(judge.seen[2], model.generate(judge.prompts[2], steps=2))


def test_rounds_are_limited(model):
    judge = Scripted(lambda number: 1.0)
    edit = method(rounds=3).erase(model, STAR, judge=judge)
    shares, sums = rounds(edit)
    assert len(judge.seen) == len(shares) == 4 and edit.manifest.report["met"] is False
    assert sums[-1] == [-1.5, 1.5]


def test_a_balanced_concept_rests_but_keeps_what_it_has(model):
    """Heart is in balance after one round; star moves on, and heart's sums stay."""

    class Both(Scripted):
        def judge(self, outputs, concept, prompts):
            name = prompts[0].concept
            if concept.name == ATTRIBUTES[0]:
                self.at = {"star": [0.9, 0.9, 0.5], "heart": [0.7, 0.5, 0.5]}[name][
                    len(self.seen) // 2
                ]
                self.shares = lambda number: self.at
            return super().judge(outputs, concept, prompts)

    edit = method().erase(model, [STAR, Concept("heart")], judge=Both(None))
    np.testing.assert_allclose([s[0] for s in rounds(edit)[1]], [0, -0.4, -0.8])
    np.testing.assert_allclose([s[0] for s in rounds(edit, "heart")[1]], [0, -0.2, -0.2])


@pytest.mark.parametrize(("tolerance", "moves"), [(0.05, True), (0.11, False)])
def test_the_tolerance_decides_whether_anything_is_done(model, tolerance, moves):
    edit = method(tolerance=tolerance, rounds=1).erase(
        model, STAR, judge=Scripted(lambda number: 0.6)
    )
    assert (edit.manifest.report["relative_change"] > 0) is moves
    assert edit.manifest.report["met"] is not moves


def test_wished_ratios_may_be_unequal(model):
    made = method(ratios=(0.2, 0.8))
    edit = made.erase(model, STAR, judge=Scripted([0.9, 0.2].__getitem__))
    np.testing.assert_allclose(rounds(edit)[1][-1], [-0.7, 0.7])
    text = UCE.configured(None, technique="debias", attributes="red, blue", ratios="0.2,0.8")
    assert text.attributes == made.attributes and text.ratios == made.ratios


def test_pictures_are_new_in_every_round_and_follow_the_seed(model):
    def noise(seed):
        judge = Scripted(lambda number: 1.0)
        method(rounds=2, pictures=3).erase(model, STAR, judge=judge, seed=seed)
        return [prompt.seed for listed in judge.prompts for prompt in listed]

    assert len(set(noise(0))) == 9 and not set(noise(0)) & set(noise(1)) and noise(2) == noise(2)


def test_unrecognisable_pictures_do_not_count(model):
    first = Scripted([0.6, 0.3].__getitem__, lambda n: np.arange(n) >= n - 6)
    shares, _ = rounds(method(rounds=1).erase(model, STAR, judge=first))
    assert shares[0] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]
    with pytest.raises(NumericalError, match="recognisable"):
        method().erase(model, STAR, judge=Scripted(lambda n: 0.5, lambda n: np.zeros(n, bool)))


def test_prompts_that_say_an_attribute_are_not_measured(model):
    judge = Scripted(lambda number: 0.5)
    data = [
        Prompt("a red star", seed=4),
        Prompt("a photo of a star", seed=5),
        "star",
        "a Blue star",
    ]
    method(pictures=4).erase(model, STAR, judge=judge, data=data)
    assert [p.text for p in judge.prompts[0]] == ["a photo of a star", "star"] * 2
    assert len({p.seed for p in judge.prompts[0]}) == 4


def test_prompts_of_a_world_that_say_an_attribute_keep_their_values():
    own = tiny_diffusion()

    def prompts(name, n, seed=0, split="test", route="name"):
        assert split == "development"
        texts = ("a {} star", "a plain {} star") if n == 2 else ("a star", "a striped star")
        return [Prompt(texts[i % 2].replace("{}", "red"), seed=i) for i in range(n)]

    own.companions = Companions("toy", concept=lambda name: Concept(name), prompts=prompts)
    judge = Scripted([1.0, 0.5].__getitem__)
    edit = method(ridge=1e-4, context_prompts=2).erase(own, STAR, judge=judge)
    assert {p.text for p in judge.prompts[0]} == {"a star", "a striped star"}
    assert edit.manifest.report["pairs"] == 3
    text, old = own.text_inputs()[0], stacked(own)
    moved = {}
    with edit.on(own):
        new = stacked(own)
    for name in ("star", "a red star"):
        row = next(iter(stream_rows(text, [name], "last_token"))).double()
        moved[name] = float((row @ (new - old).T).norm() / (row @ old.T).norm())
    assert moved["a red star"] < 0.02 < 0.2 < moved["star"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_leads_towards_the_attribute_that_is_lacking(model, policy):
    edit = method(tokens=policy, ridge=1e-3).erase(
        model, Concept("star", phrases=("red circle",)), judge=Scripted([1.0, 0.5].__getitem__)
    )
    assert edit.manifest.report["relative_change"] > 0 and edit.manifest.report["met"]
    assert edit.manifest.report["token_policy"] == policy


def test_bad_requests_are_refused_before_any_work(model):
    before = model.cost.snapshot()
    judge = Scripted(lambda number: 0.5)
    for bad, said in (
        ({"attributes": ()}, "two"),
        ({"attributes": ("red",)}, "two"),
        ({"attributes": ("red", "Red")}, "different"),
        ({"ratios": (1.0,)}, "each of the 2"),
        ({"ratios": (0.5, 0.6)}, "together 1"),
    ):
        with pytest.raises(SettingError, match=said):
            method(**bad).erase(model, STAR, judge=judge)
    with pytest.raises(SettingError, match="judge"):
        method().erase(model, STAR)
    with pytest.raises(SettingError, match="red star"):
        method().erase(model, Concept("red star"), judge=judge)
    with pytest.raises(SettingError, match="every text of 'red'"):
        method().erase(model, Concept("red"), judge=judge)
    for unused in ({"attributes": ("red", "blue")}, {"ratios": (0.5, 0.5)}):
        with pytest.raises(SettingError, match="allowed with technique='debias'"):
            UCE(**unused)
    assert not model.cost.since(before)
    with pytest.raises(SettingError):
        method(ratios=(-0.5, 1.5))
