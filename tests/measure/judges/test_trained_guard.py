"""A guard trained on labelled pictures: tiny sizes, behind a random CLIP vision tower."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.concept import Concept
from expunge.core.safety_taxonomy import Seen, Taxonomy
from expunge.core.vision import PatchEncoder
from expunge.errors import InputError, ModelError, ResumeMismatch, SettingError
from expunge.measure.benchmarks.t2isafety_prompts import T2ISafetyPrompts
from expunge.measure.judges import open_judge
from expunge.measure.judges.trained_guard import GuardRecipe, TrainedGuard, questions
from expunge.measure.t2isafety import PUBLISHED, T2ISafety
from expunge.method import Prompt
from expunge.testing.resuming import Killed, writing
from expunge.world.safety_glyphs import GlyphGenerator, draw, prompts

SMALL = {
    "width": 16, "layers": 1, "heads": 2, "visual_tokens": 3, "sampler_layers": 1, "steps": 4, "batch": 8,
    "lr": 0.01, "warmup": 0,
}  # fmt: skip
PERSON = {"gender": "female", "age": "middle-aged", "race": "asian"}


def tower(seed: int = 0):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16,
        patch_size=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPVisionModel(config).eval()


@pytest.fixture(scope="module")
def eyes():
    return PatchEncoder(tower(), "tiny")


def labelled(*names):
    said = {"violence cross": "a red plate", "house": "a house", "hate bar": "a black plate"}
    return [
        SimpleNamespace(
            picture=draw(PERSON if name == "person" else name, 5),
            truth=Seen(person=PERSON) if name == "person" else
            Seen() if name == "house" else Seen(unsafe=(name.split()[0],)),
            caption=said.get(name, ""),
        )
        for name in names
    ]  # fmt: skip


PICTURES = labelled("violence cross", "house", "hate bar", "person")


@pytest.fixture(scope="module")
def guard(eyes):
    return GuardRecipe(**{**SMALL, "steps": 90}).fit(eyes, PICTURES, seed=1)


def scripted(guard, monkeypatch, *answers):
    """The network says this, word by word."""
    rows = [guard.codes.encode(text) for text in answers]
    monkeypatch.setattr(guard.network, "answer", lambda patches, question: rows)


def test_patches_do_not_depend_on_batches_and_follow_layer_and_size(eyes):
    shown = [one.picture for one in PICTURES]
    seen = eyes(shown)
    assert seen.shape == (4, eyes.patches, 16) == (4, 4, 16)
    torch.testing.assert_close(PatchEncoder(eyes.tower, "tiny", batch=3)(shown), seen)
    large = PatchEncoder(eyes.tower, "tiny", size=32)
    assert large(shown).shape == (4, 16, 16) == (4, large.patches, 16)
    assert not torch.equal(PatchEncoder(eyes.tower, "tiny", layer=-1)(shown), seen)
    mixed = eyes([shown[0], shown[1][:40]])  # pictures of several shapes
    torch.testing.assert_close(mixed[:1], seen[:1])
    with pytest.raises(SettingError, match="layer 3 of tiny is not there; allowed: -3 to 2"):
        PatchEncoder(eyes.tower, "tiny", layer=3)


def test_a_tiny_training_on_glyphs_lowers_the_loss_and_learns_them(guard):
    losses = guard.training["losses"]["answers"]
    assert losses[-1] < 0.3 * losses[0]
    shown = np.stack([one.picture for one in PICTURES])
    assert guard.look(shown[:3], "safety") == [one.truth for one in PICTURES[:3]]
    assert guard.answers(shown[3:], "people") == ["Gender: female\nAge: middle-aged\nRace: asian"]
    found = guard.judge(shown, Concept("violence", kind="unsafe"), [Prompt("", 0)] * 4)
    assert found.hit.tolist()[:3] == [True, False, False]
    any_of = guard.judge(shown[:3], Concept("toxicity"), [Prompt("", 0)] * 3)
    assert any_of.hit.tolist() == [True, False, True] and any_of.score.tolist() == [1, 0, 1]


def test_an_answer_that_cannot_be_read_is_unreadable_and_never_safe(guard, monkeypatch):
    shown = np.stack([PICTURES[0].picture] * 4)
    scripted(guard, monkeypatch, "safe", "Hate", "unsafe", "unsafe\nViolence, Public figures")
    seen = guard.look(shown, "safety")
    assert seen[:3] == [Seen(), Seen("unreadable"), Seen("unreadable")]
    assert seen[3].unsafe == ("violence", "public-figures")
    found = guard.judge(shown, Concept("unsafe"), [Prompt("", 0)] * 4)
    assert found.recognisable.tolist() == [True, False, False, True]
    assert found.hit.tolist() == [False, False, False, True]
    scripted(guard, monkeypatch, "Gender: male\nAge: elderly", "No person")
    assert guard.look(shown[:2], "people") == [Seen("unreadable"), Seen()]
    with pytest.raises(InputError, match="'faces' is unknown; allowed: safety, people"):
        guard.look(shown, "faces")


def test_it_is_the_guard_of_the_benchmark(guard):
    report = T2ISafety().measure(GlyphGenerator(), guard, prompts(1), cache=None)
    assert guard.protocol in report.protocol and set(report.safe) == set(PUBLISHED.of("toxicity")) | set(
        PUBLISHED.of("privacy")
    )  # fmt: skip
    quality = T2ISafety.judge_quality(
        guard, [p.picture for p in PICTURES], [p.truth for p in PICTURES]
    )
    assert quality["unsafe"].f1 == 1 and quality["people"]["race"]["accuracy"] == 1


def test_nobody_is_learned_where_it_is_shown(eyes):
    recipe = GuardRecipe(**{**SMALL, "steps": 60})
    made = recipe.fit(eyes, PICTURES[3:], nobody=PICTURES[1:2])
    shown = np.stack([PICTURES[1].picture, PICTURES[3].picture])
    assert made.look(shown, "people") == [Seen(), Seen(person=PERSON)]


# -- files -----------------------------------------------------------------------------------------


def test_a_saved_guard_says_the_same(guard, tmp_path):
    guard.save(tmp_path / "guard")
    again = open_judge(f"trained-guard:folder={tmp_path / 'guard'},batch=2")
    assert again.protocol == guard.protocol and again.taxonomy == guard.taxonomy
    assert all(
        torch.equal(t, again.network.state_dict()[n]) for n, t in guard.network.state_dict().items()
    )
    shown = np.stack([one.picture for one in PICTURES])
    for question in ("safety", "people"):
        assert again.answers(shown, question) == guard.answers(shown, question)
    kinds = {path.suffix for path in (tmp_path / "guard").rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors"}
    assert again.training["settings"]["width"] == 16 and str(tmp_path) not in guard.protocol


def test_eyes_may_lie_elsewhere_and_must_be_the_same(guard, eyes, tmp_path):
    guard.save(tmp_path, encoder=False)
    assert not (tmp_path / "encoder").exists()
    assert TrainedGuard.load(tmp_path, encoder=eyes).protocol == guard.protocol
    eyes.tower.save_pretrained(tmp_path / "clip")
    assert TrainedGuard.load(tmp_path, encoder=str(tmp_path / "clip")).protocol == guard.protocol
    with pytest.raises(ModelError, match="has other weights"):
        TrainedGuard.load(tmp_path, encoder=PatchEncoder(tower(9), "other"))
    with pytest.raises(ModelError, match="with layer -2 of its eyes, not -1"):
        TrainedGuard.load(tmp_path, encoder=PatchEncoder(eyes.tower, "tiny", layer=-1))
    half = PatchEncoder(tower().half(), "tiny")  # the same weights, but for their rounding
    assert PatchEncoder(tower().half().float(), "tiny").digest == half.digest != eyes.digest


def test_damaged_folders_are_refused_in_words(guard, tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        TrainedGuard.load(tmp_path / "nowhere")
    guard.save(tmp_path, encoder=False)
    file = tmp_path / "guard.json"
    plain = json.loads(file.read_text())
    for change, said in (
        ({"format": 9}, "has not format 1"),
        ({"words": ["a", "a"]}, "stands twice"),
        ({"weights": "0"}, "is not the one it describes"),
        ({"shape": {**plain["shape"], "width": 8}}, "cannot be read"),
        ({"taxonomy": {}}, "no taxonomy"),
    ):
        file.write_text(json.dumps({**plain, **change}))
        with pytest.raises(ModelError, match=said):
            TrainedGuard.load(tmp_path)
    file.write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        TrainedGuard.load(tmp_path)


def test_a_killed_training_resumes_to_the_same_weights(eyes, tmp_path):
    recipe = GuardRecipe(**SMALL)
    wanted = recipe.fit(eyes, PICTURES, seed=2)
    with writing(kill_at=2), pytest.raises(Killed):
        recipe.fit(eyes, PICTURES, seed=2, run=tmp_path)
    with writing() as written:
        resumed = recipe.fit(eyes, PICTURES, seed=2, run=tmp_path)
    assert written[0] == 3 and resumed.training["resumed_at"] == 2
    assert resumed.protocol == wanted.protocol  # holds the digest of the weights
    with pytest.raises(ResumeMismatch):
        recipe.fit(eyes, PICTURES[:2], seed=2, run=tmp_path)


# -- settings and data -----------------------------------------------------------------------------


def test_additions_go_on_and_off_from_one_start(eyes):
    for cross in (True, False):
        for contrastive in (True, False):
            recipe = GuardRecipe(**SMALL, cross_attention=cross, contrastive=contrastive)
            names = recipe.fit(eyes, PICTURES).network.state_dict()
            assert any(".cross." in name for name in names) is cross
            assert ("caption_side.weight" in names) is contrastive


def test_the_encoder_may_run_at_each_step(eyes):
    kept, lazy = (
        GuardRecipe(**SMALL, held=gib).fit(eyes, PICTURES).network.state_dict()
        for gib in (2.0, 0.0)
    )
    for name, tensor in kept.items():
        torch.testing.assert_close(lazy[name], tensor, rtol=1e-3, atol=1e-4)


def test_labelled_pictures_of_the_hubs_layout_train_it(eyes, tmp_path):
    rows = []
    for number, (name, label) in enumerate((("hate bar", "unsafe\nHate"), ("house", "safe"))):
        Image.fromarray(draw(name)).save(tmp_path / f"m_{number}_0.png")
        turns = [{"role": "user", "value": "?"}, {"role": "assistant", "value": label}]
        rows.append(
            {"id": number, "image": [f"m_{number}_0.png"], "caption": f"a {name}", "conversations": turns}
        )  # fmt: skip
    (tmp_path / "set.json").write_text(json.dumps(rows))
    found = T2ISafetyPrompts().labelled(tmp_path / "set.json", images=tmp_path)
    assert [one.caption for one in found] == ["a hate bar", "a house"]
    made = GuardRecipe(**SMALL).fit(eyes, found)
    assert made.training["pictures"] == 2 and "bar" in made.codes.words


def test_questions_name_what_the_taxonomy_has_and_labels_must_be_in_it(eyes):
    assert list(questions(Taxonomy("none", (), ()))) == []
    assert "Personal identification documents" in questions(PUBLISHED)["safety"]
    only = Taxonomy("people", tasks=())
    with pytest.raises(InputError, match="has no safety to ask about"):
        GuardRecipe(**SMALL).fit(eyes, PICTURES[:1], taxonomy=only)
    blank = SimpleNamespace(picture=PICTURES[0].picture, truth=Seen("blank"), caption="")
    with pytest.raises(InputError, match="that is blank teaches"):
        GuardRecipe(**SMALL).fit(eyes, [blank])
    with pytest.raises(SettingError, match="no labelled picture"):
        GuardRecipe(**SMALL).fit(eyes, [])
