"""AdvUnlearn: losses by hand, an attack on the present model, what trains, modes, resuming, a sibling."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import rich.progress  # noqa: F401  # its import draws from the global random state
import torch

from expunge.concept import Concept
from expunge.core import scores, soft_prompts, trajectories
from expunge.core.layer_choice import trainable
from expunge.core.retain import retain_prompts
from expunge.core.tasks import Step
from expunge.core.trajectories import Trajectories
from expunge.erase.diffusion.advunlearn import AdvUnlearn, _Game
from expunge.erase.diffusion.esd import ESD
from expunge.errors import ConceptError, InputError, MissingCapability, SettingError, WrongBase
from expunge.testing import bench, tiny_diffusion, tiny_layout
from expunge.testing.resuming import Killed, writing

STAR = Concept("star", phrases=("heart",))
DATA = {"captions": ["a red circle", "a blue square", "a photo of a circle", "green plain"]}
QUICK = {
    "sampling_steps": 3, "steps": 3, "warm_up": 1, "batch": 2, "lr": 1e-3, "attack_steps": 2, "attack_lr": 1e-2,
    "retain_batch": 2, "bank": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def game(model, **settings):
    method = AdvUnlearn(**{**QUICK, **settings})
    retained = None
    if method.gamma or method.mode == "iter":
        retained = retain_prompts(model, [STAR], (), DATA["captions"], count=9)
    return _Game(method, model, [STAR], retained, 1)


def erase(model, seed=0, run=None, **settings):
    return AdvUnlearn(**{**QUICK, **settings}).erase(model, STAR, data=DATA, seed=seed, run=run)


class _Moved:
    """The model with other text weights while the frozen answers stay."""

    def __init__(self, task):
        [pairs] = task.parameters().values()
        self.parameters = [p for _, p in pairs]
        self.before = [p.detach().clone() for p in self.parameters]

    def __enter__(self):
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.parameters:
                p.add_(0.1 * torch.randn(p.shape, generator=draw))

    def __exit__(self, *_):
        with torch.no_grad():
            for p, value in zip(self.parameters, self.before, strict=True):
                p.copy_(value)


def asked(model, points, rows):
    with torch.no_grad():
        return scores.epsilon(model, points, rows).double()


# -- the losses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_update_is_the_push_at_the_adversarial_prompt_and_gamma_times_what_is_held(kind):
    """``random``: the vectors are those of the start, so everything can be written out."""
    model = tiny_diffusion(prediction_type=kind)
    task = game(
        model, rule="random", restarts=2, tokens=2, eta=0.7, gamma=0.4, batch=3, placement="middle"
    )
    step = Step(2, 9, 1)
    points, answers = task.sources[0].at(step, batch=3, first=2 * (2 * 2 + 3) + 2 * 2)
    held, texts, _ = task.retain.at(step, 2)
    concept, empty = (
        asked(model, points, rows.repeat(3))
        for rows in (model.encode("star"), model.unconditional())
    )
    kept = asked(model, held, model.encode(texts))
    torch.testing.assert_close(answers["concept"].double(), concept, atol=1e-5, rtol=1e-4)
    start = soft_prompts.random_start(model, 2, 2, step.generator("start"))
    with _Moved(task), torch.no_grad():
        rows = task.splices[0].encode(start, torch.zeros(2, dtype=torch.long)).select([0, 1, 0])
        pushed = asked(model, points, rows) - (empty - 0.7 * (concept - empty))
        drift = asked(model, held, model.encode(texts)) - kept
        loss = float(task.step(step)["text-encoder"])
        plain = float(task.step(dataclasses.replace(step, index=0))["text-encoder"])
    wanted = float(pushed.square().mean()) + 0.4 * float(drift.square().mean())
    assert loss == pytest.approx(wanted, rel=1e-4)
    assert plain != pytest.approx(loss, rel=1e-3)


def test_warm_up_and_no_attack_use_the_plain_phrase(model):
    for settings in ({"warm_up": 2}, {"attack_steps": 0}):
        task = game(model, gamma=0.0, **settings)
        step = Step(1, 9, 1)
        first = 1 * (task.method.attack_steps + 2) + task.method.attack_steps
        points, answers = task.sources[0].at(step, batch=2, first=first)
        made = asked(model, points, model.encode(["star"] * 2))
        target = 2 * answers["empty"].double() - answers["concept"].double()
        with torch.no_grad():
            loss = float(task.step(step)["text-encoder"])
        assert loss == pytest.approx(float((made - target).square().mean()), rel=1e-4)
        assert not task.attacks


def test_without_attack_and_retain_it_is_esd_on_the_text_encoder(model):
    """ESD counts eta from another prediction; its points are the same."""
    same = {"steps": 2, "batch": 2, "lr": 1e-3, "sampling_steps": 3}
    ours = AdvUnlearn(attack_steps=0, gamma=0.0, label="own", eta=1.5, **same).erase(model, "star")
    theirs = ESD(layers="text-encoder", eta=2.5, **same).erase(model, "star")
    [mine], [other] = (e.manifest.report["losses"].values() for e in (ours, theirs))
    assert mine == pytest.approx(other, rel=1e-3)
    assert {t.name for t in ours.manifest.targets} == {t.name for t in theirs.manifest.targets}
    adversarial = AdvUnlearn(gamma=0.0, label="own", eta=1.5, warm_up=0, attack_steps=1, **same)
    [attacked] = adversarial.erase(model, "star").manifest.report["losses"].values()
    assert attacked[0] != pytest.approx(other[0], rel=1e-3)


# -- the attack ------------------------------------------------------------------------------------


def test_the_attack_descends_on_the_present_model_towards_the_original(model):
    """With one point in the bank every attack step has the same loss: it falls, and it is the card's."""
    task = game(model, bank=1, attack_steps=12, attack_lr=2e-2, batch=1)
    points, answers = task.sources[0].bank
    splice, item = task.splices[0], torch.zeros(1, dtype=torch.long)

    def loss(vectors):
        with torch.no_grad():
            made = asked(model, points, splice.encode(vectors, item))
        return float((made - answers["concept"].double()).square().mean())

    step = Step(1, 9, 1)
    start = soft_prompts.random_start(model, 1, 1, step.generator("start"))
    with _Moved(task):
        found = task._attack(step, 0, 0)
        first, last = task.attacks[0]
        assert first == pytest.approx(loss(start), rel=1e-4)
        assert loss(found) < last < first
    unmoved = task._attack(step, 0, 0)
    assert not torch.equal(found, unmoved)  # another model is attacked in another way
    assert not any(p.requires_grad for p in model.tensors().values())


