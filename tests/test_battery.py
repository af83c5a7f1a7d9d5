"""Every implemented method keeps the contract; and the battery notices a method that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from expunge import catalogue
from expunge.concept import as_concepts
from expunge.core import finetune
from expunge.edit import Edit
from expunge.method import Eraser, setting
from expunge.testing import check_method, checks_for
from expunge.testing.battery import bad_concepts_are_refused
from expunge.testing.resuming import a_killed_run_resumes_to_the_same_edit

METHODS = [s.id for s in catalogue.implemented()]
RESUMES = a_killed_run_resumes_to_the_same_edit.__name__.replace("_", " ")
# test_trust.py kills every eraser's run for good; the battery's own way is checked on trainings below.
CASES = [(i, n, c) for i in METHODS for n, c in checks_for(catalogue.resolve(i)) if n != RESUMES]


@pytest.mark.parametrize("check", [c for *_, c in CASES], ids=[f"{i}: {n}" for i, n, _ in CASES])
def test_contract(check):
    check()


def test_there_are_methods_of_all_verbs_and_two_families():
    found = [catalogue.system(i) for i in METHODS]
    assert {s.verb for s in found} >= {"erase", "attack", "measure"}
    assert {s.family for s in found} >= {"diffusion", "language"}


@dataclasses.dataclass(frozen=True)
class Plain(Eraser):
    """A well-behaved eraser of nobody, arXiv 0000.00000: one matrix shrinks."""

    id: ClassVar[str] = "plain"
    title: ClassVar[str] = "Plain"
    source: ClassVar[str] = "arXiv 0000.00000"
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"hard": {"share": 0.5}}

    share: float = setting(0.1, "what is taken away", minimum=0, maximum=1)

    def erase(self, model, concepts, *, keep=(), data=None, judge=None, seed=0, run=None):
        model.check_family(self)
        wanted = as_concepts(concepts, keep)
        name = model.text_projections()[0]
        self.misbehave(model, name)
        delta = -self.share * model.tensor(name).detach()
        return Edit.make(
            self, model, wanted, kind="dense", tensors={f"delta.{name}": delta}, targets=(name,),
            keep=keep, seed=seed,
        )  # fmt: skip

    def misbehave(self, model, name):
        pass


def test_an_outsiders_method_passes():
    check_method(Plain)


def change_weight(self, model, name):
    with torch.no_grad():
        model.tensor(name).add_(1e-3)


FAULTS = {
    "values of": change_weight,
    "requires_grad": lambda s, model, name: model.tensor(name).requires_grad_(True),
    "train mode": lambda s, model, name: model.denoiser.train(),
    "hooks of": lambda s, model, name: model.denoiser.register_forward_hook(lambda *a: None),
    "torch random state": lambda s, model, name: torch.rand(1),
    "attention processors": lambda s, model, name: model.denoiser.set_default_attn_processor(),
}


def variant(**members):
    """A subclass of the plain method with some members replaced."""
    body = {"__doc__": Plain.__doc__, "__module__": __name__, **members}
    return dataclasses.dataclass(frozen=True)(type("Bad", (Plain,), body))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_battery_notices(fault):
    with pytest.raises(AssertionError, match=fault):
        check_method(variant(misbehave=FAULTS[fault]))


def test_the_battery_notices_a_source_that_the_docstring_does_not_name():
    with pytest.raises(AssertionError, match="docstring names the source"):
        check_method(variant(source="arXiv 9999.99999"))


def test_the_battery_notices_an_eraser_that_keeps_what_it_erases():
    def erase(self, model, concepts, *, keep=(), **more):
        return Plain.erase(self, model, concepts, **more)

    bad_concepts_are_refused(Plain)
    with pytest.raises(AssertionError, match=r"'keep': .* was accepted"):
        bad_concepts_are_refused(variant(erase=erase))


class Count(finetune.Task):
    """One matrix follows a target that grows with a count of the steps."""

    def __init__(self, model, remembers):
        self.model, self.remembers, self.count = model, remembers, 0

    def parameters(self):
        name = self.model.text_projections()[0]
        return {"weights": [(name, self.model.tensor(name))]}

    def step(self, step):
        self.count += 1
        [(_, weight)] = self.parameters()["weights"]
        return {"weights": (weight - self.count).square().mean()}

    def state(self):
        return {"count": torch.tensor(self.count)} if self.remembers else {}

    def restore(self, state):
        self.count = int(state.get("count", 0))


@pytest.mark.parametrize("remembers", [True, False])
def test_the_battery_notices_a_run_that_resumes_to_another_edit(remembers):
    def erase(self, model, concepts, *, keep=(), data=None, judge=None, seed=0, run=None):
        task, loop = Count(model, remembers), finetune.Loop(4, finetune.Optimiser(1e-2))
        return finetune.train_edit(
            self, model, as_concepts(concepts), task, loop, seed=seed, keep=keep, run=run
        )

    method = variant(erase=erase)
    if remembers:
        a_killed_run_resumes_to_the_same_edit(method)
        return
    with pytest.raises(AssertionError, match="gave another edit"):
        a_killed_run_resumes_to_the_same_edit(method)
