"""Hidden states shown to controls: which layers, what is noted beside them, what is remembered, what stays."""

from __future__ import annotations

import pytest
import torch

from expunge.errors import MissingPart
from expunge.method import Control
from expunge.models.hidden_states import listeners
from expunge.testing import tiny_diffusion
from expunge.testing.bench import trace
from expunge.testing.layouts import TINY_LAYOUTS, tiny_layout

LAYER = "text_encoder.encoder.layers.0"


class Shifted(Control):
    """Adds a number to the rows of texts that hold a token; sees what it is shown."""

    def __init__(self, layers=(LAYER,), amount=1.0, token=None):
        self.layers, self.amount, self.token, self.seen = layers, amount, token, []

    def activations(self, context, hidden):
        self.seen.append((context.layer, tuple(hidden.shape), context.ids, context.attended))
        if self.token is None:
            return hidden + self.amount
        said = (context.ids == self.token).any(1)
        return torch.where(said[:, None, None], hidden + self.amount, hidden)


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def word(model, text):
    return model.tokenizer(text, add_special_tokens=False).input_ids[0]


def test_a_named_layer_is_shown_with_its_ids_and_what_is_returned_goes_on(model):
    before, left = model.encode(["a red star"]), trace(model)
    control = Shifted()
    with model.controlled(control):
        after = model.encode(["a red star", "a circle"])
    [(layer, shape, ids, attended)] = control.seen
    assert layer == LAYER and shape == (2, 16, 32) and attended is None
    assert torch.equal(ids, model.token_ids(["a red star", "a circle"]))
    assert not torch.allclose(after.embeddings[:1], before.embeddings)
    assert torch.equal(model.encode(["a red star"]).embeddings, before.embeddings)
    left.pop("controls"), (now := trace(model)).pop("controls")
    assert now == left


def test_the_output_is_what_the_layer_gives(model):
    found = {}
    inner = model.text_encoder.get_submodule("text_model.encoder.layers.1") if hasattr(
        model.text_encoder, "text_model") else model.text_encoder.encoder.layers[1]  # fmt: skip
    handle = inner.register_forward_hook(
        lambda m, a, out: found.setdefault("own", out[0] if isinstance(out, tuple) else out)
    )
    control = Shifted(("text_encoder.encoder.layers.1",), 0.0)
    shown = []
    control.activations = lambda context, hidden: shown.append(hidden) or hidden
    with model.controlled(control):
        model.encode(["a heart"])
    handle.remove()
    assert torch.equal(shown[0], found["own"])


def test_the_unconditional_branch_is_not_shown(model):
    control = Shifted()
    plain = model.unconditional("a star")
    with model.controlled(control):
        assert torch.equal(model.unconditional("a star").embeddings, plain.embeddings)
        assert torch.equal(model.unconditional().embeddings, model.unconditional("").embeddings)
    assert not control.seen


def test_searches_and_closed_forms_read_what_the_denoiser_reads(model):
    ids = model.token_ids(["a red star"])
    with model.controlled(Shifted()):
        whole = model.encode(["a red star"]).embeddings
        assert torch.equal(model.encode_tokens(ids).embeddings, whole)
        [group] = model.text_inputs()
        assert torch.equal(group.segments(["a red star"])[0].rows, whole)


def test_gradients_pass_through_what_a_control_returns(model):
    ids = model.token_ids(["a red star"])
    vectors = model.token_table()[ids].clone().requires_grad_()
    with model.controlled(Shifted(amount=0.5)):
        model.encode_tokens(ids, vectors).embeddings.square().sum().backward()
    assert bool(vectors.grad.abs().sum() > 0)


def test_a_users_control_is_asked_every_time(model):
    control = Shifted()
    with model.controlled(control):
        model.encode(["a star"])
        model.encode(["a star"])
    assert len(control.seen) == 2


def test_an_unknown_layer_is_an_error_and_a_control_of_other_parts_is_not_asked(model):
    with (
        model.controlled(Shifted(("text_encoder.encoder.layers.7",))),
        pytest.raises(MissingPart, match=r"layers\.7.*did you mean"),
    ):
        model.encode(["a star"])
    quiet = Shifted(("unet.mid_block",))
    assert listeners([quiet], model.layout.towers) == ()
    with model.controlled(quiet):
        model.encode(["a star"])
    assert not quiet.seen


def test_layers_of_the_denoiser_are_shown_too(model):
    control = Shifted(("unet.mid_block",), 0.0)
    with model.controlled(control):
        model.generate(["a star"], seeds=[1], steps=1)
    [(layer, shape, ids, _)] = control.seen
    assert layer == "unet.mid_block" and shape[0] == 2 and ids is None


def on_the_model(model, control, digest="d" * 64):
    """The control as if an edit had brought it."""
    from types import SimpleNamespace

    from expunge.edit.stack import _On

    model.edits._on.append(_On(SimpleNamespace(digest=digest), None, control))


def test_a_text_that_an_edit_leaves_alone_keeps_its_very_condition():
    """Whatever batch it is encoded in: bits depend on the batch, and pictures on the bits."""
    model = tiny_diffusion()
    texts = ["a red star", "a blue circle", "a heart"]
    plain = {text: model.encode([text]).embeddings for text in texts}  # batches of one
    control = Shifted(token=word(model, "star"))
    on_the_model(model, control)
    edited = model.encode(texts).embeddings
    assert not torch.allclose(edited[:1], plain["a red star"])
    for row, text in zip(edited[1:], texts[1:], strict=True):
        assert torch.equal(row[None], plain[text])
    model.encode(texts)
    assert len(control.seen) == 1, "an edit's texts are remembered"
    model.edits._on.clear()
    assert torch.equal(model.encode(texts[:1]).embeddings, plain["a red star"])


def test_the_edited_model_may_come_first():
    model = tiny_diffusion()
    on_the_model(model, Shifted(token=word(model, "star")))
    first = model.encode(["a circle", "a star"]).embeddings
    model.edits._on.clear()
    assert torch.equal(model.encode(["a circle"]).embeddings, first[:1])
    assert not torch.allclose(model.encode(["a star"]).embeddings, first[1:])


@pytest.mark.parametrize("name", TINY_LAYOUTS)
def test_every_layout_shows_its_text_encoders(name):
    from expunge.core.text_activations import sites

    model = tiny_layout(name)
    control = Shifted(tuple(site.layer for site in sites(model, (0,))), 0.0)
    before = model.encode(["a red star"]).embeddings
    with model.controlled(control):
        after = model.encode(["a red star"]).embeddings
    assert torch.equal(before, after)
    assert {layer.partition(".")[0] for layer, *_ in control.seen} == set(model.layout.encoders())
    assert all(ids.shape == shape[:2] for _, shape, ids, _ in control.seen)