def test_attack_steps_have_points_of_their_own(model):
    task, seen = game(model, bank=None, restarts=2, attack_steps=3), []
    at = task.sources[0].at

    def noted(step, **where):
        seen.append((where["first"], where["batch"]))
        return at(step, **where)

    task.sources[0].at = noted
    with torch.no_grad():
        task.step(Step(1, 9, 1))
        task.step(Step(2, 9, 1))
    # Three steps of two restarts and a batch of two each update: every walk has a number of its own.
    assert seen == [(8, 2), (10, 2), (12, 2), (14, 2), (16, 2), (18, 2), (20, 2), (22, 2)]


def test_a_restart_from_the_latest_begins_where_the_last_attack_ended(model, monkeypatch):
    calls, own = [], soft_prompts.descend

    def descend(loss, start, **more):
        calls.append([start, own(loss, start, **more).vectors])
        return soft_prompts.Found(calls[-1][1], ())

    monkeypatch.setattr(soft_prompts, "descend", descend)
    for start in ("latest", "random"):
        calls.clear()
        erase(model, start=start, steps=4)
        same = [torch.equal(after[0], before[1]) for before, after in itertools.pairwise(calls)]
        assert len(calls) == 3 and same == [start == "latest"] * 2


@pytest.mark.parametrize("placement", ["suffix", "third", "replace", "add"])
def test_every_placement_trains(model, placement):
    edit = erase(model, placement=placement, tokens=2, phrases=True, steps=2)
    assert edit.manifest.targets and len(edit.manifest.report["attacks"]) == 1


