"""The network that answers about pictures: what passes where, what counts in the loss, and greedy answers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from expunge.core.finetune import Loop, Optimiser, fit
from expunge.core.picture_answers import (
    AnswerTask,
    Asked,
    PictureAnswerer,
    Shape,
    answer_loss,
    padded,
    shape_from,
)
from expunge.core.word_codes import ANSWER, BEGIN, END, PAD, WordCodes
from expunge.errors import InputError, SettingError

SHAPE = Shape(patch_width=6, words=12, length=9, width=8, layers=2, heads=2, visual_tokens=3)
PATCHES = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[BEGIN, 7, 8, ANSWER, 9, END], [BEGIN, 7, 8, ANSWER, 10, 11]])


def opened(gate: float, **changes) -> PictureAnswerer:
    made = PictureAnswerer(dataclasses.replace(SHAPE, **changes), seed=3)
    for layer in made.layers:
        if layer.cross is not None:
            layer.cross.gate.data.fill_(gate)
    return made


@torch.no_grad()
def logits(network: PictureAnswerer, ids=IDS) -> torch.Tensor:
    return network(network.look(PATCHES), ids)


def test_a_closed_gate_is_the_network_without_cross_attention_bit_for_bit():
    with_it, without = opened(0.0), opened(0.0, cross_attention=False)
    assert torch.equal(logits(with_it), logits(without))
    assert not torch.equal(logits(opened(0.7)), logits(without))
    assert not any(".cross." in name for name, _ in without.named_parameters())


@torch.no_grad()
def test_visual_tokens_pass_cross_attention_unchanged_and_never_read_text():
    layer, visual = opened(0.7).layers[0], torch.randn(2, 3, 8)
    text, other = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    passed, looked = layer.looked(visual, text)
    assert passed is visual and not torch.equal(looked, text)
    # Self-attention is causal and the visual tokens stand first.
    assert torch.equal(layer(visual, text)[0], layer(visual, other)[0])
    assert torch.equal(layer(visual, text)[0], opened(0.0).layers[0](visual, text)[0])


def test_later_words_and_padding_do_not_reach_earlier_ones():
    network, changed = opened(0.7), IDS.clone()
    changed[:, 4:] = PAD
    torch.testing.assert_close(logits(network)[:, :4], logits(network, changed)[:, :4])
    torch.testing.assert_close(logits(network)[:, :4], logits(network, IDS[:, :4]))


def test_weights_come_from_seed_and_names_only():
    state = torch.random.get_rng_state()
    one, two = opened(0.0), opened(0.0, contrastive=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(one.state_dict()) - set(two.state_dict()) == {
        "picture_side.weight", "caption_side.weight",
    }  # fmt: skip
    assert all(torch.equal(t, one.state_dict()[name]) for name, t in two.state_dict().items())
    other = PictureAnswerer(SHAPE, seed=4)
    assert not torch.equal(other.words.weight, one.words.weight)


def test_only_tokens_of_the_answer_count():
    ids = torch.tensor([[BEGIN, 7, ANSWER, 8, END, PAD], [BEGIN, 7, 7, ANSWER, 9, END]])
    values = torch.zeros(2, 6, 12, requires_grad=True)
    loss = answer_loss(values, ids)
    assert loss.item() == pytest.approx(math.log(12))
    loss.backward()
    # Places whose next token is of the answer or the end: 2 and 3 of the first row, 3 and 4 of the second.
    assert values.grad.abs().sum(-1).nonzero().tolist() == [[0, 2], [0, 3], [1, 3], [1, 4]]
    sure = torch.zeros(2, 6, 12)
    sure[0, 2, 8] = math.log(11.0)  # half of the mass on the right word
    assert answer_loss(sure, ids).item() == pytest.approx((math.log(2) + 3 * math.log(12)) / 4)


class Scripted(PictureAnswerer):
    """Writes what a script says, one row a picture."""

    script = ((9, 10, END, 8), (END, 8, 8, 8))
    calls = 0

    def forward(self, visual, ids):
        self.calls += 1
        place = ids.shape[1] - 4
        best = torch.tensor([row[place] for row in self.script])
        return torch.nn.functional.one_hot(best, 12)[:, None].float()


def test_greedy_answers_end_at_the_end():
    made = Scripted(SHAPE)
    assert made.answer(PATCHES, [7, 8]) == [[9, 10, END], [END, PAD, PAD]]
    assert made.calls == 3  # nothing is asked once all have ended


def test_greedy_answers_take_the_likeliest_word_and_stop_when_places_end():
    network = opened(0.7)
    found = network.answer(PATCHES, [7, 8])
    for row, numbers in enumerate(found):
        ids, written = [BEGIN, 7, 8, ANSWER], []
        while len(ids) < SHAPE.length and END not in written:
            own = network(network.look(PATCHES[row : row + 1]), torch.tensor([ids]))
            written.append(int(own[0, -1].argmax()))
            ids.append(written[-1])
        assert [n for n in numbers if n != PAD or n in written][: len(written)] == written
    with pytest.raises(InputError, match="at most 9 are allowed"):
        network(network.look(PATCHES), torch.zeros(2, 10, dtype=torch.long))


# -- training --------------------------------------------------------------------------------------

CODES = WordCodes(["is", "it", "?", "yes", "no", "sun", "moon"])
ASKED = [Asked("is it?", "yes", "sun"), Asked("is it?", "no", "moon")]


def task(network: PictureAnswerer, asked=ASKED, **options) -> AnswerTask:
    return AnswerTask(network, CODES, asked, lambda places: PATCHES[places], batch=4, **options)


def test_the_loss_is_the_sum_of_its_two_parts():
    network = opened(0.3)
    alone = task(network, weight=0.0).loss([0, 1]).item()
    pairs = [task(network, weight=w).loss([0, 1]).item() - alone for w in (0.5, 1.0)]
    assert pairs[0] > 0 and pairs[1] == pytest.approx(2 * pairs[0], rel=1e-4)
    ids = padded([task(network).texts[0], task(network).texts[1]])
    assert alone == pytest.approx(answer_loss(network(network.look(PATCHES), ids), ids).item())


def test_pictures_without_a_caption_and_of_one_caption_are_no_pairs():
    network = opened(0.3)
    for captions in (("sun", ""), ("", ""), ("sun", "sun")):
        asked = [dataclasses.replace(a, caption=c) for a, c in zip(ASKED, captions, strict=True)]
        with_it, without = (task(network, asked, weight=w).loss([0, 1]).item() for w in (1.0, 0.0))
        assert with_it == without


def test_pooled_captions_leave_padding_out():
    network = opened(0.3)
    visual = network.look(PATCHES)
    picture, caption = network.pooled(visual, torch.tensor([[7, 8, PAD], [9, PAD, PAD]]))
    words = network.words.weight
    mean = torch.stack([(words[7] + words[8]) / 2, words[9]])
    torch.testing.assert_close(caption, mean @ network.caption_side.weight.T)
    torch.testing.assert_close(picture, visual.mean(1) @ network.picture_side.weight.T)


def test_a_short_training_tells_two_pictures_apart():
    network = PictureAnswerer(dataclasses.replace(SHAPE, words=len(CODES)), seed=0)
    made = fit(task(network), Loop(60, Optimiser(0.02)), seed=0, modules=[network])
    losses = made.losses["answers"]
    assert losses[-1] < 0.2 * losses[0]
    network.load_state_dict(made.values)
    question = CODES.encode("is it?")
    assert [CODES.decode(row) for row in network.answer(PATCHES, question)] == ["yes", "no"]
    assert network.layers[0].cross.gate.item() != 0


def test_nothing_to_learn_and_strange_sizes_are_refused():
    with pytest.raises(SettingError, match="no labelled picture"):
        task(opened(0.0), [])
    plain = dataclasses.asdict(SHAPE)
    assert shape_from(plain) == SHAPE
    for wrong in ({"width": "8"}, {"depth": 1}, {"contrastive": 1}, {"layers": -1}):
        with pytest.raises(SettingError, match=next(iter(wrong))):
            shape_from({**plain, **wrong})
