"""The world's own grid of objects and styles, drawn small by its own model and read by its oracle."""

from __future__ import annotations

import numpy as np
import pytest

import expunge
from expunge.core.sampling import OutputCache
from expunge.errors import InputError
from expunge.measure.unlearncanvas import canvas, rates
from expunge.world import scenes, vocabulary
from expunge.world.canvas import world_canvas, world_grid
from expunge.world.judge import OracleJudge


def test_the_grid_leaves_other_reference_concepts_out():
    kind, cells = world_grid("dotted")
    assert kind == "style"
    styles, objects = {c.style for c, _ in cells}, {c.object for c, _ in cells}
    assert "striped" not in styles and "star" not in objects
    assert len(cells) == len(styles) * len(objects) * 5 == 5 * 11 * 5
    kind, cells = world_grid("star", seeds=(1,))
    assert kind == "object" and "star" in {c.object for c, _ in cells}
    assert len({prompt.seed for _, prompt in cells}) == len(cells)
    assert all(prompt.seed in vocabulary.TEST_SEEDS for _, prompt in cells)
    _, tuned = world_grid("star", seeds=(1,), split="development")
    assert all(prompt.seed in vocabulary.DEVELOPMENT_SEEDS for _, prompt in tuned)
    # By a listed phrase, too.
    assert world_grid("pentagram")[1][0][1].concept == "star"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forgotten": "red"}, "colour"),
        ({"forgotten": "dotted", "styles": ("dotty",)}, "dotted"),
        ({"forgotten": "dotted", "split": "train"}, "development"),
        ({"forgotten": "sofa"}, "sofa"),
    ],
)
def test_mistakes_are_said_in_words(options, words):
    with pytest.raises(InputError, match=words):
        world_grid(**options)


class Renderer:
    """Draws the truth, or another style where it has forgotten one, or noise."""

    name = "renderer"
    controls = ()

    def __init__(self, forgotten=None, noise=False):
        self.forgotten, self.noise = forgotten, noise

    def needs(self, *capabilities):
        pass

    def generate(self, prompts, **options):
        return np.stack([self._draw(prompt) for prompt in prompts])

    def _draw(self, prompt):
        generator = np.random.default_rng(prompt.seed)
        if self.noise:
            return generator.integers(0, 255, (64, 64, 3), np.uint8)
        style = prompt.labels["style"]
        style = "gradient" if style == self.forgotten else style
        colour = str(generator.choice(["red", "blue", "green"]))
        thing = scenes.Thing(
            prompt.labels["object"], colour, style, x=32.0, y=32.0, radius=20.0, angle=0.0
        )
        return scenes.render(
            scenes.Scene(kind="object", things=(thing,), background="paper", seed=prompt.seed)
        )


def test_rendered_truth_has_rates_that_the_oracle_allows():
    small = {
        "styles": ("plain", "dotted", "checkered", "gradient"),
        "objects": ("circle", "heart", "tree"),
        "seeds": (1, 2),
    }
    whole = world_canvas(Renderer(), "dotted", **small)
    assert whole.ua.value <= 0.2 and whole.ira.value >= 0.9 and whole.cra.value >= 0.9
    assert whole.unrecognisable <= 0.05
    erased = world_canvas(Renderer(forgotten="dotted"), "dotted", **small)
    assert erased.ua.value >= 0.9 and erased.ira.value == whole.ira.value
    noise = world_canvas(Renderer(noise=True), "dotted", **small)
    # A destroyed model forgets everything: perfect UA, nothing kept, nothing recognised.
    assert noise.ua.value == 1 and noise.ira.value <= 0.1 and noise.unrecognisable >= 0.9
    assert noise.confidence < whole.confidence
    assert "world-oracle" in whole.ua.protocol


def test_the_worlds_model_draws_its_own_grid():
    model, cache = expunge.load("world"), OutputCache()
    small = {"styles": ("dotted", "checkered"), "objects": ("circle", "heart"), "seeds": (1,)}
    made = world_canvas(model, "dotted", **small, steps=5, cache=cache)
    assert made.ua.n == made.ira.n == made.cra.n == 2
    _, cells = world_grid("dotted", **small)
    seen = canvas(model, cells, OracleJudge(), steps=5, cache=cache)
    assert cache.hits == 4
    assert rates(seen, "dotted", photo="plain", judge=OracleJudge.protocol) == made
