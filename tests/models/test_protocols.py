"""What decides an output beside the weights is in the protocol key, and nothing else is."""

from __future__ import annotations

import json

import pytest
from diffusers import DPMSolverMultistepScheduler
from tokenizers import Tokenizer

import expunge
from expunge.models import protocols
from expunge.testing import tiny_diffusion


def test_generating_and_saving_change_nothing(tmp_path):
    model = tiny_diffusion()
    key = model.protocol_key
    model.generate(["a red star", "a blue circle"], steps=2)
    model.tokenizer("a", padding=True, truncation=False)
    assert model.protocol_key == key == tiny_diffusion(seed=1).protocol_key
    model.pipeline.save_pretrained(tmp_path)
    again = expunge.load(str(tmp_path))
    assert again.protocol_key != key  # other defaults
    again.steps, again.guidance = model.steps, model.guidance
    assert again.protocol_key == key and again.state == model.state


def scheduler(model):
    model.pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        model.pipeline.scheduler.config
    )


def schedule(model):
    model.pipeline.scheduler.register_to_config(beta_end=0.02)


def prediction(model):
    model.pipeline.scheduler.register_to_config(prediction_type="v_prediction")


def vocabulary(model):
    core = json.loads(model.tokenizer.backend_tokenizer.to_str())
    words = core["model"]["vocab"]
    words["star</w>"], words["heart</w>"] = words["heart</w>"], words["star</w>"]
    model.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(core))


def added_token(model):
    model.tokenizer.add_tokens(["<star>"])


def context(model):
    model.tokenizer.model_max_length = 12


def scaling(model):
    model.vae.register_to_config(scaling_factor=0.5)


def steps(model):
    model.steps = 9


def guidance(model):
    model.guidance = 1.0


CHANGES = [
    scheduler, schedule, prediction, vocabulary, added_token, context, scaling, steps, guidance,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_every_change_of_what_decides_is_seen(change):
    model = tiny_diffusion()
    before, state = model.protocol_key, model.state
    change(model)
    assert model.protocol_key != before and model.state == state


def test_a_tokenizer_without_a_library_core_is_named_by_its_vocabulary():
    class Words:
        eos_token_id = 0

        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    one, same, other = (protocols.tokenizer_digest(Words(*w)) for w in ("ab", "ab", "ba"))
    assert one == same != other
