"""RECE on a tiny random pipeline against a transcription of its equations, layer by layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept, Edit
from expunge.core.token_policy import stream_pairs, stream_rows
from expunge.erase.diffusion.rece import RECE
from expunge.erase.diffusion.uce import UCE
from expunge.errors import SettingError
from expunge.method import Judge, Prompt, Verdicts
from expunge.models.base import Companions
from expunge.testing import tiny_diffusion

STAR = Concept("star", anchor="circle")


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def layers(model) -> list[torch.Tensor]:
    return [model.tensors()[name].detach().double() for name in model.text_projections()]


def published(model, pairs, kept, epochs, derive_ridge, ridge=0.5, empties=1, accumulate=False):
    """The method written out from its equations: own solve for each matrix, rows re-derived each epoch."""

    def solve(old, sources, targets, held, a, b, lam):
        identity = torch.eye(old[0].shape[1]).double()
        right = torch.inverse(lam * identity + a * sources.T @ sources + b * held.T @ held)
        return [
            (lam * w + a * (w @ targets.T) @ sources + b * (w @ held.T) @ held) @ right for w in old
        ]

    def gather(policy):
        blocks = list(stream_pairs(model.text_inputs()[0], pairs, policy))
        return (
            torch.cat([block.sources for block in blocks]).double(),
            torch.cat([block.targets for block in blocks]).double(),
        )

    original = layers(model)
    held = torch.cat(list(stream_rows(model.text_inputs()[0], ["", *kept], "all_rows"))).double()
    b = max(0.1, round(1 / (1 + len(kept)), 3))
    first = gather("last_token_to_end_aligned")
    current = solve(original, *first, held, 1.0, b, ridge)
    c, g = gather("all_rows")
    again = torch.cat(
        list(stream_rows(model.text_inputs()[0], [" "] * empties + kept, "all_rows"))
    ).double()
    everything = first
    for _ in range(epochs):
        edited = sum(w.T @ w for w in current)
        cross = sum(w.T @ o for w, o in zip(current, original, strict=True))
        derived = c @ (torch.inverse(derive_ridge * torch.eye(c.shape[1]) + edited) @ cross).T
        if accumulate:
            everything = torch.cat([everything[0], derived]), torch.cat([everything[1], g])
            current = solve(original, *everything, held, 1.0, b, ridge)
        else:
            current = solve(current, derived, g, again, 1.0, 0.1, 0.1)
    return current


@pytest.mark.parametrize(
    ("options", "empties"),
    [({}, 1), ({"epochs": 3, "derive_ridge": 0.1}, 1), ({"epochs": 2, "accumulate": True}, 1),
     ({"epochs": 2, "empty_per_concept": True}, 2), ({"epochs": 0}, 1)],
)  # fmt: skip
def test_the_edit_is_that_of_the_published_procedure(model, options, empties):
    concepts, keep = [STAR, Concept("heart", phrases=("blue heart",))], ["square"]
    pairs = [("star", "circle"), ("heart", ""), ("blue heart", "")]
    edit = RECE(**options).erase(model, concepts, keep=keep)
    wanted = published(
        model, pairs, keep, options.get("epochs", 1), options.get("derive_ridge", 1e-3), empties=empties,
        accumulate=options.get("accumulate", False),
    )  # fmt: skip
    old = layers(model)
    assert edit.kind == "shared-low-rank"
    with edit.on(model):
        for found, right, before in zip(layers(model), wanted, old, strict=True):
            assert float((found - right).norm() / (right - before).norm()) < 2e-4
    assert all(torch.equal(a, b) for a, b in zip(layers(model), old, strict=True))


def test_no_epoch_is_uce_and_each_epoch_is_something_else(model):
    uce = UCE.configured("2023").erase(model, STAR)
    none = RECE(epochs=0).erase(model, STAR)
    assert uce.manifest.tensors_digest == none.manifest.tensors_digest
    assert RECE(epochs=1).erase(model, STAR).manifest.tensors_digest != none.manifest.tensors_digest


def test_the_report_follows_the_epochs(model):
    edit = RECE(epochs=3).erase(model, STAR, keep=["heart"])
    report = edit.manifest.report
    assert len(report["epochs"]) == 4 and report["epoch"] == 3
    assert all(step["concept_residual"] > 0.01 for step in report["epochs"])
    assert "derived_norm" not in report["epochs"][0]
    for step in report["epochs"][1:]:
        assert step["derived_norm"] > 0 and np.isfinite(step["derived_residual"])
    assert report["epochs"][-1]["relative_change"] == pytest.approx(
        report["relative_change"], rel=1e-3
    )
    assert (
        edit.manifest.cost["encoder.forward"] > 0 and "denoiser.forward" not in edit.manifest.cost
    )


def test_several_phrasings_anchors_and_files(model, tmp_path):
    edit = RECE.configured("paper:unsafe").erase(
        model, Concept("red star", kind="unsafe", phrases=("star",))
    )
    assert (
        edit.manifest.settings["empty_per_concept"] is True and edit.manifest.report["pairs"] == 2
    )
    edit.save(tmp_path / "e.safetensors")
    assert Edit.load(tmp_path / "e.safetensors") == edit
    assert edit.manifest.preset == "paper:unsafe"
    assert RECE().erase(model, STAR).manifest.preset is None
    style = RECE.configured("paper:style").erase(model, Concept("striped", kind="style"))
    plain = RECE(guide="").erase(model, Concept("striped", kind="style"))
    assert style.manifest.tensors_digest != plain.manifest.tensors_digest


def test_it_is_fitted_on_the_present_weights_but_recovers_those_of_the_base(model):
    first = UCE.configured("2023").erase(model, Concept("heart", anchor="square"))
    old = layers(model)
    with first.on(model):
        stacked = RECE().erase(model, STAR)
        assert stacked.manifest.fitted_on == [first.digest]
        with stacked.on(model):
            assert not torch.equal(layers(model)[0], old[0])
    assert all(torch.equal(a, b) for a, b in zip(layers(model), old, strict=True))


class Brightness(Judge):
    """Says yes to bright pictures; remembers how often it was asked."""

    id = protocol = "brightness"
    threshold = 0.5

    def __init__(self, verdicts):
        self.verdicts, self.asked = list(verdicts), 0

    def judge(self, outputs, concept, prompts):
        rate = self.verdicts[self.asked]
        self.asked += 1
        hit = np.arange(len(outputs)) < round(rate * len(outputs))
        return Verdicts(hit, hit.astype(float), np.ones(len(outputs), bool))


def test_selection_keeps_the_epoch_that_shows_the_concept_least(model):
    prompts = [Prompt("a star", seed=i) for i in range(4)]
    judge = Brightness([1.0, 0.25, 0.75])
    edit = RECE(epochs=2, select=True).erase(model, STAR, judge=judge, data=prompts)
    assert judge.asked == 3 and edit.manifest.report["epoch"] == 1
    assert edit.manifest.report["validation_rates"] == [1.0, 0.25, 0.75]
    plain = RECE(epochs=1).erase(model, STAR)
    assert edit.manifest.tensors_digest == plain.manifest.tensors_digest
    assert not len(model.edits)
    # What it was selected on is part of where it comes from.
    again = RECE(epochs=2, select=True).erase(
        model, STAR, judge=Brightness([1.0, 0.25, 0.75]), data=prompts[:3]
    )
    digests = {e.manifest.data_digest for e in (edit, again, plain)}
    assert len(digests) == 3 and plain.manifest.data_digest is None
    with pytest.raises(SettingError, match="judge"):
        RECE(select=True).erase(model, STAR, data=prompts)
    with pytest.raises(SettingError, match="data="):
        RECE(select=True).erase(model, STAR, judge=judge)


@pytest.mark.parametrize("regularisation", ["standard", "first", "second", "both"])
def test_other_regularisations_give_other_edits(model, regularisation):
    one = RECE(regularisation=regularisation, derive_ridge=0.1).erase(model, STAR)
    two = RECE(derive_ridge=0.1).erase(model, STAR)
    assert one.manifest.tensors_digest != two.manifest.tensors_digest


def test_validation_prompts_are_a_worlds_development_prompts_or_those_of_each_concept():
    own = tiny_diffusion()
    asked = []

    def prompts(name, n, seed=0, split="test"):
        asked.append((name, n, split))
        return [Prompt(f"a {name}", seed=i, concept=name) for i in range(n)]

    own.companions = Companions(
        "toy", concept=lambda n: None if n == "moon" else Concept(n), prompts=prompts
    )
    judge = Brightness([1.0, 0.0])
    edit = RECE(select=True, select_prompts=3).erase(own, STAR, judge=judge)
    assert asked == [("star", 3, "development")] and edit.manifest.report["epoch"] == 1
    with pytest.raises(SettingError, match="moon"):
        RECE(select=True).erase(own, Concept("moon"), judge=judge)
    # Prompts that name their concept are shown to that concept's judge alone.
    data = [Prompt("a star", concept="star"), Prompt("a heart", concept="heart"), "a photo"]
    shown = []

    class Notes(Brightness):
        def judge(self, outputs, concept, prompts):
            shown.append((concept.name, [p.text for p in prompts]))
            return super().judge(outputs, concept, prompts)

    pair = [STAR, Concept("heart")]
    RECE(epochs=0, select=True).erase(own, pair, judge=Notes([0.0, 0.0]), data=data)
    assert shown == [("star", ["a star", "a photo"]), ("heart", ["a heart", "a photo"])]


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("paper:object", {"epochs": 1, "derive_ridge": 1e-3, "guide": None}),
        ("paper:style", {"epochs": 1, "derive_ridge": 1e-3, "guide": "art"}),
        ("paper:unsafe", {"epochs": 3, "derive_ridge": 0.1, "guide": None, "empty_per_concept": True}),
    ],
)  # fmt: skip
def test_presets_are_those_of_the_paper(model, preset, wanted):
    made = RECE.configured(preset)
    same = {
        "erase_scale": 1.0, "ridge": 0.5, "preserve_scale": None, "epoch_erase_scale": 1.0,
        "epoch_preserve_scale": 0.1, "epoch_ridge": 0.1, "regularisation": "zero", "select": False,
        "tokens": "last_token_to_end_aligned", "accumulate": False,
    }  # fmt: skip
    assert {name: made.settings()[name] for name in {**same, **wanted}} == {**same, **wanted}
    kind = preset.partition(":")[2]
    assert RECE.preset_for(kind) == preset
    edit = made.erase(model, Concept("star", kind=kind))
    assert len(edit.manifest.report["epochs"]) == 1 + wanted["epochs"]
