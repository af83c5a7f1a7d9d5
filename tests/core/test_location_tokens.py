"""Boxes to bins, weights that keep the scale of a loss, captions that are never cut for a token, and gradients."""

import math

import pytest
import torch

from expunge.core.detections import Detection
from expunge.core.location_tokens import Grid, Words, region_weights, thinned, upsampled
from expunge.errors import InputError, SettingError
from expunge.testing import tiny_diffusion

GRID = Grid(4, 4)


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def words(model):
    return Words(model, GRID)


def ids_of(model, text):
    return model.token_ids([text])[0].tolist()


def test_bins_of_a_box_are_those_of_the_formula():
    """A1 = floor(a1 / W) ... for boxes whose edges lie on no border."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        columns, rows = (int(torch.randint(1, 8, (1,), generator=generator)) for _ in range(2))
        (x1, x2), (y1, y2) = (
            torch.rand(2, generator=generator).sort().values.tolist() for _ in range(2)
        )
        box = (100 * x1, 60 * y1, 100 * x2, 60 * y2)
        wide, high = 100 / columns, 60 / rows
        wanted = [
            n * columns + m
            for n in range(math.floor(box[1] / high), math.floor(box[3] / high) + 1)
            for m in range(math.floor(box[0] / wide), math.floor(box[2] / wide) + 1)
        ]
        found = Grid(columns, rows).covered(box, 100, 60)
        assert list(found) == wanted
        assert sum(found.values()) == pytest.approx((box[2] - box[0]) * (box[3] - box[1]))


def test_a_box_that_ends_on_a_border_does_not_touch_the_bin_behind_it():
    assert list(GRID.covered((0, 0, 16, 16), 64, 64)) == [0]
    assert list(GRID.covered((0, 0, 16.5, 16), 64, 64)) == [0, 1]
    assert list(GRID.covered((0, 0, 64, 64), 64, 64)) == list(range(16))
    assert list(Grid(7, 7).covered((0, 0, 64, 64), 64, 64)) == list(range(49))


def test_what_lies_outside_the_picture_does_not_count_and_an_empty_box_is_refused():
    assert GRID.covered((-50, 40, 10, 99), 64, 64) == GRID.covered((0, 40, 10, 64), 64, 64)
    for box in ((70, 0, 90, 5), (5, 5, 5, 9), (9, 5, 5, 9), (0, 0, float("nan"), 4)):
        with pytest.raises(InputError, match="holds nothing"):
            GRID.covered(box, 64, 64)


def test_detections_become_groups_of_each_name():
    seen = [
        Detection(0.9, (0, 0, 16, 16), "code"), Detection(0.9, (16, 0, 32, 16), "code"),
        Detection(0.4, (48, 48, 64, 64), "code"), Detection(0.8, None, "text"), Detection(0.9, None, "other"),
    ]  # fmt: skip
    groups = GRID.groups(seen, ("text", "code", "watermark"), 64, 64, 0.5)
    assert list(groups) == ["text", "code"]
    assert groups["code"] == {0: 256.0, 1: 256.0}
    assert list(groups["text"]) == list(range(16))


@pytest.mark.parametrize("taken", [0, 1, 5, 16])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 7.5])
def test_weights_are_those_of_the_equation_and_sum_to_the_number_of_bins(taken, alpha):
    weights = region_weights(GRID, range(taken), alpha)
    assert float(weights.sum()) == pytest.approx(16)
    flat = weights.flatten()
    if taken:
        assert flat[0] == pytest.approx(16 / (taken + alpha * (16 - taken)))
    if 0 < taken < 16:
        assert float(flat[-1] / flat[0]) == pytest.approx(alpha)
    else:
        assert torch.equal(weights, torch.ones_like(weights))


def test_alpha_of_nothing_is_refused():
    with pytest.raises(SettingError, match="alpha"):
        region_weights(GRID, (1,), 0.0)


def test_weights_at_another_resolution_keep_place_and_mean():
    weights = region_weights(Grid(4, 2), (3, 5), 3.0)
    exact = upsampled(weights, 4, 16)
    assert torch.allclose(exact, weights.repeat_interleave(2, 0).repeat_interleave(4, 1))
    for height, width in ((16, 16), (5, 7), (3, 3), (1, 1)):
        assert float(upsampled(weights, height, width).mean()) == pytest.approx(1.0)


def test_a_caption_goes_on_with_name_and_tokens(model, words):
    made = words.write("a red star", {"heart": {5: 1.0, 6: 2.0}})
    assert made.text == "a red star heart <l6> <l7>"
    plain = ids_of(model, "a red star heart")
    end = plain.index(model.tokenizer.eos_token_id)
    wanted = [*plain[:end], words.known + 5, words.known + 6]
    assert list(made.ids[: end + 2]) == wanted
    assert set(made.ids[end + 2 :]) == {model.tokenizer.eos_token_id}
    assert len(made.ids) == 16 and (made.cut, made.lost) == (0, 0)


def test_without_detections_a_caption_stays_as_it_is(model, words):
    for text in ("", "a red star", "a red star of a red star of a red star of a red star"):
        assert list(words.write(text, {}).ids) == ids_of(model, text)


def test_location_tokens_are_cut_and_never_the_caption(model, words):
    caption = "a red star of a blue heart"  # 7 of 14 tokens; "circle" is one more
    made = words.write(caption, {"circle": {i: float(i) for i in range(10)}})
    assert (made.cut, made.lost) == (4, 0)
    assert made.text == f"{caption} circle <l5> <l6> <l7> <l8> <l9> <l10>"
    full = "a red star of a red star of a red star of a red"
    made = words.write(full, {"circle": {0: 1.0}})
    assert list(made.ids) == ids_of(model, full) and (made.cut, made.lost) == (1, 1)


def test_two_concepts_share_what_room_there_is(words):
    bins = dict.fromkeys(range(16), 1.0)
    made = words.write("a", {"star": bins, "heart": {0: 1.0, 1: 3.0}})
    assert made.cut == 18 - 11 and made.text.endswith("heart <l1> <l2>")
    assert made.text.count("<l") == 11


def test_the_negative_shares_its_tokens_where_groups_do_not_fit(model):
    small = Words(model, Grid(2, 2))
    made = small.everywhere("", ["star", "heart"])
    assert made.text == "star <l1> <l2> <l3> <l4> heart <l1> <l2> <l3> <l4>"
    made = Words(model, Grid(3, 3)).everywhere("", ["star", "heart"])
    assert made.text == "star heart " + " ".join(f"<l{i}>" for i in range(1, 10))
    assert made.cut == 0
    assert small.everywhere("a photo", ["star"], located=False).text == "a photo star"


def test_thinned_keeps_what_holds_most_or_spreads_evenly():
    assert thinned({3: 1.0, 4: 9.0, 7: 5.0}, 2) == [4, 7]
    assert thinned(dict.fromkeys(range(16), 1.0), 4) == [2, 6, 10, 14]
    assert thinned(dict.fromkeys(range(16), 1.0), 20) == list(range(16))
    assert thinned({3: 1.0}, 0) == []


def test_rows_of_known_words_encode_as_the_words_themselves(model, words):
    """A new token with the row of a word is that word; without new tokens nothing differs."""
    table = model.token_table()
    word = words.pieces("heart")[0]
    rows = table.mean(0).repeat(16, 1)
    rows[5] = table[word]
    ids = torch.tensor([words.write("a red star", {"heart": {5: 1.0}}).ids])
    made = words.encode(ids, rows).embeddings
    torch.testing.assert_close(made, model.encode(["a red star heart heart"]).embeddings)
    plain = torch.tensor([words.write("a red star", {}).ids])
    torch.testing.assert_close(
        words.encode(plain, rows).embeddings, model.encode(["a red star"]).embeddings
    )


def test_gradients_reach_the_rows_in_use_and_no_others(model, words):
    rows = model.token_table().mean(0).repeat(16, 1).double().requires_grad_()
    ids = torch.tensor([words.write("a star", {"heart": {2: 1.0, 9: 1.0}}).ids])
    weights = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))

    def value(rows):
        return (words.encode(ids, rows).embeddings[0] * weights).sum().double()

    (gradient,) = torch.autograd.grad(value(rows), rows)
    used = gradient.abs().sum(1).nonzero().flatten().tolist()
    assert used == [2, 9]
    with torch.no_grad():
        step = torch.zeros_like(rows)
        step[9, 4] = 1e-3
        slope = (value(rows + step) - value(rows - step)) / 2e-3
    assert float(slope) == pytest.approx(float(gradient[9, 4]), rel=1e-2)
