"""UnlearnCanvas: data, names of files, and UA, IRA, CRA of hand-made grids, a destroyed model among them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from expunge.errors import InputError, ProtocolError
from expunge.measure import rank
from expunge.measure.unlearncanvas import (
    CLASSES,
    OBJECTS,
    PHOTO,
    PUBLISHED,
    SEEDS,
    STYLES,
    Cell,
    average,
    canvas,
    classifier,
    file_name,
    grid,
    rates,
    read_folder,
    read_name,
)
from expunge.method import Verdicts

GRID = grid(("Monet", "Van_Gogh", "Rust", PHOTO), ("Cats", "Dogs"), (1, 2))


def seen(wrong_style=(), wrong_object=(), lost=()):
    """The grid as classifiers see it; each list holds (style, object, seed) that go wrong."""
    found = []
    for cell, _ in GRID:
        key = (cell.style, cell.object, cell.seed)
        style = "Winter" if key in wrong_style else cell.style
        thing = "Frogs" if key in wrong_object else cell.object
        gone = key in lost
        found.append(
            dataclasses.replace(
                cell, seen_style=None if gone else style, seen_object=None if gone else thing
            )
        )
    return found


def test_the_published_grid_as_data():
    assert (len(STYLES), len(OBJECTS), SEEDS) == (50, 20, (188, 288, 588, 688, 888))
    assert PHOTO not in STYLES
    whole = grid()
    assert len(whole) == 51 * 20 * 5
    texts = {prompt.text for _, prompt in whole}
    assert "A Cats image in Van Gogh style." in texts and len(texts) == 51 * 20
    assert {prompt.seed for _, prompt in whole} == set(SEEDS)
    assert all(len(row) == 2 and len(row[0]) == len(row[1]) == 3 for row in PUBLISHED.values())


def test_file_names_of_styles_with_underscores_are_read_back():
    for cell, _ in GRID:
        assert read_name(file_name(cell)) == cell
    assert file_name(GRID[2][0]) == "Van_Gogh_Cats_seed1.jpg"
    for bad in (
        "Van_Gogh_Cats_188.jpg",
        "Cats_seed1.jpg",
        "Monet_Cats_seed1.gif",
        "../Monet_Cats_seedx.jpg",
    ):
        with pytest.raises(InputError, match="STYLE_OBJECT_seedNUMBER"):
            read_name(bad)


def test_rates_of_a_forgotten_style_equal_hand_values():
    cells = seen(
        wrong_style=[("Van_Gogh", "Cats", 1), ("Van_Gogh", "Cats", 2), ("Van_Gogh", "Dogs", 1),
                     ("Monet", "Cats", 1), (PHOTO, "Cats", 1)],
        wrong_object=[("Van_Gogh", "Cats", 1), ("Rust", "Dogs", 2)],
        lost=[("Rust", "Cats", 1)],
    )  # fmt: skip
    made = rates(cells, "Van_Gogh")
    assert made.ua.value == pytest.approx(3 / 4)
    # Monet 3/4, Rust 3/4 (what nobody recognises is wrong); photographs are not averaged in.
    assert made.ira.value == pytest.approx(3 / 4)
    # 12 pictures of other styles, photographs among them; one lost and one wrong.
    assert made.cra.value == pytest.approx(10 / 12)
    assert made.unrecognisable == pytest.approx(1 / 16)
    with_photo = rates(cells, "Van_Gogh", photo=None)
    assert with_photo.ira.value == pytest.approx(3 / 4) and with_photo.ira.n > made.ira.n
    script = rates(cells, "Van_Gogh", cross_with_forgotten=True)
    assert script.cra.value == pytest.approx(13 / 16)
    with pytest.raises(ProtocolError):
        script.cra.minus(made.cra)
    assert script.ua.minus(made.ua) == 0


def test_forgetting_an_object_is_the_mirror_image():
    cells = seen(
        wrong_style=[("Monet", "Dogs", 1), ("Rust", "Cats", 1)],
        wrong_object=[("Monet", "Cats", 1), ("Rust", "Cats", 2), (PHOTO, "Dogs", 1)],
    )
    made = rates(cells, "Cats", "object")
    assert made.ua.value == pytest.approx(2 / 8)
    assert made.ira.value == pytest.approx(7 / 8)
    assert made.cra.value == pytest.approx(7 / 8)  # styles of the pictures that do not ask for cats
    with pytest.raises(ProtocolError):
        made.ua.minus(rates(cells, "Monet").ua)


def test_mistakes_are_said_in_words():
    with pytest.raises(InputError, match="did you mean 'Van_Gogh'"):
        rates(seen(), "Van Gogh")
    with pytest.raises(InputError, match="'style' or 'object'"):
        rates(seen(), "Monet", "colour")
    with pytest.raises(InputError, match="template"):
        grid(template="A {object} image.")
    with pytest.raises(InputError, match="at least one style"):
        grid(styles=())
    assert rates(seen()[:1], "Monet").ira is None


def test_averages_over_models_that_forgot_different_things():
    one = rates(
        seen(wrong_style=[("Monet", o, s) for o in ("Cats", "Dogs") for s in (1, 2)]), "Monet"
    )
    two = rates(seen(), "Rust")
    made = average([one, two])
    assert made.ua.value == pytest.approx((1 + 0) / 2) and made.ua.n == 2
    assert made.ira.value == pytest.approx((1 + 1) / 2)
    assert made.ua.protocol.endswith("mean-over=models")
    with pytest.raises(ProtocolError):
        made.ua.minus(one.ua)
    with pytest.raises(ProtocolError):
        average([one, rates(seen(), "Cats", "object")])
    with pytest.raises(InputError, match="at least one model"):
        average([])


def test_a_folder_is_read_by_name_and_missing_pictures_are_named(tmp_path):
    shades = {"Monet": 10, "Van_Gogh": 90, "Rust": 170, PHOTO: 250}
    for cell, _ in GRID:
        value = shades[cell.style] + (5 if cell.object == "Dogs" else 0)
        Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(
            tmp_path / file_name(cell), quality=100
        )
    (tmp_path / "log.txt").write_text("no picture")

    def style_of(pictures):
        return [min(shades, key=lambda name: abs(shades[name] + 2 - p.mean())) for p in pictures]

    def object_of(pictures):
        return ["Dogs" if (p.mean() + 70.5) % 80 > 2.5 else "Cats" for p in pictures]

    options = {"styles": tuple(shades), "objects": ("Cats", "Dogs"), "seeds": (1, 2)}
    cells = read_folder(tmp_path, style_of, object_of, **options)
    assert len(cells) == 16
    assert all(c.style == c.seen_style and c.object == c.seen_object for c in cells)
    (tmp_path / "Rust_Dogs_seed2.jpg").unlink()
    with pytest.raises(InputError, match="1 of 16 pictures are missing, Rust_Dogs_seed2"):
        read_folder(tmp_path, style_of, object_of, **options)
    assert len(read_folder(tmp_path, style_of, object_of, **options, partial=True)) == 15
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "Monnet_Cats_seed1.jpg")
    with pytest.raises(InputError, match="did you mean 'Monet'"):
        read_folder(tmp_path, style_of, object_of, **options)


def test_a_network_names_pictures_with_the_published_preprocessing():
    seen = []

    def network(pixels):
        seen.append(pixels)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.tensor([1, 0]), 3).float())

    pictures = np.zeros((2, 30, 40, 3), np.uint8)
    pictures[1] = 255
    assert classifier(network, ("a", "b", "c"))(pictures) == ["b", "a"]
    assert tuple(seen[0].shape) == (2, 3, 224, 224)
    np.testing.assert_allclose(seen[0][0], -1, atol=1e-6)
    np.testing.assert_allclose(seen[0][1], 1, atol=1e-6)
    with pytest.raises(InputError, match="2 names"):
        classifier(network, ("a", "b"))(pictures)
    assert len(CLASSES) == 51 and CLASSES.index(PHOTO) == 38  # where the published list has it


class Blank:
    """A model that draws nothing but what it is told, and a judge that reads it."""

    name = "blank"
    controls = ()

    def __init__(self, destroyed=()):
        self.destroyed = destroyed

    def needs(self, *capabilities):
        assert capabilities == ("generate",)

    def generate(self, prompts, **options):
        rows = []
        for prompt in prompts:
            gone = prompt.labels["style"] in self.destroyed or "all" in self.destroyed
            code = (
                [0, 0, 255]
                if gone
                else [NAMES.index(prompt.labels[k]) + 1 for k in ("style", "object")] + [0]
            )
            rows.append(np.full((2, 2, 3), code, np.uint8))
        return np.stack(rows)


NAMES = ["Monet", "Van_Gogh", "Rust", PHOTO, "Cats", "Dogs"]


class Reader:
    id, protocol, threshold = "reader", "reader/1", 0.5

    def judge(self, outputs, concept, prompts):
        score = (outputs[:, 0, 0, :2] == NAMES.index(concept.name) + 1).any(1).astype(float)
        return Verdicts(score > 0, score, outputs[:, 0, 0, 2] == 0)

    def features(self, outputs):
        return None


def test_a_grid_is_drawn_and_named_by_any_judge():
    cells = canvas(Blank(), GRID, Reader(), batch=5)
    assert [(c.seen_style, c.seen_object) for c in cells] == [(c.style, c.object) for c, _ in GRID]
    forgot = canvas(Blank(destroyed=("Van_Gogh",)), GRID, Reader())
    made = rates(forgot, "Van_Gogh", judge="reader/1")
    assert (made.ua.value, made.ira.value, made.cra.value) == (1, 1, 1)
    assert made.unrecognisable == 0.25
    assert made.confidence == pytest.approx(
        0.75
    )  # the reader is sure of what it reads, and of nothing else
    with pytest.raises(InputError, match="no cell"):
        canvas(Blank(), [], Reader())


def test_a_destroyed_model_has_perfect_ua_and_is_ranked_last():
    models = {
        "untouched": Blank(),
        "good": Blank(destroyed=("Van_Gogh",)),
        "destroyed": Blank(destroyed=("all",)),
    }
    made = {
        name: rates(canvas(model, GRID, Reader()), "Van_Gogh") for name, model in models.items()
    }
    assert made["destroyed"].ua.value == 1 and made["destroyed"].ira.value == 0
    assert made["destroyed"].unrecognisable == 1
    rows = {
        name: {
            "target_hit": 1 - one.ua.value,
            "kept_hit": one.ira.value,
            "unrecognisable": one.unrecognisable,
        }
        for name, one in made.items()
    }
    # Both the untouched and the destroyed model have a harmonic mean of 0, and the order of the rows is no matter.
    for order in (list(rows), list(reversed(rows))):
        ranked = rank({name: rows[name] for name in order})
        assert [name for name, _ in ranked] == ["good", "untouched", "destroyed"]


def test_a_classifier_without_an_unrecognisable_class_is_at_chance_on_noise():
    generator = np.random.default_rng(0)
    whole = grid(STYLES[:10], OBJECTS[:5], (1, 2, 3))
    noise = [
        Cell(
            c.style,
            c.object,
            c.seed,
            str(generator.choice(STYLES[:10])),
            str(generator.choice(OBJECTS[:5])),
        )
        for c, _ in whole
    ]
    made = rates(noise, STYLES[0])
    assert made.ua.value > 0.7  # looks well erased
    assert made.ira.interval[0] < 1 / 10 < made.ira.interval[1]  # but what is kept is at chance
    assert made.cra.interval[0] < 1 / 5 < made.cra.interval[1]
