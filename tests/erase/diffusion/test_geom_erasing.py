"""Geom-Erasing: what trains, what stays, the weighted loss, and what the edit does at generation."""

import dataclasses

import numpy as np
import pytest
import torch

from expunge.concept import Concept, as_concepts
from expunge.core import finetune, scores
from expunge.core.detections import detected
from expunge.core.location_tokens import Grid, Words
from expunge.edit import Edit
from expunge.erase.diffusion.geom_erasing import ROWS, GeomErasing, _Places
from expunge.errors import InputError, MissingCapability, SettingError, WrongState
from expunge.models.base import noise_generator
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

MARK = as_concepts("mark")
QUICK = {"steps": 3, "batch": 4, "columns": 2, "rows": 2}


def data(count=8):
    """Noise; every second picture has a white square in a quarter of its own."""
    pictures = np.random.default_rng(0).integers(0, 200, (count, 16, 16, 3), dtype=np.uint8)
    boxes = []
    for index in range(count):
        x, y = 8 * (index // 2 % 2), 8 * (index // 4 % 2)
        if index % 2 == 0:
            pictures[index, y : y + 8, x : x + 8] = 255
        boxes.append([(0.9, (x, y, x + 8, y + 8), "mark")] if index % 2 == 0 else [])
    return {"pictures": pictures, "captions": ["a red star"] * count, "boxes": boxes}


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def places(model, concepts=MARK, given=None, seed=0, **settings):
    method = GeomErasing(**{**QUICK, **settings})
    words = Words(model, Grid(method.columns, method.rows))
    found = detected(model, concepts, given or data(), None, count=0, seed=seed)
    return _Places(method, model, concepts, words, found, seed)


def values(model):
    return {name: p.detach().clone() for name, p in model.tensors().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# -- training -----------------------------------------------------------------------------------------


def test_the_model_setting_trains_the_rows_alone_on_pictures_that_hold_the_concept(model):
    task = places(model)
    assert {group: [name for name, _ in pairs] for group, pairs in task.parameters().items()} == {
        "tokens": [ROWS]
    }
    assert len(task.ids) == 4 and all(int(row.max()) >= task.words.known for row in task.ids)
    assert torch.equal(task.rows[0], model.token_table().mean(0))


def test_the_data_setting_trains_rows_and_denoiser_on_all_pictures(model):
    task = places(model, setting="data")
    groups = task.parameters()
    assert len(task.ids) == 8
    assert {name for name, _ in groups["denoiser"]} == {
        n for n in model.tensors() if n.startswith("unet.")
    }
    assert all(p is task.rows for _, p in groups["tokens"])
    plain = places(model, setting="data", written="name")
    assert set(plain.parameters()) == {"denoiser"}
    assert int(plain.ids.max()) < plain.words.known
    assert plain.texts[0].text == "a red star mark" and plain.texts[1].text == "a red star"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_equation(prediction):
    model = tiny_diffusion(prediction_type=prediction)
    task = places(model, setting="data", dropout=0.0, alpha=3.0)
    step = finetune.Step(2, 5, 7)
    pick = torch.randint(8, (4,), generator=step.generator("pick"))
    with torch.no_grad():
        loss = task.step(step)["tokens"]
        points, noise = scores.noised(model, task.latents[pick], step.generator("noise"))
        total = 0.0
        for row, index in enumerate(pick.tolist()):
            one = points.select([row])
            made = scores.epsilon(model, one, task.words.encode(task.ids[[index]], task.rows))
            squared = (made[0] - noise[row]).double().square()
            inside = torch.zeros(8, 8, dtype=torch.float64)
            if index % 2 == 0:
                x, y = 4 * (index // 2 % 2), 4 * (index // 4 % 2)
                inside[y : y + 4, x : x + 4] = 1
                # K = 1 of T = 4 bins
                weights = torch.where(inside.bool(), 4 / (1 + 3 * 3), 3 * 4 / (1 + 3 * 3)).double()
            else:
                weights = inside + 1
            total += float((weights * squared).mean()) / 4
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_training_can_be_left_to_the_noisy_part_of_the_schedule(model, monkeypatch):
    asked, plain = [], scores.epsilon

    def watched(model, points, condition):
        asked.extend(points.timesteps.tolist())
        return plain(model, points, condition)

    monkeypatch.setattr(scores, "epsilon", watched)
    task = places(model, low=0.5)
    for index in range(5):
        task.step(finetune.Step(index, 5, 0))
    assert min(asked) >= 500 and len(set(asked)) > 10


def test_both_rates_follow_the_schedule(model, monkeypatch):
    seen = {}

    def stopped(task, loop, **_):
        seen.update({"tokens": loop.optimiser, **loop.groups})
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "fit", stopped)
    method = GeomErasing(**QUICK, setting="data", schedule="linear", lr=0.5, denoiser_lr=0.25)
    with pytest.raises(KeyboardInterrupt):
        method.erase(model, MARK, data=data())
    assert {name: [one.rate(i, 4) for i in (0, 2)] for name, one in seen.items()} == {
        "tokens": [0.5, 0.25], "denoiser": [0.25, 0.125],
    }  # fmt: skip


def test_dropping_drops_name_and_tokens_with_the_caption(model):
    task = places(model, setting="data", dropout=1.0)
    loss = task.step(finetune.Step(0, 1, 0))["tokens"]
    assert torch.autograd.grad(loss, task.rows, allow_unused=True)[0].abs().max() == 0


def test_gradients_reach_no_row_whose_bin_is_empty(model):
    given = data()
    given["boxes"] = [[(0.9, (0, 0, 8, 8), "mark")]] + [[]] * 7
    task = places(model, given=given)
    (gradient,) = torch.autograd.grad(task.step(finetune.Step(0, 1, 0))["tokens"], task.rows)
    assert gradient[0].abs().max() > 0 and gradient[1:].abs().max() == 0


def test_random_rows_are_rows_of_the_vocabulary_and_depend_on_the_seed(model):
    one, two = places(model, start="random"), places(model, start="random", seed=1)
    table = model.token_table()
    assert all((table == row).all(1).any() for row in one.rows)
    assert not torch.equal(one.rows, two.rows)


def test_detections_below_the_threshold_do_not_count(model):
    with pytest.raises(InputError, match="seen in none of the 8"):
        places(model, confidence=0.95)


def test_a_caption_without_room_teaches_nothing_under_the_model_setting(model):
    given = data()
    given["captions"] = ["a red star " * 6] * 8
    with pytest.raises(InputError, match="no caption has room"):
        places(model, given=given)


def test_what_cannot_work_is_refused_in_words(model):
    with pytest.raises(SettingError, match="nothing would train"):
        GeomErasing(written="name").erase(model, "mark", data=data())
    for name in ("sdxl", "pixart", "sana", "sd3", "flux"):
        with pytest.raises(MissingCapability):
            GeomErasing(**QUICK).erase(tiny_layout(name), "mark", data=data())
    with pytest.raises(InputError, match="nobody says"):
        GeomErasing(**QUICK).erase(model, "mark")


# -- the edit -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def edit(model):
    return GeomErasing(**QUICK, lr=0.05).erase(model, "mark", data=data(), keep=["star"])


def test_the_model_setting_leaves_every_weight_bit_for_bit(model, edit):
    before = values(model)
    with edit.on(model):
        now = values(model)
    assert same(values(model), before)
    table = "text_encoder.embeddings.token_embedding.weight"
    assert all(torch.equal(now[name], before[name]) for name in before if name != table)
    known = len(before[table])
    assert torch.equal(now[table][:known], before[table]) and len(now[table]) == known + 4
    assert torch.equal(now[table][known:], edit.tensors[ROWS])
    moved = (edit.tensors[ROWS] != before[table].mean(0)).any(1)
    assert int(moved.sum()) >= 2
    manifest = edit.manifest
    assert (manifest.kind, manifest.acts, manifest.targets) == ("control", True, [])
    assert manifest.tokens == {"tokenizer": ["<l1>", "<l2>", "<l3>", "<l4>"]}
    assert manifest.keep == ["star"] and manifest.report["negative"] == "mark <l1> <l2> <l3> <l4>"
    assert manifest.report["location_tokens_written"] == [1, 1, 1, 1]


def test_a_trained_caption_is_what_the_tokenizer_makes_of_its_text(model, edit):
    written = Words(model, Grid(2, 2)).write("a red star", {"mark": {1: 1.0, 3: 1.0}})
    with edit.on(model):
        assert model.token_ids([written.text])[0].tolist() == list(written.ids)


def test_the_negative_stands_in_place_of_the_empty_text(model, edit):
    plain = model.generate(["a red star"], seeds=3)
    with edit.on(model):
        acted = model.generate(["a red star"], seeds=3)
        alone = model.generate(["a red star"], seeds=3, guidance=1.0)
    silent = GeomErasing(**QUICK, lr=0.05, negative="none").erase(model, "mark", data=data())
    assert not silent.manifest.acts
    assert torch.equal(silent.tensors[ROWS], edit.tensors[ROWS])
    with silent.on(model):
        own = model.generate(["a red star"], seeds=3)
        said = model.generate(["a red star"], seeds=3, negative="mark <l1> <l2> <l3> <l4>")
    assert np.array_equal(own, plain) and np.array_equal(said, acted)
    assert not np.array_equal(acted, plain)
    assert np.array_equal(alone, model.generate(["a red star"], seeds=3, guidance=1.0))


def test_the_users_negative_stays_and_the_concept_follows(model, edit):
    silent = GeomErasing(**QUICK, lr=0.05, negative="none").erase(model, "mark", data=data())
    with silent.on(model):
        wanted = model.generate(
            ["a star"], seeds=1, negative="a blue heart mark <l1> <l2> <l3> <l4>"
        )
    with edit.on(model):
        made = model.generate(["a star"], seeds=1, negative="a blue heart")
    assert np.array_equal(made, wanted)


def test_the_data_setting_changes_the_denoiser_and_nothing_else(model):
    before = values(model)
    made = GeomErasing(**QUICK, setting="data", denoiser_lr=1e-3).erase(model, "mark", data=data())
    assert same(values(model), before)
    assert {t.name.split(".")[0] for t in made.manifest.targets} == {"unet"}
    assert made.manifest.tokens and made.manifest.acts
    with made.on(model):
        assert not torch.equal(
            model.tensors()["unet.conv_in.weight"], before["unet.conv_in.weight"]
        )
    assert same(values(model), before)


def test_an_edit_survives_its_file(model, edit, tmp_path):
    edit.save(tmp_path / "mark.safetensors")
    again = Edit.load(tmp_path / "mark.safetensors")
    assert again == edit
    with edit.on(model):
        one = model.generate(["a star"], seeds=2)
    with again.on(model):
        two = model.generate(["a star"], seeds=2)
    assert np.array_equal(one, two)


def test_several_concepts_share_the_tokens(model):
    given = data()
    given["boxes"] = [
        [*own, (0.8, (0, 0, 3, 3), "code")] if index % 4 == 0 else own
        for index, own in enumerate(given["boxes"])
    ]
    made = GeomErasing(**QUICK).erase(model, ["mark", "code"], data=given)
    report = made.manifest.report
    assert report["negative"] == "mark code <l1> <l2> <l3> <l4>"  # 16 of 14 tokens otherwise
    assert report["pictures_with"] == {"mark": 4, "code": 2}
    assert made.tensors[ROWS].shape[0] == 4


def test_detections_may_call_the_concept_by_any_name(model):
    given = data()
    names = iter(("Mark", "logo", "LOGO", "mark"))
    given["boxes"] = [[(c, b, next(names)) for c, b, _ in own] for own in given["boxes"]]
    found = detected(model, [Concept("mark", phrases=("logo",))], given, None, count=0, seed=0)
    assert [d.name for own in found.boxes for d in own] == ["mark"] * 4


def test_a_second_edit_with_the_same_tokens_is_refused(model, edit):
    other = GeomErasing(**QUICK).erase(model, "mark", data=data(), seed=1)
    with edit.on(model):
        rows = model.cost.rows("denoiser")
        with pytest.raises(WrongState, match="of an earlier geom-erasing edit"):
            GeomErasing(**QUICK).erase(model, "mark", data=data(), seed=1)
        assert model.cost.rows("denoiser") == rows
    with edit.on(model), pytest.raises(WrongState):
        other.apply(model, rebase=True)


@pytest.mark.parametrize("setting", ["model", "data"])
def test_a_run_taken_up_again_equals_an_uninterrupted_one(model, tmp_path, setting, monkeypatch):
    method = GeomErasing(**{**QUICK, "steps": 4}, setting=setting)
    whole = method.erase(model, "mark", data=data(), seed=2)
    after, calls = _Places.after, []

    def stopped(self, step, losses):
        calls.append(step.index)
        if step.index == 1:
            raise KeyboardInterrupt
        return after(self, step, losses)

    monkeypatch.setattr(_Places, "after", stopped)
    with pytest.raises(KeyboardInterrupt):
        method.erase(model, "mark", data=data(), seed=2, run=tmp_path)
    monkeypatch.setattr(_Places, "after", after)
    again = method.erase(model, "mark", data=data(), seed=2, run=tmp_path)
    assert again == whole
    short = dataclasses.replace(method, steps=3).erase(model, "mark", data=data(), seed=2)
    assert not torch.equal(short.tensors[ROWS], whole.tensors[ROWS])


def test_cost_counts_what_was_done(model):
    made = GeomErasing(**QUICK).erase(model, "mark", data=data())
    assert made.manifest.cost["denoiser.forward"] == made.manifest.cost["denoiser.backward"] == 12
    assert made.manifest.cost["autoencoder.forward"] == 4  # only what is trained on is encoded


def test_generators_are_private(model):
    state = torch.random.get_rng_state()
    places(model, start="random")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert noise_generator(0, "location tokens").initial_seed() >= 0