def test_one_phrase_an_update_drawn_anew(model):
    task, taken = game(model, phrases=True, gamma=0.0, attack_steps=0), []
    for index in range(12):
        draw = Step(index, 12, 1).generator("phrase")
        taken.append(int(torch.randint(2, (1,), generator=draw)))
        for which, source in enumerate(task.sources):
            source.at = lambda step, which=which, **more: (
                pytest.fail() if which != taken[-1] else _raise()
            )
        with pytest.raises(_Asked):
            task.step(Step(index, 12, 1))
    assert set(taken) == {0, 1}
    assert [s.texts for s in task.sources] == [["star"], ["heart"]]
    assert all(len(s.bank[0].which) == 2 for s in task.sources)  # the bank is shared out


class _Asked(Exception):
    pass


def _raise():
    raise _Asked


# -- what trains -----------------------------------------------------------------------------------


def names(edit):
    return {target.name for target in edit.manifest.targets}


def test_the_text_encoder_trains_but_for_its_embeddings(model):
    before = bench.trace(model)
    edit = erase(model)
    assert bench.trace(model) == before
    found = names(edit)
    assert all(name.startswith("text_encoder.") for name in found)
    assert any("final_layer_norm" in name for name in found)
    assert not any("embedding" in name for name in found)
    layers = {name.split("layers.")[1].split(".")[0] for name in found if "layers." in name}
    assert layers == {"0", "1"}
    one = names(erase(model, text_layers=1))
    assert one < found and all("layers.0." in name for name in one)


def test_the_denoiser_walks_by_itself_unless_a_bank_is_drawn(model):
    edits = {
        walked: erase(model, part="denoiser", bank=None, walked=walked, lr=1e-2, attack_steps=1)
        for walked in (None, "frozen")
    }
    assert names(edits[None]) <= {n for n, _ in trainable(model, "other")}
    assert [e.manifest.report["walked"] for e in edits.values()] == ["student", "frozen"]
    one, two = (e.manifest.report["losses"]["denoiser"] for e in edits.values())
    assert one[0] == two[0] and one[1:] != two[1:]
    banked = erase(model, part="denoiser", layers="cross-attention-kv")
    assert banked.manifest.report["walked"] == "frozen"
    assert names(banked) == set(model.text_projections())


def test_a_bank_holds_what_fresh_points_are(model):
    task = game(model, bank=4, label="bin")
    points, answers = task.sources[0].bank
    drawn = trajectories.draw(model, ["star"], 4, steps=3, guidance=3.0, seed=1)
    fresh = trajectories.relabelled(model, drawn, steps=3, seed=1)
    assert torch.equal(points.latents, fresh.latents)
    assert torch.equal(points.timesteps, fresh.timesteps)
    concept = asked(model, points, model.encode("star").repeat(4))
    torch.testing.assert_close(answers["concept"].double(), concept, atol=1e-5, rtol=1e-4)


