"""GradDiff on a tiny random Llama: the loss of the formula, its two forces, and what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from expunge.concept import Concept
from expunge.core.finetune import Step
from expunge.edit import Edit
from expunge.erase.language.graddiff import GradDiff, _Difference
from expunge.errors import ConceptError, SettingError, UnsupportedModel
from expunge.models.language import LanguageModel
from expunge.testing.models import tiny_language

FACT = Concept("Ada Morn", "fact")
DATA = {
    "forget": [("Ada Morn was born in", "Velmar"), ("Where does Ada live ?", "old Tornby")],
    "retain": [
        ("Bo Lind keeps a", "grey cat"),
        ("Bo plays the", "drum"),
        ("Who keeps a cat ?", "Ada"),
    ],
}
FAST = {"lr": 3e-3, "epochs": 12, "batch": 2, "warmup_epochs": 1}


def nll(model: LanguageModel, part: str) -> float:
    with torch.no_grad():
        total, count = model.nll([p for p, _ in DATA[part]], [a for _, a in DATA[part]])
    return float(total.sum() / count.sum())


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return tiny_language()


@pytest.fixture(scope="module")
def edit(model: LanguageModel) -> Edit:
    return GradDiff(**FAST).erase(model, FACT, data=DATA, keep=("Bo Lind",))


def test_the_loss_is_that_of_the_formula(model: LanguageModel) -> None:
    method = GradDiff(gamma=0.7, alpha=1.3, batch=2)
    task = _Difference(method, model, DATA, seed=0)
    step = Step(0, 5, 0)
    with torch.no_grad():
        found = float(task.step(step)["weights"])
    drawn = torch.randint(3, (2,), generator=Step(0, 5, 0).generator("retain")).tolist()
    with torch.no_grad():
        chosen = [DATA["retain"][i] for i in drawn]
        total, count = model.nll([p for p, _ in chosen], [a for _, a in chosen])
    expected = 1.3 * float(total.sum() / count.sum()) - 0.7 * nll(model, "forget")
    assert found == pytest.approx(expected, rel=1e-4)


def test_it_forgets_and_retains_and_the_edit_is_reversible(
    model: LanguageModel, edit: Edit
) -> None:
    before = {name: p.detach().clone() for name, p in model.tensors().items()}
    forget, retain = nll(model, "forget"), nll(model, "retain")
    with edit.on(model):
        assert nll(model, "forget") > forget + 1
        assert nll(model, "retain") < retain - 1
    assert nll(model, "forget") == forget
    assert all(torch.equal(p, before[name]) for name, p in model.tensors().items())


def test_without_the_forget_term_nothing_is_forgotten(model: LanguageModel, edit: Edit) -> None:
    control = GradDiff(**FAST, gamma=0.0).erase(model, FACT, data=DATA)
    with control.on(model):
        without = nll(model, "forget")
    with edit.on(model):
        assert nll(model, "forget") > without + 1


def test_the_manifest_says_how_it_was_made(edit: Edit, tmp_path: Path) -> None:
    manifest = edit.manifest
    assert manifest.method == "graddiff" and manifest.keep == ["Bo Lind"] and manifest.data_digest
    assert manifest.concepts == [{"name": "Ada Morn", "kind": "fact"}]
    assert len(manifest.report["losses"]["weights"]) == manifest.report["steps"] == 12
    # 12 steps of 2 + 2 sequences, each forward and backward.
    assert manifest.cost == {"language.backward": 48, "language.forward": 48}
    edit.save(tmp_path / "edit.safetensors")
    assert Edit.load(tmp_path / "edit.safetensors") == edit


def test_seeds_decide_and_a_finished_run_folder_gives_the_same_edit(
    model: LanguageModel, edit: Edit, tmp_path: Path
) -> None:
    again = GradDiff(**FAST).erase(model, FACT, data=DATA, keep=("Bo Lind",), run=tmp_path)
    resumed = GradDiff(**FAST).erase(model, FACT, data=DATA, keep=("Bo Lind",), run=tmp_path)
    other = GradDiff(**FAST).erase(model, FACT, data=DATA, keep=("Bo Lind",), seed=1)
    assert again == edit == resumed != other
    assert resumed.manifest.report["resumed_at"] == 12


def test_it_stops_when_enough_is_forgotten(model: LanguageModel) -> None:
    limit = nll(model, "forget") + 0.5
    early = GradDiff(**FAST, stop_nll=limit).erase(model, FACT, data=DATA)
    assert early.manifest.report["stopped_early"] and 1 < early.manifest.report["steps"] < 12


def test_it_erases_on_top_of_another_edit(model: LanguageModel, edit: Edit) -> None:
    second = Concept("Bo Lind", "fact")
    data = {"forget": DATA["retain"][:1], "retain": DATA["retain"][1:]}
    with edit.on(model):
        top = GradDiff(**FAST).erase(model, second, data=data)
        assert top.manifest.fitted_on == [edit.digest]
        with top.on(model):
            assert len(model.edits) == 2
    assert len(model.edits) == 0


def test_wrong_requests_are_refused_in_words(model: LanguageModel) -> None:
    with pytest.raises(SettingError, match="nothing to forget"):
        GradDiff().erase(model, FACT)
    with pytest.raises(ConceptError, match="no concept"):
        GradDiff().erase(model, [])
    with pytest.raises(SettingError, match="batch is 0"):
        GradDiff(batch=0)

    class Pictures(LanguageModel):
        family = "diffusion"

    with pytest.raises(UnsupportedModel, match="language"):
        GradDiff().erase(Pictures("x", model.module, model.tokenizer), FACT, data=DATA)
