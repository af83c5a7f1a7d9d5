"""What an attack did is kept under a name that says everything that can change it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from expunge.evidence.attacking import _key
from expunge.method import BUDGETS, Prompt
from expunge.testing import tiny_diffusion

from .stubs import STAR, ColourJudge, Password

PROMPTS = (Prompt("a star", 1, "star", {"colour": "red"}),)


def sampler(model):
    model.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        model.pipeline.scheduler.config
    )


def prediction(model):
    model.pipeline.scheduler.register_to_config(prediction_type="v_prediction")


def tokenizer(model):
    model.tokenizer.add_tokens(["<star>"])


def steps(model):
    model.steps += 1


def guidance(model):
    model.guidance += 1


def weight(model):
    with torch.no_grad():
        model.tensor(model.text_projections()[0])[0, 0] += 1e-3


@pytest.mark.parametrize("role", ["model", "reference"])
@pytest.mark.parametrize(
    "change", [sampler, prediction, tokenizer, steps, guidance, weight], ids=lambda c: c.__name__
)
def test_the_model_and_the_reference_count_with_all_that_decides(change, role):
    arms = {"model": tiny_diffusion(), "reference": tiny_diffusion()}

    def key():
        return _key(
            Password(), arms["model"], STAR, ColourJudge(), BUDGETS["quick"], PROMPTS, arms["reference"], 0
        )  # fmt: skip

    before = key()
    assert key() == before
    change(arms[role])
    assert key() != before


def test_labels_that_a_judge_reads_count():
    model = tiny_diffusion()
    keys = {
        _key(Password(), model, STAR, ColourJudge(), BUDGETS["quick"], (prompt,), None, 0)
        for prompt in (PROMPTS[0], dataclasses.replace(PROMPTS[0], labels={"colour": "blue"}))
    }
    assert len(keys) == 2
