"""Points and answers of score-regressing erasers; noised pictures."""

import pytest
import torch

from expunge.core import scores, trajectories
from expunge.core.tasks import Step
from expunge.errors import SettingError
from expunge.testing import tiny_diffusion, tiny_layout

TEXTS = ["a star", "a red circle"]


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def source(model, answer=None, **more):
    settings = {"steps": 4, "guidance": 3.0, "seed": 3, "batch": 3} | more
    return scores.PointSource(
        model, TEXTS, answer=answer or (lambda points: {"none": points.which}), **settings
    )


def test_fresh_points_follow_one_another(model):
    made = [source(model).at(Step(index, 9, 0))[0] for index in range(2)]
    whole = trajectories.draw(model, TEXTS, 6, steps=4, guidance=3.0, seed=3)
    both = trajectories.Trajectories.concatenate(made)
    torch.testing.assert_close(both.latents, whole.latents, atol=1e-4, rtol=1e-4)
    assert torch.equal(both.timesteps, whole.timesteps) and torch.equal(both.which, whole.which)


def test_a_bank_is_drawn_once_and_answers_stay_with_their_points(model):
    asked = []

    def answer(points):
        asked.append(len(points.which))
        return {"latents": points.latents * 2}

    own = source(model, answer, bank=5)
    for index in range(4):
        points, answers = own.at(Step(index, 9, 0))
        assert len(points.which) == 3
        assert torch.equal(answers["latents"], points.latents * 2)
    assert asked == [5]
    again, _ = source(model, answer, bank=5).at(Step(3, 9, 0))
    assert torch.equal(again.latents, points.latents)


@pytest.mark.parametrize(("walked", "drawn"), [("frozen", [True]), ("student", [False])])
def test_who_walks_and_who_answers(model, monkeypatch, walked, drawn):
    """Answers always come from the model before training; walks only if they are frozen."""
    inside = []

    class Original:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            inside.pop()

    seen = {"walk": [], "answer": []}
    draw = trajectories.draw_along
    monkeypatch.setattr(
        trajectories,
        "draw_along",
        lambda *a, **k: seen["walk"].append(bool(inside)) or draw(*a, **k),
    )
    own = source(
        model,
        lambda points: seen["answer"].append(bool(inside)) or {"n": points.which},
        walked=walked,
    )
    own.at(Step(0, 9, 0, original=Original))
    assert seen == {"walk": drawn, "answer": [True]}


def test_sources_that_mean_nothing_are_refused(model):
    with pytest.raises(SettingError, match="frozen"):
        source(model, walked="thawed")
    with pytest.raises(SettingError, match="student"):
        source(model, walked="student", bank=4)
    # Else the last of a long list of concepts would not be erased, without a word.
    with pytest.raises(SettingError, match="no point for 1 of 2 texts"):
        source(model, bank=1)
    assert len(source(model, bank=1, partial=True).bank[0].which) == 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_asked_agrees_with_asking_one_at_a_time(kind):
    model = tiny_diffusion(prediction_type=kind)
    points = trajectories.draw(model, TEXTS, 5, steps=4, guidance=3.0, seed=0)
    texts = model.encode(TEXTS).select(points.which)
    made = scores.asked(model, points, [texts, model.unconditional()], batch=4)
    with torch.no_grad():
        for found, condition in zip(made, [texts, model.unconditional().repeat(5)], strict=True):
            for row in range(5):
                own = scores.epsilon(model, points.select([row]), condition.select([row]))
                torch.testing.assert_close(found[[row]], own, atol=1e-4, rtol=1e-4)
    assert not any(found.requires_grad for found in made)


@pytest.mark.parametrize("name", ["sd", "pixart", "flux"])
def test_noised_pictures_hold_the_noise_that_was_added(name):
    model = tiny_diffusion() if name == "sd" else tiny_layout(name)
    clean = model.initial_noise(range(4), "clean")
    points, noise = scores.noised(model, clean, torch.Generator().manual_seed(0))
    alpha, sigma = model.alpha_sigma(points.timesteps)
    torch.testing.assert_close(points.latents, alpha * clean + sigma * noise)
    again, _ = scores.noised(model, clean, torch.Generator().manual_seed(0))
    assert torch.equal(again.latents, points.latents)


def test_random_times_stay_in_their_share():
    discrete, flow = tiny_diffusion(), tiny_layout("flux")
    draw = torch.Generator().manual_seed(0)
    early = scores.random_times(discrete, 2000, draw, low=0.7)
    assert not early.is_floating_point()
    assert early.min() >= 700 and early.max() == 999 and early.unique().numel() > 250
    late = scores.random_times(discrete, 2000, draw, high=0.25)
    assert late.min() == 0 and late.max() < 250
    times = scores.random_times(flow, 2000, draw, low=0.5, high=0.75)
    assert times.min() > 500 and times.max() <= 750 and times.unique().numel() > 1500
    with pytest.raises(SettingError):
        scores.random_times(flow, 2, draw, low=0.5, high=0.5)
