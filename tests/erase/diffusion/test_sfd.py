"""SFD: what is asked of whom, without a picture; one-step edits on and off; stages, labels, layouts, errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import expunge
from expunge import Concept, Edit
from expunge.core.forget_prompts import SUBJECTS, TEMPLATES, forget_prompts
from expunge.core.layer_choice import trainable
from expunge.erase.diffusion.esd import ESD
from expunge.erase.diffusion.sfd import SFD, _Rows
from expunge.errors import (
    ConceptError,
    InputError,
    MissingCapability,
    MissingPart,
    PromptError,
    SettingError,
    UnsupportedModel,
    WrongMethod,
    WrongState,
)
from expunge.models.base import Companions
from expunge.models.class_conditional import class_conditional
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout
from expunge.testing.resuming import Killed, writing

# diffusers hands its tables to numpy the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STAR = Concept("star", phrases=("heart",), anchor="circle")
NAMES = ("circle", "square", "star")
DATA = {"captions": ["a green square", "a plain photo"]}
QUICK = {"steps": 1, "batch": 2}


def tiny_classes(names=NAMES, embeddings=4, dropout=0.1):
    """A random UNet of 8 x 8 pixels with class embeddings."""
    from diffusers import DDIMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            num_class_embeds=embeddings, dropout=dropout,
        )  # fmt: skip
    return class_conditional(unet, DDIMScheduler(clip_sample=False), names, "tiny-classes", steps=4)


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def classes():
    return tiny_classes()


def asks(model, concept=STAR, data=DATA, keep=(), override=None, unsafe=False, phrases=True):
    return forget_prompts(
        model,
        [concept] if isinstance(concept, Concept) else concept,
        data,
        keep,
        override=override,
        unsafe=unsafe,
        phrases=phrases,
        count=4,
        seed=0,
    )


def test_a_world_is_asked_for_captions_by_the_names_of_its_concepts_alone():
    own, asked = tiny_diffusion(), []

    def captions(n, seed=0, without=()):
        asked.append((n, seed, tuple(without)))
        return ["a red square", "a heart", "a plain star"]

    own.companions = Companions(
        "toy", concept=lambda name: Concept(name) if name == "star" else None, captions=captions
    )
    made = asks(own, [STAR, Concept("moon", anchor="circle")], data=None)
    # It knows no phrase of a concept, and no concept of others; what names one is left out all the same.
    assert asked == [(4, 0, ("star",))]
    assert made.remain == ("a red square",)


def values(model):
    return {name: p.detach().clone() for name, p in model.tensors().items()}


# -- what is asked ------------------------------------------------------------------------------------


def test_a_name_is_exchanged_and_the_rest_says_nothing_of_it(model):
    found = asks(
        model, data={"forget": ["a red Star", "a heart, striped"], "captions": ["a star", "a tree"]}
    )
    assert found.forget == ("a red Star", "a heart, striped")
    assert found.overrides == (("a red circle",), ("a circle, striped",))
    assert found.remain == ("a tree",) and found.negative == "" and found.digest
    made = asks(model, keep=("square",), data=None)
    assert made.remain == tuple(template.format("square") for template in TEMPLATES)
    assert len(made.forget) == 2 * len(TEMPLATES) and made.digest is None
    both = asks(model, keep=("square",), data={"captions": ["a tree"]})
    assert both.remain == ("a tree", *made.remain)
    given = {"forget": ["x", "y"], "override": ["p", "q"], "captions": ["z"]}
    assert asks(model, data=given).overrides == (("p",), ("q",))


def test_unsafe_words_stand_beside_subjects(model):
    concept = Concept("nude", kind="unsafe", phrases=("naked",))
    found = asks(model, concept, unsafe=True)
    assert len(found.forget) == len(SUBJECTS) * 2 * 2 == len(found.overrides)
    pairs = dict(zip(found.forget, found.overrides, strict=True))
    assert pairs["naked a man"] == ("a man",) and pairs["a woman, nude"] == ("a woman",)
    assert found.negative == "nude, naked"


def test_a_class_becomes_its_anchor_or_any_other(classes):
    found = asks(classes, Concept("star", kind="class"), None)
    assert (found.forget, found.overrides) == (("star",), (("circle", "square"),))
    assert found.remain == ("circle", "square")
    assert asks(classes, STAR, None).overrides == (("circle",),)
    assert asks(classes, STAR, None, override="star").overrides == (("star",),)
    _, drawn, _ = asks(classes, Concept("star"), None).drawn(64, torch.Generator().manual_seed(0))
    assert set(drawn) == {"circle", "square"}


def test_prompts_of_the_user_are_for_all_concepts_together(model):
    several = [STAR, Concept("cross", anchor="square")]
    given = {"forget": ["a star", "a red cross", "a cross and a star"], "captions": ["a tree"]}
    found = asks(model, several, given)
    assert found.forget == tuple(given["forget"])
    assert found.overrides == (("a circle",), ("a red square",), ("a square and a circle",))
    own = asks(model, several, {**given, "override": ["p", "q", "r"]})
    assert (own.forget, own.overrides) == (found.forget, (("p",), ("q",), ("r",)))
    with pytest.raises(InputError, match="does not name 'star' or 'cross'"):
        asks(model, several, {**given, "forget": ["a star", "a tree"]})
    with pytest.raises(InputError, match="none of the 1 prompts to forget names 'cross'"):
        asks(model, several, {**given, "forget": ["a star"]})


def test_no_forgotten_class_takes_the_place_of_another_and_classes_are_whole_names():
    names = ("shark", "tiger shark", "ray", "eel")
    several = tiny_classes(names, 5)
    found = asks(several, [Concept("shark"), Concept("ray")], None)
    assert found.forget == ("shark", "ray") and set(found.overrides) == {("tiger shark", "eel")}
    assert found.remain == ("tiger shark", "eel")
    with pytest.raises(SettingError, match="all its classes are to be forgotten"):
        asks(several, [Concept(name) for name in names], None)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ({"pictures": []}, InputError, "unknown key 'pictures'"),
        ({"captions": "a text"}, InputError, "list of texts"),
        ({"captions": [np.zeros(3)]}, InputError, "no pictures are read"),
        ([1], InputError, "mapping"),
        ({"forget": ["a tree"], "captions": ["x"]}, InputError, "does not name 'star'"),
        (
            {"forget": ["a star"], "override": [], "captions": ["x"]},
            InputError,
            "0 overrides for 1",
        ),
        ({"captions": ["a star"]}, InputError, "what is to stay"),
        ({"captions": 3}, InputError, "list of texts"),
        ({"forget": [], "captions": ["x"]}, InputError, "'forget' is an empty list"),
        ({"subjects": ["a man"], "captions": ["x"]}, InputError, "'subjects' would be ignored"),
    ],
)
def test_what_is_no_prompt_is_refused(model, data, error, match):
    with pytest.raises(error, match=match):
        asks(model, data=data)


def test_what_would_be_ignored_is_refused(model, classes):
    nude, rest = Concept("nude", kind="unsafe"), {"captions": ["a tree"]}
    assert asks(model, nude, {**rest, "subjects": ["a king"]}, unsafe=True).forget == (
        "nude a king",
        "a king, nude",
    )
    with pytest.raises(InputError, match="'subjects' is an empty list"):
        asks(model, nude, {**rest, "subjects": []}, unsafe=True)
    with pytest.raises(InputError, match="'forget' would be ignored, because unsafe words"):
        asks(model, nude, {**rest, "forget": ["a nude"]}, unsafe=True)
    with pytest.raises(SettingError, match="override='a man' would be ignored"):
        asks(model, nude, rest, unsafe=True, override="a man")
    with pytest.raises(InputError, match="'forget' would be ignored, because tiny-classes draws"):
        asks(classes, STAR, {"forget": ["star"]})
    with pytest.raises(InputError, match="asked only with pseudo_label"):
        label_method().erase(classes, STAR, data={"classifier": lambda pictures: pictures})
    with pytest.raises(SettingError, match="because data has an 'override'"):
        asks(model, data={"forget": ["a star"], "override": ["x"], **rest}, override="circle")
    with pytest.raises(SettingError, match="pairing='unsafe' would be ignored"):
        asks(classes, STAR, None, unsafe=True)
    with pytest.raises(InputError, match="'dog' to keep is none"):
        asks(classes, STAR, None, keep=["dog"])
    with pytest.raises(SettingError, match="'heart', which is to be forgotten too"):
        asks(model, [Concept("star", anchor="Heart"), Concept("heart", anchor="circle")], rest)
    unguided = {"guidance": 1.0, "fake_guidance": 1.0}
    with pytest.raises(SettingError, match="because nothing is guided"):
        SFD(**QUICK, **unguided, negative="blue").erase(model, STAR, data=DATA)
    with pytest.raises(SettingError, match="because a classifier says"):
        SFD(**QUICK, pseudo_label="best", override="circle").erase(classes, STAR)
    with pytest.raises(SettingError, match="ema=1 keeps the start"):
        SFD(**{**QUICK, "ema": 1.0}).erase(model, STAR, data=DATA)
    with pytest.raises(ConceptError, match="to be kept, but also erased"):
        SFD(**QUICK).erase(model, STAR, keep=["heart"], data=DATA)


def rows(model, turn, plain=False, concept=STAR, data=DATA, **settings):
    method = SFD(**{"batch": 3, "drop": 0.0, **settings})
    found = asks(model, concept, data, override=method.override, unsafe=method.pairing == "unsafe")
    return _Rows(method, model, found, plain=plain).draw(torch.Generator().manual_seed(0), turn)


def test_only_the_teacher_is_asked_for_the_override(model):
    made = rows(model, "generator", forget_weight=0.1, remain_weight=2.0)
    own, other = made.generator.texts, made.teacher.texts
    assert own[:3] == other[:3] and set(own[:3]) <= set(DATA["captions"])
    assert all("star" in t or "heart" in t for t in own[3:])
    assert all("circle" in t for t in other[3:])
    assert made.fake.texts == own
    assert made.weights.tolist() == pytest.approx([2 / 3] * 3 + [0.1 / 3] * 3)
    swapped = rows(model, "generator", fake_override=True)
    assert swapped.fake.texts == swapped.teacher.texts


def test_a_term_of_weight_0_is_left_out_and_plain_rows_forget_nothing(model):
    assert rows(model, "generator", forget_weight=0.0).generator.rows == 3
    assert rows(model, "fake", forget_weight=0.0).generator.rows == 6
    with pytest.raises(SettingError, match="would not learn"):
        rows(model, "fake", fake_forget_weight=0.0, fake_remain_weight=0.0)
    plain = rows(model, "generator", plain=True)
    assert plain.generator.texts == plain.teacher.texts and plain.weights.sum() == pytest.approx(1)


def test_prompts_are_dropped_only_while_the_fake_network_trains_under_guidance(model):
    assert set(rows(model, "fake", drop=1.0).generator.texts) == {""}
    # Neither branch is asked for anything then, whatever the negative text.
    bare = rows(model, "fake", drop=1.0, negative="blue", fake_negative=True)
    assert set(bare.empty.texts) == set(bare.negative.texts) == {""}
    assert "" not in rows(model, "generator", drop=1.0).generator.texts
    assert "" not in rows(model, "fake", drop=1.0, guidance=1.0, fake_guidance=1.0).generator.texts


def test_unsafe_words_are_the_teachers_negative(model):
    nude = Concept("red", kind="unsafe")
    made = rows(model, "generator", concept=nude, pairing="unsafe")
    assert made.negative.texts == ("",) * 3 + ("red",) * 3 and set(made.empty.texts) == {""}
    both = rows(model, "fake", concept=nude, pairing="unsafe", fake_negative=True)
    assert both.empty.texts == both.negative.texts
    assert rows(model, "fake", negative="blue").negative.texts[3:] == ("blue",) * 3


def test_presets_are_the_papers():
    made = SFD()
    assert (made.alpha, made.t_init, made.t_min, made.t_max) == (1.0, 625, 20, 980)
    assert (made.guidance, made.fake_guidance, made.lr, made.fake_lr, made.batch) == (
        4.5,
        4.5,
        1e-6,
        3e-6,
        8,
    )
    cifar = SFD.configured(SFD.preset_for("class"))
    assert (cifar.alpha, cifar.t_init, cifar.t_min, cifar.t_max) == (1.2, 440, 38, 712)
    assert (cifar.forget_weight, cifar.fake_forget_weight, cifar.ema) == (0.01, 0.01, 0.9999)
    assert (cifar.lr, cifar.fake_lr, cifar.batch, cifar.guidance) == (1e-5, 1e-5, 128, 1.0)
    unsafe = SFD.configured("paper:unsafe")  # the words lead teacher and fake network away
    assert unsafe.pairing == "unsafe" and unsafe.fake_negative


# -- edits --------------------------------------------------------------------------------------------


def test_no_picture_is_read_and_the_edit_draws_in_one_step(monkeypatch, tmp_path):
    model = tiny_diffusion()
    before, plain = values(model), model.generate("a red star", seeds=5)

    def refused(*args, **kwargs):
        raise AssertionError("a picture was read")

    with monkeypatch.context() as patch:
        patch.setattr(model, "latents_of", refused)
        patch.setattr(model, "pictures_of", refused)
        patch.setattr(model.vae, "encode", refused)
        patch.setattr(model.vae, "decode", refused)
        edit = SFD(lr=1e-3, fake_lr=1e-3, **QUICK).erase(model, STAR, data=DATA, seed=1)
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())
    assert edit.manifest.acts and {t.name.split(".")[0] for t in edit.manifest.targets} == {"unet"}
    edit.save(tmp_path / "sfd.safetensors")
    with Edit.load(tmp_path / "sfd.safetensors").on(model):
        counted = model.cost.snapshot()
        made = model.generate("a red star", seeds=5)
        assert model.cost.rows("denoiser", counted) == 1
        assert np.array_equal(model.generate("a red star", seeds=5, steps=50, guidance=9.0), made)
        a = model.scheduler.alphas_cumprod[625]
        x_T = (1 - a).sqrt() * model.initial_noise([5])
        rows = model.encode("a red star").embeddings
        with torch.no_grad():
            noise = model.denoiser(x_T, 625, encoder_hidden_states=rows).sample
        wanted = model.pictures_of(x_T / a.sqrt() - (1 / a - 1).sqrt() * noise)
        assert np.abs(wanted.astype(int) - made.astype(int)).max() <= 1
        with model.lifted():
            assert np.array_equal(model.generate("a red star", seeds=5), plain)
        with pytest.raises(WrongState, match="generator and no teacher"):
            SFD(**QUICK).erase(model, STAR, data=DATA)
        # Points of other methods' walks stand where the generator begins.
        ESD(steps=1, sampling_steps=2).erase(model, STAR)
    assert np.array_equal(model.generate("a red star", seeds=5), plain)
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())


def test_from_an_earlier_generator_and_in_two_stages(model):
    settings = {"lr": 1e-3, "fake_lr": 1e-3, **QUICK}
    plain = SFD(override="star", **settings).erase(model, STAR, data=DATA)
    still = SFD(lr=0.0, fake_lr=0.0, **QUICK)
    on = still.erase(model, STAR, data={**DATA, "generator": plain})
    name = plain.manifest.targets[0].name
    torch.testing.assert_close(
        on.change(name, model.tensor(name)),
        plain.change(name, model.tensor(name)),
        atol=1e-7,
        rtol=1e-3,
    )
    assert on.manifest.report["started_from"] == plain.digest
    two = SFD(first_steps=2, **settings).erase(model, STAR, data=DATA)
    assert {len(two.manifest.report[s]["losses"]["fake"]) for s in ("first", "forget")} == {1, 2}
    for given, error, match in (
        ("x", WrongMethod, "must be an edit of sfd"),
        (ESD(steps=1, sampling_steps=2).erase(model, STAR), WrongMethod, "must be an edit of sfd"),
    ):
        with pytest.raises(error, match=match):
            still.erase(model, STAR, data={**DATA, "generator": given})
    with pytest.raises(SettingError, match="t_init=625, this run at 440"):
        SFD(t_init=440, **QUICK).erase(model, STAR, data={**DATA, "generator": plain})
    with pytest.raises(SettingError, match="does not train"):
        SFD(layers="attention", **QUICK).erase(model, STAR, data={**DATA, "generator": plain})


def test_both_stages_resume_with_their_average(tmp_path):
    settings = {"lr": 1e-3, "fake_lr": 1e-3, "first_steps": 2, "ema": 0.5, "steps": 2, "batch": 2}

    def erase(run, seed=0):
        return SFD(**settings).erase(tiny_diffusion(), STAR, data=DATA, run=run, seed=seed)

    whole = erase(tmp_path / "whole")
    for kill_at in (3, 8):  # in the first stage and in the second
        with writing(kill_at=kill_at), pytest.raises(Killed):
            erase(tmp_path / f"killed-{kill_at}")
        again = erase(tmp_path / f"killed-{kill_at}")
        assert again.digest == whole.digest
        assert again.manifest.report["first"]["resumed_at"] == (1 if kill_at == 3 else 2)
    assert erase(None, seed=1).digest != whole.digest


@pytest.mark.parametrize("layout", ["sdxl", "pixart", "sana", "sd3", "flux"])
def test_layouts(layout):
    model = tiny_layout(layout)
    guidance = 1.0 if layout == "flux" else 2.0
    method = SFD(lr=1e-3, fake_lr=1e-3, guidance=guidance, fake_guidance=guidance, **QUICK)
    if layout == "flux":
        with pytest.raises(MissingCapability, match="has none here"):
            SFD(**QUICK).erase(model, STAR, data=DATA)
    plain = model.generate("a red star", seeds=5)
    with method.erase(model, STAR, data=DATA).on(model):
        before = model.cost.snapshot()
        assert not np.array_equal(model.generate("a red star", seeds=5), plain)
        assert model.cost.rows("denoiser", before) == 1
    assert np.array_equal(model.generate("a red star", seeds=5), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = tiny_diffusion(dtype=dtype)
    edit = SFD(lr=1e-3, fake_lr=1e-3, guidance=1.0, fake_guidance=1.0, **QUICK).erase(
        model, STAR, data=DATA
    )
    with edit.on(model):
        assert torch.isfinite(model.sample(model.encode("a red star"), [1])).all()


# -- classes ------------------------------------------------------------------------------------------


def label_method(**settings):
    return SFD.configured("paper:class", **{"lr": 1e-3, "fake_lr": 1e-3, **QUICK, **settings})


def test_a_model_of_classes_forgets_one(classes):
    state = torch.get_rng_state()
    plain = classes.generate(["star", "circle"], seeds=[1, 2])
    edit = label_method().erase(classes, Concept("star", kind="class"), seed=2)
    assert torch.equal(torch.get_rng_state(), state)  # its dropout is drawn elsewhere
    assert (
        label_method().erase(classes, Concept("star", kind="class"), seed=2).digest == edit.digest
    )
    off = label_method(dropout=False).erase(classes, Concept("star", kind="class"), seed=2)
    assert any(not torch.equal(off.tensors[n], t) for n, t in edit.tensors.items())
    with edit.on(classes):
        before = classes.cost.snapshot()
        made = classes.generate(["star", "circle"], seeds=[1, 2])
        assert classes.cost.rows("denoiser", before) == 2 and not np.array_equal(made, plain)
    assert np.array_equal(classes.generate(["star", "circle"], seeds=[1, 2]), plain)
    guided = label_method(guidance=2.0, fake_guidance=2.0).erase(classes, STAR)
    assert guided.manifest.cost["denoiser.backward"] > edit.manifest.cost["denoiser.backward"]


@pytest.mark.parametrize("how", ["best", "drawn"])
def test_pseudo_labels_are_what_a_classifier_sees_beside_the_class(classes, how):
    seen = []

    def classifier(pictures):
        assert 0 <= float(pictures.min()) and float(pictures.max()) <= 1
        seen.append(len(pictures))
        return torch.tensor([[-50.0, 1.0, 90.0]]).repeat(len(pictures), 1)

    method = label_method(pseudo_label=how)
    relabel = method._relabel(classes, [Concept("star")], classifier)
    made = rows(
        classes, "generator", concept=Concept("star"), data=None, guidance=1.0, fake_guidance=1.0
    )
    labels = relabel(torch.zeros(6, 3, 8, 8), made, torch.Generator()).extra["label"].tolist()
    assert labels[:3] == made.generator.extra["label"][:3].tolist() and labels[3:] == [1, 1, 1]
    method.erase(classes, Concept("star"), data={"classifier": classifier})
    assert seen == [6, 4]
    with pytest.raises(InputError, match="classifier"):
        method.erase(classes, Concept("star"))
    with pytest.raises(InputError, match=r"\(4, 2\) for 4 pictures; allowed .* \(4, 3\)"):
        method.erase(classes, "star", data={"classifier": lambda p: torch.zeros(len(p), 2)})
    with pytest.raises(InputError, match="model of classes"):
        SFD(pseudo_label=how, **QUICK).erase(tiny_diffusion(), STAR, data=DATA)


def test_a_class_that_is_none_is_refused(classes):
    with pytest.raises(SettingError, match="none of them"):
        label_method().erase(classes, "stra")
    with pytest.raises(SettingError, match="none of them"):
        label_method(override="tree").erase(classes, "star")
    with pytest.raises(PromptError, match="did you mean 'star'"):
        classes.generate("stra")
    with pytest.raises(MissingPart, match="reads no text"):
        classes.text_projections()
    with pytest.raises(MissingCapability, match="one CLIP"):
        classes.token_ids(["star"])


def test_the_model_of_classes_is_the_librarys(classes, tmp_path):
    latents, times = classes.initial_noise([1, 2]), torch.tensor([300, 700])
    made = classes.predict(latents, times, classes.encode(["circle", "Star "])).value
    with torch.no_grad():
        wanted = classes.denoiser(latents, times, class_labels=torch.tensor([0, 2])).sample
    assert torch.equal(made, wanted)
    assert int(classes.unconditional().extra["label"]) == 3 and classes.two_branches
    one, two = (classes.generate("star", seeds=1, guidance=g) for g in (1.0, 3.0))
    assert not np.array_equal(one, two)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert np.array_equal(classes.pictures_of(classes.latents_of(pictures)), pictures)
    classes.pipeline.save_pretrained(tmp_path)
    again = expunge.load(tmp_path)
    assert again.layout.classes == NAMES
    assert np.array_equal(
        again.generate("star", seeds=1, steps=4), classes.generate("star", seeds=1)
    )
    assert [n for n, _ in trainable(classes, "full")] == list(classes.tensors())


def test_names_must_fit_the_embeddings():
    alone = tiny_classes(NAMES, 3)
    assert not alone.two_branches and alone.generate("star", seeds=0).shape == (1, 8, 8, 3)
    with pytest.raises(MissingCapability, match="asked for none"):
        alone.encode("")
    with pytest.raises(UnsupportedModel, match="2 names for 4"):
        tiny_classes(NAMES[:2], 4)
    with pytest.raises(UnsupportedModel, match="different names"):
        tiny_classes(("a", "A", "b"), 4)
