"""Image to image and inpainting on a tiny random pipeline: targets, strengths, what stays, accounts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from expunge import Concept
from expunge.attack.diffusion.img2img import ImageToImage
from expunge.attack.diffusion.inpainting import Inpainting
from expunge.core.redrawing import Targets, walked_rows
from expunge.erase.diffusion.uce import UCE
from expunge.errors import PromptError, SettingError
from expunge.method import BUDGETS, Budget, Judge, Prompt, Verdicts
from expunge.models.base import Companions, Pictures
from expunge.testing import tiny_diffusion

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", anchor="circle")
PROMPTS = [Prompt("a red star", seed=5), Prompt("star", seed=6), Prompt("a blue square", seed=7)]
SMALL = {"strengths": (0.5, 1.0), "steps": 4, "guidance": 3.0}


class Seeing(Judge):
    """Keeps what it was shown; hits nothing."""

    id, protocol, threshold = "seeing", "seeing/1", 0.5

    def __init__(self):
        self.seen = []

    def judge(self, outputs, concept, prompts):
        self.seen.append(np.asarray(outputs))
        n = len(outputs)
        return Verdicts(np.zeros(n, bool), np.zeros(n), np.ones(n, bool))


def with_world(model):
    """A world of 16 x 16 pictures with a star in the left half, and one neighbour."""

    def pictures(name, n, seed=0, split="test"):
        assert split == "development"
        shade = 200 if name == "star" else 40
        made = np.full((n, 16, 16, 3), shade, np.uint8) + np.arange(n, dtype=np.uint8)[:, None, None, None]  # fmt: skip
        masks = np.zeros((n, 16, 16), bool)
        masks[:, 4:12, 2:10] = True
        masks[:, 4:6, 2:6] = False
        return Pictures(made, masks, (f"a {name}",) * n)

    model.companions = Companions(
        "tests", concept=lambda n: Concept(n) if n in ("star", "moon") else None,
        neighbours=lambda c: ("moon",), pictures=pictures,
    )  # fmt: skip
    return model


@pytest.mark.parametrize("kind", [ImageToImage, Inpainting])
def test_targets_are_the_unerased_models_pictures_of_the_same_prompts(kind):
    model, judge = tiny_diffusion(), Seeing()
    plain = model.generate(PROMPTS, steps=4, guidance=3.0)
    with UCE.configured("2023", ridge=0.02).erase(model, STAR).on(model):
        erased = model.generate(PROMPTS, steps=4, guidance=3.0)
        made = kind(**SMALL).attack(model, STAR, judge, Budget("b", 99), prompts=PROMPTS)
    assert np.array_equal(judge.seen[0], erased) and np.array_equal(judge.seen[1], plain)
    assert len(judge.seen) == 4 and np.array_equal(made.outputs, judge.seen[3])
    assert list(made.items[0].details["curve"]) == ["0.5", "1"]
    assert made.items[0].details["target"] == "original"


@pytest.mark.parametrize("kind", [ImageToImage, Inpainting])
def test_names_and_bare_texts_will_do_and_what_is_no_text_is_said(kind):
    model = tiny_diffusion()
    made = kind(**SMALL).attack(model, "star", Seeing(), "quick", prompts=["star", ""])
    assert [item.prompt for item in made.items] == [Prompt("star", 0), Prompt("", 1)]
    with pytest.raises(PromptError, match="prompt 1 is None"):
        kind(**SMALL).attack(model, STAR, Seeing(), Budget("b"), prompts=[None])


def test_rows_of_an_item_and_strengths_that_are_left_out():
    model = tiny_diffusion()
    other = tiny_diffusion(seed=1)  # another model draws the targets, so no picture is reused
    method = ImageToImage(**SMALL)
    assert [walked_rows(model, s, 4, 8) for s in (0.01, 0.5, 0.99, 1.0)] == [2, 4, 6, 8]
    made = method.attack(model, STAR, Seeing(), Budget("b", 28), prompts=PROMPTS, reference=other)
    assert [item.details["rows"] for item in made.items] == [8 + 8 + 4 + 8] * 3
    assert made.cost["denoiser.forward"] == 3 * 28
    cut = method.attack(model, STAR, Seeing(), Budget("b", 27), prompts=PROMPTS, reference=other)
    assert list(cut.items[0].details["curve"]) == ["0.5"]
    with pytest.raises(SettingError, match=r"0\.5 strengths, costs 20"):
        method.attack(model, STAR, Seeing(), Budget("b", 19), prompts=PROMPTS, reference=other)


@pytest.mark.parametrize("kind", [ImageToImage, Inpainting])
@pytest.mark.parametrize("name", ["world", "quick"])
def test_presets_fit_their_budgets(kind, name):
    method = kind.under(BUDGETS[name])
    whole = 2 * method.steps
    walked = sum(2 * int(method.steps * s) for s in method.strengths)
    assert 2 * whole + walked <= BUDGETS[name].denoiser_rows


def test_the_control_begins_with_something_else():
    model = tiny_diffusion()
    judge, method = Seeing(), ImageToImage(**SMALL, shows="other")
    made = method.attack(model, STAR, judge, Budget("b"), prompts=PROMPTS)
    asked = ["a red circle", "circle", "a photo of circle"]
    wanted = model.generate(asked, seeds=[5, 6, 7], steps=4, guidance=3.0)
    assert np.array_equal(judge.seen[1], wanted) and made.items[0].details["shows"] == "other"
    with pytest.raises(SettingError, match="give the concept an anchor"):
        method.attack(model, Concept("star"), judge, Budget("b"), prompts=PROMPTS)
    judge = Seeing()
    method = Inpainting(**SMALL, shows="other")
    method.attack(with_world(tiny_diffusion()), STAR, judge, Budget("b"), prompts=PROMPTS)
    assert [int(picture[0, 0, 0]) for picture in judge.seen[1]] == [40, 41, 42]


def test_files_and_the_world_as_targets(tmp_path):
    path = tmp_path / "star.png"
    Image.fromarray(np.full((16, 16, 3), 99, np.uint8)).save(path)
    own = Concept("star", images=(str(path),))
    model, judge = with_world(tiny_diffusion()), Seeing()
    for method in (ImageToImage(**SMALL), Inpainting(**SMALL)):
        made = method.attack(model, own, judge, Budget("b"), prompts=PROMPTS)
        assert made.items[0].details["target"] == "files"
        assert made.items[0].details["rows"] == 8 + 4 + 8
    assert all((seen == 99).all() for seen in (judge.seen[1], judge.seen[5]))
    for method, where in ((ImageToImage(**SMALL), "original"), (Inpainting(**SMALL), "world")):
        made = method.attack(model, STAR, Seeing(), Budget("b"), prompts=PROMPTS)
        assert made.items[0].details["target"] == where
    assert made.items[0].details["masks"] == "exact"
    bare = tiny_diffusion()
    for target, match in (("files", "names no picture files"), ("world", "no world")):
        with pytest.raises(SettingError, match=match):
            ImageToImage(**SMALL, target=target).attack(
                bare, STAR, judge, Budget("b"), prompts=PROMPTS
            )


def test_what_of_the_concepts_place_is_drawn_anew():
    mask = np.zeros((8, 8), bool)
    mask[2:6, 2:6] = True
    mask[2, 2] = False
    anew = Inpainting(keep=0.5).anew(mask)
    assert anew[:, :4].sum() == 0 and anew[2:6, 4:6].all() and anew.sum() == 8
    assert np.array_equal(Inpainting(keep=0.0).anew(mask), mask)
    assert Inpainting(keep=0.0, place="box").anew(mask).sum() == 16
    assert not Inpainting().anew(np.zeros((8, 8), bool)).any()


def test_a_latent_stays_only_if_all_its_pixels_do_and_stays_bit_for_bit():
    model = with_world(tiny_diffusion())
    found = model.companions.pictures("star", 2, split="development")
    kept, more = Inpainting(keep=0.0).kept(model, Targets("world", found))
    assert kept.shape == (2, 1, 8, 8) and more == {"masks": "exact", "keep": 0.0}
    pixels = found.masks[0].reshape(8, 2, 8, 2).any((1, 3))
    assert torch.equal(kept[0, 0] == 0, torch.from_numpy(pixels))
    kept, more = Inpainting(keep=0.0, box=0.5).kept(
        model, Targets("original", found._replace(masks=None))
    )
    assert more["masks"] == "box" and (kept[0, 0] == 0).sum() == 16 and not kept[0, 0, 2:6, 2:6].any()  # fmt: skip


def test_noise_is_the_attacks_own_and_batches_do_not_matter():
    model = tiny_diffusion()

    def run(seed, batch):
        method = ImageToImage(**{**SMALL, "strengths": (1.0,)}, batch=batch)
        return method.attack(model, STAR, Seeing(), Budget("b"), prompts=PROMPTS, seed=seed).outputs

    one, two, other = run(3, 8), run(3, 1), run(4, 8)
    assert np.abs(one.astype(int) - two).max() <= 1 and not np.array_equal(one, other)
