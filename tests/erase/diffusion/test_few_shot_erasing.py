"""Few-shot erasing: the loss by hand, the chosen tensors, Adam's first step, the series of epochs, resume."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.concept import Concept
from expunge.core import finetune, scores
from expunge.core.prompt_templates import OBJECT, STYLE
from expunge.core.tasks import Step
from expunge.core.text_layers import trainable_text
from expunge.edit import Edit
from expunge.erase.diffusion.few_shot_erasing import PARAMETERS, FewShotErasing, _Ascent
from expunge.errors import InputError, MissingPart, ResumeMismatch, RunError, SettingError
from expunge.models.samplers import alpha_sigma
from expunge.testing import tiny_diffusion, tiny_layout
from expunge.testing.resuming import Killed, writing

STAR = Concept("star", phrases=("heart",))
QUICK = {"pictures": 4, "lr": 1e-3, "epochs": 3}


def drawn(count, height=16, width=16, seed=0):
    return np.random.default_rng(seed).integers(0, 255, (count, height, width, 3), dtype=np.uint8)


def given(pictures, name="star"):
    return {"pictures": {name: (pictures, None, (name,) * len(pictures))}}


DATA = given(drawn(4))


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def task(model, concepts=(STAR,), data=DATA, seed=0, keep=(), **more):
    return _Ascent(FewShotErasing(**QUICK | more), model, list(concepts), list(keep), data, seed)


# -- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_minus_the_training_loss_of_what_the_denoiser_predicts(kind):
    model = tiny_diffusion(prediction_type=kind)
    own, step = task(model), Step(3, 6, 7)
    rows, draw = own.visited(3), step.generator()
    texts = [own.prompt(STAR, draw) for _ in rows]
    clean = own.latents[rows]
    times = torch.randint(0, 1000, (2,), generator=draw)
    noise = torch.randn(clean.shape, generator=draw)
    levels = alpha_sigma(model.pipeline.scheduler, times)
    alpha, sigma = (level.float().reshape(-1, 1, 1, 1) for level in levels)
    ids = model.token_ids(texts)
    with torch.no_grad():
        made = model.pipeline.unet(
            alpha * clean + sigma * noise, times, encoder_hidden_states=model.text_encoder(ids)[0]
        ).sample
    wanted = noise if kind == "epsilon" else alpha * noise - sigma * clean
    by_hand = -(made - wanted).square().mean()
    torch.testing.assert_close(own.step(step)["text"].detach(), by_hand)
    other = (made - (noise if kind != "epsilon" else alpha * noise - sigma * clean)).square().mean()
    assert abs(float(other) - float(-by_hand)) > 1e-3


def test_a_flow_matching_target_is_noise_minus_latents():
    model = tiny_layout("sd3")
    own, step = task(model), Step(0, 6, 7)
    rows, draw = own.visited(0), step.generator()
    condition = model.encode([own.prompt(STAR, draw) for _ in rows])
    points, noise = scores.noised(model, own.latents[rows], draw)
    with torch.no_grad():
        made = model.predict(points.latents, points.timesteps, condition).value
    by_hand = -(made - (noise - own.latents[rows])).square().mean()
    torch.testing.assert_close(own.step(step)["text"].detach(), by_hand)


def test_the_first_step_is_adams_up_the_gradient(model):
    """From rest Adam moves each entry by ``lr g / (|g| + eps)``: here the whole edit, with the sign turned."""
    more = {"epochs": 1, "batch": 4, "lr": 1e-4}
    edit = FewShotErasing(**QUICK | more).erase(model, STAR, data=DATA, seed=0)
    own = task(model, **more)
    for _, parameter in own.pairs:
        parameter.requires_grad_(True)
    error = -own.step(Step(0, 1, 0))["text"]
    found = torch.autograd.grad(error, [p for _, p in own.pairs])
    for _, parameter in own.pairs:
        parameter.requires_grad_(False)
    moved = 0
    for (name, parameter), up in zip(own.pairs, found, strict=True):
        down = -up + 1e-8 * parameter.detach()
        wanted = -1e-4 * down / (down.abs() + 1e-6)
        change = edit.change(name, parameter) if name in _targets(edit) else torch.zeros(up.shape)
        torch.testing.assert_close(change.float(), wanted, atol=2e-6, rtol=2e-2)
        clear = up.abs() > 1e-5
        assert bool((change.float()[clear].sign() == up[clear].sign()).all())
        moved += int(clear.sum())
    assert moved > 1000


def test_settings_of_adam_are_the_papers(model, monkeypatch):
    seen = []
    build = finetune.Optimiser.build
    monkeypatch.setattr(
        finetune.Optimiser, "build", lambda self, p: seen.append(build(self, p)) or seen[-1]
    )
    FewShotErasing(pictures=4).erase(model, STAR, data=DATA)
    [adam] = seen
    [group] = adam.param_groups
    assert type(adam) is torch.optim.Adam
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        1e-5, (0.9, 0.98), 1e-6, 1e-8,
    )  # fmt: skip
    # Nothing is kept for what does not train.
    assert len(group["params"]) == len(task(model).pairs) == len(adam.state)


def test_the_gradient_passes_a_denoiser_that_has_none(model, monkeypatch):
    seen = []
    step = _Ascent.step

    def looking(self, at):
        seen.append([n for n, p in self.model.tensors().items() if p.requires_grad])
        return step(self, at)

    monkeypatch.setattr(_Ascent, "step", looking)
    FewShotErasing(**QUICK).erase(model, STAR, data=DATA)
    chosen = {name for name, _ in task(model).pairs}
    assert all(set(names) == chosen for names in seen) and len(seen) == 6


# -- what trains ---------------------------------------------------------------------------------


def _targets(edit):
    return {target.name for target in edit.manifest.targets}


@pytest.mark.parametrize("choice", PARAMETERS)
def test_each_choice_of_parameters_moves_what_it_names(model, choice):
    edit = FewShotErasing(**QUICK | {"parameters": choice}).erase(model, STAR, data=DATA)
    every = {n for n in model.tensors() if n.startswith("text_encoder.")}
    mlp = {n for n in every if ".mlp." in n}
    attention = {n for n in every if ".self_attn." in n}
    last = {n for n in attention if ".layers.1." in n}
    wanted = {
        "feed-forward+last-attention": mlp | last, "feed-forward": mlp, "attention": attention,
        "both": mlp | attention, "all": every,
    }[choice]  # fmt: skip
    assert {n for n, _ in task(model, parameters=choice).pairs} == wanted
    # A bias of the keys has no gradient but rounding.
    moved = {n for n in wanted if not n.endswith("k_proj.bias")}
    assert moved <= _targets(edit) <= wanted
    assert edit.manifest.report["trained_tensors"] == len(wanted)


def test_sizes_of_the_papers_text_encoder():
    """CLIP ViT-L/14: 56 of 196 tensors, 59.0 of 123 million parameters, by shape alone."""
    from transformers import CLIPTextConfig, CLIPTextModel

    model = tiny_diffusion()
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
        num_attention_heads=12, projection_dim=768,
    )  # fmt: skip
    with torch.device("meta"):
        model.pipeline.text_encoder = CLIPTextModel(config)
    sizes = {}
    for choice, parts in PARAMETERS.items():
        pairs = [p for roles, layers in parts for p in trainable_text(model, roles, layers)]
        sizes[choice] = len(pairs), sum(p.numel() for _, p in pairs)
    assert sizes["feed-forward+last-attention"] == (56, 59_031_552)
    assert sizes["all"] == (196, 123_060_480)
    assert sizes["both"] == (144, sizes["feed-forward"][1] + sizes["attention"][1])


@pytest.mark.parametrize("layout", ["sdxl", "pixart", "sana", "sd3", "flux"])
def test_every_layout_has_a_text_encoder_to_train(layout):
    model = tiny_layout(layout)
    before = {n: p.detach().clone() for n, p in model.tensors().items()}
    edit = FewShotErasing(**QUICK | {"epochs": 1}).erase(model, STAR, data=DATA)
    assert all(torch.equal(p, before[n]) for n, p in model.tensors().items())
    assert {n.split(".")[0] for n in _targets(edit)} == set(model.layout.towers)
    assert {n.split(".")[0] for n in _targets(edit)}.isdisjoint({"unet", "transformer", "vae"})


def test_one_text_encoder_of_several():
    model = tiny_layout("sdxl")
    method = FewShotErasing(**QUICK | {"encoders": ("text_encoder_2",), "epochs": 1})
    edit = method.erase(model, STAR, data=DATA)
    assert {n.split(".")[0] for n in _targets(edit)} == {"text_encoder_2"}
    with pytest.raises(MissingPart, match="text_encoder_3"):
        dataclasses.replace(method, encoders=("text_encoder_3",)).erase(model, STAR, data=DATA)


# -- pictures and prompts --------------------------------------------------------------------------


def test_an_epoch_visits_every_picture_once_in_its_own_order(model):
    own = task(model, data=given(drawn(5)))
    assert own.epoch_steps == 3
    epochs = [[own.visited(3 * e + i) for i in range(3)] for e in range(4)]
    assert all(sorted(r for rows in e for r in rows) == list(range(5)) for e in epochs)
    assert [len(rows) for rows in epochs[0]] == [2, 2, 1]
    assert len({str(epoch) for epoch in epochs}) > 1


def test_pictures_are_turned_and_encoded_once(model):
    pictures = drawn(8)
    before = model.cost.snapshot()
    edit = FewShotErasing(**QUICK).erase(model, STAR, data=given(pictures))
    assert model.cost.since(before)["autoencoder.forward"] == 8  # not 8 an epoch
    some = edit.manifest.report["pictures_turned"]["star"]
    assert 0 < some < 8
    rows = {flip: task(model, data=given(pictures), flip=flip).latents for flip in (0.0, 0.5, 1.0)}
    plain = torch.stack([_latents(model, pictures), _latents(model, pictures[:, :, ::-1])])
    assert torch.equal(rows[0.0], plain[0]) and torch.equal(rows[1.0], plain[1])
    turned = [bool(torch.equal(a, b)) for a, b in zip(rows[0.5], plain[1], strict=True)]
    assert sum(turned) == some
    # One draw of the posterior each, not its mean.
    mean = model.latents_of(pictures)
    assert 0 < float((rows[0.0] - mean).abs().mean()) and rows[0.0].shape == mean.shape


def _latents(model, pictures):
    from expunge.models.base import noise_generator

    draw = noise_generator(0, "few-shot-erasing pictures", "star")
    torch.rand(len(pictures), generator=draw)
    posterior = model.vae.encode(torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2) / 127.5 - 1)
    noise = torch.randn(posterior.latent_dist.mean.shape, generator=draw)
    drawn = posterior.latent_dist.mean + posterior.latent_dist.std * noise
    return (drawn * model.vae.config.scaling_factor).detach()


def test_pictures_of_any_size_and_files(model, tmp_path):
    wide = drawn(4, 20, 40)
    wide[:, :, :12], wide[:, :, 28:] = 0, 255
    stretched, cropped = (task(model, data=given(wide), crop=c, flip=0) for c in (False, True))
    assert stretched.latents.shape == cropped.latents.shape == (4, *model.latent_shape)
    assert not torch.equal(stretched.latents, cropped.latents)
    for index, picture in enumerate(wide):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
    paths = tuple(str(tmp_path / f"{index}.png") for index in range(4))
    files = Concept("star", images=paths)
    own = task(model, [files], data=None, flip=0)
    assert own.origins == {"star": "files"} and own.digest is not None
    assert torch.equal(own.latents, stretched.latents)
    (tmp_path / "0.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"0\.png"):
        task(model, [files], data=None)


def test_without_any_pictures_the_model_draws_some(model):
    own = task(model, data=None)
    assert own.origins == {"star": "model"} and len(own.latents) == 4 and own.digest is None


def test_a_template_is_drawn_for_each_picture_at_each_visit(model):
    own, draw = task(model), torch.Generator().manual_seed(0)
    found = {own.prompt(STAR, draw) for _ in range(600)}
    assert found == {t.format("star") for t in OBJECT} and len(OBJECT) == 27
    style = Concept("star", kind="style")
    own = task(model, [style])
    found = {own.prompt(style, draw) for _ in range(600)}
    assert found == {t.format("star") for t in STYLE} and len(STYLE) == 19
    own = task(model, templates=("a {}",), phrases=True)
    assert {own.prompt(STAR, draw) for _ in range(40)} == {"a star", "a heart"}
    own = task(model, templates=("a {} {x}",))  # other brackets stand for themselves
    assert own.prompt(STAR, draw) == "a star {x}"
    texts = []
    own.prompt = lambda *_: texts.append("a star") or "a star"
    own.step(Step(0, 6, 7))
    assert len(texts) == 2
    for wrong in ("a star", "{} and {}"):
        with pytest.raises(SettingError, match="does not hold"):
            task(model, templates=(wrong,))


def test_zero_shot_latents_are_gaussian_and_make_one_step_an_epoch(model):
    own = task(model, data=None, zero_shot=True, batch=64)
    assert own.latents.shape == (64, *model.latent_shape) and own.epoch_steps == 1
    assert abs(float(own.latents.mean())) < 0.05 and abs(float(own.latents.std()) - 1) < 0.05
    edit = FewShotErasing(**QUICK | {"zero_shot": True}).erase(model, STAR)
    report = edit.manifest.report
    assert (report["steps"], report["pictures"], report["pictures_from"]) == (
        3, {"star": 2}, {"star": "noise"},
    )  # fmt: skip
    assert "autoencoder.forward" not in edit.manifest.cost
    with pytest.raises(InputError, match="zero_shot"):
        FewShotErasing(zero_shot=True).erase(model, STAR, data=DATA)
    with pytest.raises(InputError, match="reads no 'captions'"):
        FewShotErasing(**QUICK).erase(model, STAR, data={**DATA, "captions": ["a photo"]})


def test_several_concepts_each_with_its_own_prompts(model):
    moon = Concept("square", kind="style")
    data = {"pictures": DATA["pictures"] | given(drawn(3, seed=1), "square")["pictures"]}
    own = task(model, [STAR, moon], data)
    assert [c.name for c in own.owners] == ["star"] * 4 + ["square"] * 3 and own.epoch_steps == 4
    draw = torch.Generator().manual_seed(0)
    assert "style" in own.prompt(moon, draw) and "style" not in own.prompt(STAR, draw)
    with pytest.raises(InputError, match="not erased"):
        task(model, [STAR], data)


# -- epochs, stops and monitors --------------------------------------------------------------------


def test_the_run_folder_holds_the_very_edit_of_every_epoch(model, tmp_path):
    method = FewShotErasing(**QUICK)
    last = method.erase(model, STAR, data=DATA, keep=("circle",), run=tmp_path)
    for epoch in (1, 2, 3):
        kept = Edit.load(tmp_path / f"epoch-{epoch}.safetensors")
        fresh = dataclasses.replace(method, epochs=epoch)
        assert kept == fresh.erase(model, STAR, data=DATA, keep=("circle",))
        assert kept.manifest.report["epochs"] == epoch == len(kept.manifest.report["drift"]["kept"])
    assert kept == last and len({e.digest for e in method.each_epoch(model, STAR, data=DATA)}) == 3
    with pytest.raises(ResumeMismatch, match="recorded run has 6"):
        dataclasses.replace(method, epochs=2).erase(
            model, STAR, data=DATA, keep=("circle",), run=tmp_path
        )


def test_a_finished_run_gives_its_series_again_without_a_step(model, tmp_path):
    method = FewShotErasing(**QUICK)
    whole = method.each_epoch(model, STAR, data=DATA, run=tmp_path)
    before = model.cost.snapshot()
    again = method.each_epoch(model, STAR, data=DATA, run=tmp_path)
    assert again == whole and "denoiser.backward" not in model.cost.since(before)
    (tmp_path / "epoch-1.safetensors").unlink()
    with pytest.raises(RunError, match="epoch-1"):
        method.each_epoch(model, STAR, data=DATA, run=tmp_path)


@pytest.mark.parametrize("kill", [1, 4])
def test_a_killed_run_goes_on_to_the_same_series(model, tmp_path, kill):
    """Killed within an epoch or at its end; two steps an epoch."""
    method = FewShotErasing(**QUICK)
    wanted = method.each_epoch(model, STAR, data=DATA)
    with writing(kill_at=kill), pytest.raises(Killed):
        method.erase(model, STAR, data=DATA, run=tmp_path)
    found = method.each_epoch(model, STAR, data=DATA, run=tmp_path)
    assert found == wanted and found[-1].manifest.report["resumed_at"] == kill
    drift = [edit.manifest.report["drift"] for edit in (found[-1], wanted[-1])]
    assert drift[0] == drift[1]


def test_half_precision_epochs_hold_the_masters(tmp_path):
    model = tiny_diffusion(dtype=torch.bfloat16)
    method = FewShotErasing(**QUICK | {"lr": 1e-5, "epochs": 2})
    first, _ = method.each_epoch(model, STAR, data=DATA)
    assert first == dataclasses.replace(method, epochs=1).erase(model, STAR, data=DATA)
    name = next(n for n in _targets(first) if n.endswith("fc1.weight"))
    change = first.change(name, model.tensor(name)).abs()
    assert 0 < float(change.max()) < 1e-4  # less than bfloat16 keeps


def test_more_steps_raise_the_loss_and_damage_all_words(model):
    """The loss has no bound: more steps go on, and the bare templates drift with the prompts of the name."""
    own = task(model)

    def error():
        with torch.no_grad():
            return -float(np.mean([float(own.step(Step(i, 8, 9))["text"]) for i in range(8)]))

    errors, reports = [error()], []
    for epochs in (2, 12):
        method = FewShotErasing(**QUICK | {"epochs": epochs, "lr": 3e-3})
        edit = method.erase(model, STAR, data=DATA, keep=("circle",))
        reports.append(edit.manifest.report)
        with edit.on(model):
            errors.append(error())
    few, many = reports
    assert errors[0] < errors[1] < errors[2]
    assert len(many["losses"]["text"]) == 24 and not many["stopped_early"]
    for words in ("concept", "templates", "kept"):
        drift = many["drift"][words]
        assert drift[:2] == few["drift"][words] and drift[-1] > 1.5 * drift[1] > 0
    assert len(many["drift"]["concept"]) == 12


def test_a_stop_at_a_grown_loss_is_ours_and_off(model, tmp_path):
    more = {"epochs": 8, "lr": 1e-2}
    whole = FewShotErasing(**QUICK | more).each_epoch(model, STAR, data=DATA)
    assert whole[-1].manifest.report["loss_grown"] == []
    grown = FewShotErasing(**QUICK | more | {"stop_at": 1e6})
    never = grown.erase(model, STAR, data=DATA).manifest.report
    assert len(never["loss_grown"]) == 8 and not never["stopped_early"]
    wanted = never["loss_grown"][2]
    assert wanted > max(1.0, *never["loss_grown"][:2])
    stops = dataclasses.replace(grown, stop_at=wanted - 1e-6)
    with writing(kill_at=3), pytest.raises(Killed):
        stops.erase(model, STAR, data=DATA, run=tmp_path)
    found = stops.each_epoch(model, STAR, data=DATA, run=tmp_path)
    assert len(found) == 3 and found[-1].manifest.report["stopped_early"]
    assert found[-1].manifest.settings["epochs"] == 8  # what was asked for
    assert found[-1].manifest.report["loss_grown"] == never["loss_grown"][:3]
    for name in _targets(found[-1]):
        assert torch.equal(found[-1].tensors[f"delta.{name}"], whole[2].tensors[f"delta.{name}"])


def test_nothing_is_trained_at_rate_zero(model):
    edit = FewShotErasing(**QUICK | {"lr": 0.0}).erase(model, STAR, data=DATA)
    assert edit.manifest.report["drift"] == {"concept": [0.0] * 3, "templates": [0.0] * 3}
    assert len(_targets(edit)) == 1  # an edit names at least one tensor, here without a change