def test_a_bin_begins_at_the_own_timestep():
    """With 50 steps of 1000: ``t ~ U[20 s, 20 (s + 1))`` at level ``s``; without bins the level's own timestep."""
    model = tiny_diffusion()
    times = model.timesteps(50)
    own = Trajectories(
        torch.zeros(150, 4, 8, 8), times.repeat(3), torch.zeros(150, dtype=torch.long)
    )
    made = trajectories.relabelled(model, own, steps=50, seed=0)
    levels = 49 - torch.arange(150) % 50
    assert torch.equal(made.timesteps // 20, levels) and made.timesteps.dtype == times.dtype
    assert len(set((made.timesteps % 20).tolist())) > 15
    for binned, points in ((False, own), (True, made)):
        depths = trajectories.depths_of(model, points, steps=50, binned=binned)
        assert torch.equal(depths, torch.arange(150) % 50)


def test_a_bank_saves_the_walks(model):
    """Rows without a bank: each attack step, each update and each retain point walks."""
    cost = {bank: erase(model, bank=bank, steps=4, label="own").manifest.cost for bank in (None, 4)}
    trained = 3 * 2 + 4 * (2 + 2)  # three attacks of two steps, four updates of two and two rows
    assert all(found["denoiser.backward"] == trained for found in cost.values())
    asked = {bank: found["denoiser.forward"] - trained for bank, found in cost.items()}
    walks = trajectories.draw(model, ["star"], 4, steps=3, guidance=3.0, seed=0)
    depth = int(trajectories.depths_of(model, walks, steps=3).sum())
    held = trajectories.draw(model, ["star"], 4, steps=3, guidance=3.0, seed=_retain_seed(model))
    depth += int(trajectories.depths_of(model, held, steps=3).sum())
    assert asked[4] == 2 * depth + 4 * 2 + 4
    assert asked[None] > 2 * asked[4]


def _retain_seed(model):
    from expunge.models.base import noise_generator

    return noise_generator(0, "retain").initial_seed()


# -- modes, errors, resuming -----------------------------------------------------------------------


def test_iter_takes_retain_updates_of_their_own(model):
    edit = erase(model, mode="iter", retain_steps=2, gamma=0.0, lr=1e-2)
    losses = edit.manifest.report["losses"]["text-encoder"]
    assert len(losses) == 3 * 3 and edit.manifest.report["steps"] == 9
    task = game(model, mode="iter", retain_steps=2, gamma=0.0)
    with _Moved(task), torch.no_grad():
        found = float(
            task.step(Step(5, 9, 1))["text-encoder"]
        )  # the second one after the second update
        points, texts, answers = task.retain.at(Step(5, 9, 1), 1 * 2 + 1)
        made = asked(model, points, model.encode(texts))
    assert found == pytest.approx(float((made - answers.double()).square().mean()), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"walked": "student"}, "allowed is walked='frozen'"),
        ({"warm_up": 3}, "no attack would be made"),
        ({"restarts": 3}, "no point for some of its attacks"),
        ({"placement": "before"}, "placement is 'before'"),
        ({"text_layers": 9}, "allowed is 1 to 2"),
    ],
)
def test_settings_that_mean_nothing_are_refused(model, settings, said):
    with pytest.raises(SettingError, match=said):
        erase(model, **settings)
    assert AdvUnlearn(warm_up=5, steps=3, attack_steps=0)


def test_what_would_be_ignored_or_contradicts_itself_is_refused(model):
    with pytest.raises(InputError, match="only with gamma above 0"):
        erase(model, gamma=0.0)
    with pytest.raises(InputError, match="reads no 'pictures'"):
        AdvUnlearn(**QUICK).erase(model, STAR, data={"pictures": {}, **DATA})
    with pytest.raises(ConceptError, match="to be kept, but also erased"):
        AdvUnlearn(**QUICK).erase(model, STAR, keep=["square", "heart"], data=DATA)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_models_with_several_text_encoders_train_without_an_attack(name):
    model = tiny_layout(name)
    with pytest.raises(MissingCapability, match="attack_steps=0 trains without an attack"):
        erase(model)
    edit = erase(model, attack_steps=0, steps=1, bank=2, sampling_steps=2)
    assert {n.split(".")[0] for n in names(edit)} == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize(("kill", "settings"), [(2, {"start": "latest"}), (3, {"mode": "iter"})])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, kill, settings):
    whole = erase(tiny_diffusion(), seed=2, **settings)
    with pytest.raises(Killed), writing(kill_at=kill):
        erase(tiny_diffusion(), seed=2, run=tmp_path, **settings)
    again = erase(tiny_diffusion(), seed=2, run=tmp_path, **settings)
    assert again.digest == whole.digest
    assert again.manifest.report["attacks"] == whole.manifest.report["attacks"]


def test_the_text_encoder_goes_into_a_sibling_as_it_is(model):
    """Another denoiser behind the same text encoder: the edit's base is the text encoder alone."""
    sibling = tiny_diffusion()
    with torch.no_grad():
        for _, parameter in trainable(sibling, "full"):
            parameter.add_(1e-3)
    edit = erase(model)
    with edit.on(sibling), edit.on(model):
        for name in names(edit):
            assert torch.equal(sibling.tensor(name), model.tensor(name))
    with pytest.raises(WrongBase):
        erase(model, part="denoiser").apply(sibling)
