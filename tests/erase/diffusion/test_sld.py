"""SLD: the equations on numbers, what is asked and when, bit for bit off, every layout, and edits that travel."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from expunge import Concept, Edit
from expunge.erase.diffusion.sld import SLD, STRENGTHS, UNSAFE, _Safe
from expunge.errors import MissingCapability, ModelError, SettingError, UnsupportedModel
from expunge.method import Control, Prompt
from expunge.models.types import Context, Prediction
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import TINY_LAYOUTS, tiny_layout

# diffusers hands its tables to numpy the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STAR = Concept("star", phrases=("red star",))
PROMPTS = ["a red star", "a blue circle"]


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def context(step, steps=10, guidance=(7.5,), pictures=1):
    conditional = torch.tensor([False] * pictures + [True] * pictures)
    made = Context(step=step, steps=steps, conditional=conditional, rows=2 * pictures)
    made.guidance = torch.tensor(guidance)
    return made


def predicted(values, kind="epsilon", alpha=0.8, sigma=0.6):
    value = torch.tensor(values, dtype=torch.float32).reshape(len(values), 1, 1, -1)
    level = [torch.full((len(values), 1, 1, 1), v) for v in (alpha, sigma)]
    return Prediction(kind, value, *level)


def run(method, rows, safety, steps=10, memory=None, step=0, **more):
    """One step with e_u and e_p in ``rows``; returns e_p - gamma and the memory."""
    control = _Safe(None, method, ["x"] * len(safety))
    now = context(step, steps, **more)
    if memory is not None:
        now.memory[control] = memory
    now.further[control] = safety
    return control.prediction(now, rows), now.memory.get(control), control, now


# -- equations on numbers -----------------------------------------------------------------------------


def test_gate_direction_and_momentum_by_hand():
    method = SLD(
        safety_scale=2.0, threshold=0.1, momentum_scale=0.5, momentum_decay=0.25, warm_up=0
    )
    # e_p - e_S = -0.2, 0.05, 0.3, -3: open at 0.4, open at 0.1, shut, open and at most 1.
    rows = predicted([[1.0, 1.0, 1.0, 1.0], [0.8, 1.05, 1.3, -1.0]])
    safety = predicted([[1.0, 1.0, 1.0, 2.0]])
    rows.value[0] = torch.tensor([0.5, 0.0, 0.5, 1.0])
    old = torch.tensor([0.2, 0.0, 0.4, 0.0]).reshape(1, 1, 1, 4)
    made, momentum, *_ = run(method, rows, [safety], memory=old)
    gamma = torch.tensor([0.4 * 0.5 + 0.5 * 0.2, 0.1 * 1.0, 0.5 * 0.4, 1.0 * 1.0])
    torch.testing.assert_close(made.value[1].flatten(), rows.value[1].flatten() - gamma)
    assert torch.equal(made.value[0], rows.value[0])
    torch.testing.assert_close(momentum.flatten(), 0.25 * old.flatten() + 0.75 * gamma)
    # and so guidance gives e_u + s_g (e_p - e_u - gamma)
    safe = made.select([1]).guided(made.select([0]), torch.tensor(7.5))
    wanted = rows.value[0] + 7.5 * (rows.value[1] - rows.value[0] - gamma)
    torch.testing.assert_close(safe.value[0], wanted)


def test_the_test_is_on_the_signed_difference():
    method = SLD(safety_scale=10.0, threshold=0.01, momentum_scale=0.0, warm_up=0)
    gate = _Safe(None, method, ["x"]).gate(torch.tensor([-0.5, 0.5, 0.0]))
    assert gate.tolist() == [1.0, 0.0, 0.0]
    wide = _Safe(None, dataclasses.replace(method, threshold=1.0), ["x"])
    assert wide.gate(torch.tensor([-0.5, 0.5])).tolist() == [1.0, 1.0]


def test_momentum_grows_while_warming_up_and_is_used_afterwards():
    method = SLD(safety_scale=1e6, threshold=1.0, momentum_scale=0.5, momentum_decay=0.5, warm_up=2)
    rows, safety = predicted([[0.0], [0.5]]), predicted([[1.0]])
    memory, gamma, momentum = None, 0.0, 0.0
    for step in range(4):
        made, memory, *_ = run(method, rows, [safety], memory=memory, step=step)
        gamma = 1.0 + 0.5 * momentum
        momentum = 0.5 * momentum + 0.5 * gamma
        assert float(memory) == pytest.approx(momentum)
        assert float(made.value[1]) == pytest.approx(0.5 if step < 2 else 0.5 - gamma)


def test_several_texts_have_their_own_gates_and_are_summed():
    method = SLD(safety_scale=1e6, threshold=0.0, momentum_scale=0.0, warm_up=0)
    rows = predicted([[0.0, 0.0], [0.5, 0.5]])
    first, second = predicted([[1.0, 0.2]]), predicted([[2.0, 3.0]])
    made, *_ = run(method, rows, [first, second])
    torch.testing.assert_close(made.value[1].flatten(), torch.tensor([0.5 - 3.0, 0.5 - 3.0]))


def test_pictures_whose_guidance_is_at_most_one_are_left_alone():
    method = SLD(safety_scale=1e6, threshold=1.0, momentum_scale=0.0, warm_up=0)
    rows = predicted([[0.0], [0.0], [0.5], [0.5]])
    safety = predicted([[1.0], [1.0]])
    made, *_ = run(method, rows, [safety], guidance=(1.0, 2.0), pictures=2)
    assert made.value.flatten().tolist() == [0.0, 0.0, 0.5, -0.5]


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_other_predictions_are_compared_as_they_are(kind):
    method = SLD(safety_scale=1.0, threshold=1.0, momentum_scale=0.0, warm_up=0)
    made, *_ = run(method, predicted([[0.0], [0.5]], kind), [predicted([[0.75]], kind)])
    assert float(made.value[1]) == pytest.approx(0.5 - 0.25 * 0.75)


def test_predictions_of_the_clean_picture_are_compared_as_noise():
    method = SLD(safety_scale=1.0, threshold=0.0, momentum_scale=0.0, warm_up=0)
    noise = [predicted([[0.1], [0.5]]), predicted([[0.75]])]
    latents = torch.tensor(0.3)
    clean = [dataclasses.replace(p, kind="x0", value=p.x0(latents)) for p in noise]
    by_noise, *_ = run(method, noise[0], [noise[1]])
    by_clean, *_ = run(method, clean[0], [clean[1]])
    torch.testing.assert_close(by_clean.epsilon(latents), by_noise.value)


def test_presets_are_the_papers():
    table = {
        "weak": (15, 200, 0.0, 0.0, 0.0), "medium": (10, 1000, 0.01, 0.3, 0.4),
        "strong": (7, 2000, 0.025, 0.5, 0.7), "max": (0, 5000, 1.0, 0.5, 0.7),
    }  # fmt: skip
    for name, values in table.items():
        made = SLD.configured(f"paper:{name}")
        assert values == (
            made.warm_up, made.safety_scale, made.threshold, made.momentum_scale, made.momentum_decay,
        )  # fmt: skip
    assert SLD.configured("paper:medium") == SLD()
    assert SLD.preset_for("unsafe") == "paper:unsafe"
    assert SLD.configured("paper:unsafe").text == UNSAFE
    assert {SLD.configured(f"world:{name}").warmed_up(20) for name in STRENGTHS} == {6, 4, 3, 0}


# -- in the sampling loop -----------------------------------------------------------------------------


def strong(**settings):
    return SLD(**{"warm_up": 0, "safety_scale": 5000.0, "threshold": 1.0, **settings})


@pytest.mark.parametrize("layout", ["sd", *(name for name in TINY_LAYOUTS if name != "flux")])
def test_every_layout_with_two_branches(layout):
    model = tiny_diffusion() if layout == "sd" else tiny_layout(layout)
    plain = model.generate(PROMPTS)
    with strong().erase(model, STAR).on(model):
        before = model.cost.snapshot()
        safe = model.generate(PROMPTS)
        assert model.cost.rows("denoiser", before) == 3 * 2 * len(model.timesteps(4))
        alone = model.generate(PROMPTS, batch=1)
        assert np.abs(alone.astype(int) - safe.astype(int)).max() <= 1
    assert not np.array_equal(safe, plain)
    assert np.array_equal(model.generate(PROMPTS), plain)


def test_guidance_without_a_second_branch_is_refused():
    model = tiny_layout("flux")
    with pytest.raises(MissingCapability, match="has only one"):
        SLD().erase(model, STAR)
    edit = SLD().erase(tiny_diffusion(), STAR)
    with pytest.raises(MissingCapability, match="has only one"):
        SLD.control(edit, model)


def test_a_model_that_reads_no_text_is_refused():
    model = tiny_diffusion()
    model.vocabularies = dict  # as a model of classes says it
    with pytest.raises(UnsupportedModel, match="reads none"):
        SLD().erase(model, STAR)


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"safety_scale": 0.0}, 2),
        ({"safety_scale": 0.99}, 2),
        ({"warm_up": 4}, 2),
        ({"warm_up": 9}, 2),
        ({"warm_up": 50, "warm_up_of": 50}, 2),
    ],
)
def test_off_is_plain_guidance_bit_for_bit_and_costs_nothing(model, settings, rows):
    noise = [3, 4]
    plain = model.sample(model.encode(PROMPTS), noise)
    with strong(**settings).erase(model, STAR).on(model):
        before = model.cost.snapshot()
        made = model.sample(model.encode(PROMPTS), noise)
        assert model.cost.rows("denoiser", before) == 4 * rows * 2
    assert torch.equal(made, plain)


@pytest.mark.parametrize("guidance", [1.0, 0.5])
def test_guidance_of_at_most_one_is_left_bit_for_bit(model, guidance):
    condition = model.encode(PROMPTS)
    plain = model.sample(condition, [3, 4], guidance=guidance)
    with strong().erase(model, STAR).on(model):
        assert torch.equal(model.sample(condition, [3, 4], guidance=guidance), plain)
        mixed = model.generate(
            [Prompt(PROMPTS[0], seed=3, guidance=guidance), Prompt(PROMPTS[1], seed=4)]
        )
        led = model.generate([Prompt(PROMPTS[1], seed=4)])
    one = model.generate([Prompt(PROMPTS[0], seed=3, guidance=guidance)])
    assert np.abs(mixed[:1].astype(int) - one.astype(int)).max() <= 1
    assert np.abs(mixed[1:].astype(int) - led.astype(int)).max() <= 1


def test_safety_branches_run_only_where_they_matter(model):
    for momentum, rows in ((0.0, 2 * 2 + 3 * 2), (0.3, 3 * 4)):
        edit = strong(warm_up=2, momentum_scale=momentum).erase(model, STAR)
        with edit.on(model):
            before = model.cost.snapshot()
            model.sample(model.encode(PROMPTS[:1]), [3])
            assert model.cost.rows("denoiser", before) == rows


class Watch(Control):
    """Notes how many rows each hook is shown."""

    def __init__(self):
        self.seen, self.texts = [], []

    def condition(self, context, condition):
        self.seen.append(condition.rows)
        return condition

    def attention(self, context, probabilities):
        self.seen.append(len(probabilities))
        return probabilities

    def prediction(self, context, prediction):
        self.seen.append(len(prediction.value))
        return prediction


def test_other_controls_see_the_loops_own_rows(model):
    watch = Watch()
    with strong().erase(model, STAR).on(model):
        plain = model.sample(model.encode(PROMPTS), [3, 4])
        with model.controlled(watch):
            watched = model.sample(model.encode(PROMPTS), [3, 4])
    assert set(watch.seen) == {4}
    # A steep gate makes much of the rounding between eager and fused attention.
    torch.testing.assert_close(watched, plain, atol=1e-2, rtol=1e-2)


def test_branches_are_of_one_row_or_one_a_picture(model):
    class Greedy(Control):
        def branches(self, context):
            return [model.encode(["a", "star", "heart"])]

    with pytest.raises(ModelError, match="allowed are 1 or 2"), model.controlled(Greedy()):
        model.sample(model.encode(PROMPTS), [3, 4])

    class Extra(Control):
        def __init__(self):
            self.found = []

        def branches(self, context):
            return [context.condition.select(slice(2)), model.unconditional()]

        def prediction(self, context, prediction):
            self.found.append((prediction, context.further[self]))
            return prediction

    extra = Extra()
    with model.controlled(extra):
        model.sample(model.encode(PROMPTS), [3, 4], steps=1)
    [(own, further)] = extra.found
    for branch in further:  # both ask for the empty text, as the loop's own first rows do
        torch.testing.assert_close(branch.value, own.value[:2], atol=1e-5, rtol=1e-5)


def test_nothing_is_kept_from_one_picture_to_the_next(model):
    with strong(momentum_scale=0.9, momentum_decay=0.9).erase(model, STAR).on(model):
        first = model.generate(PROMPTS, seeds=0)
        model.generate("a striped heart", seeds=5)
        assert np.array_equal(model.generate(PROMPTS, seeds=0), first)


def test_outside_sampling_nothing_acts(model):
    latents, times = model.initial_noise([1]), torch.tensor([500])
    plain = model.predict(latents, times, model.encode(PROMPTS[0])).value
    with strong().erase(model, STAR).on(model):
        assert torch.equal(model.predict(latents, times, model.encode(PROMPTS[0])).value, plain)


def test_the_empty_safety_text_changes_nothing_but_rounding(model):
    # A control: e_S = e_u, so there is no direction to be led away from.
    plain = model.sample(model.encode(PROMPTS), [3, 4])
    with pytest.raises(SettingError, match="none of them empty"):
        SLD(text="a | ").erase(model, STAR)
    edit = strong(text="x").erase(model, STAR)
    with edit.on(model):
        control = model.acting[0]
        control.texts = [""]
        same = model.sample(model.encode(PROMPTS), [3, 4])
    torch.testing.assert_close(same, plain, atol=1e-4, rtol=1e-4)


def test_a_negative_text_takes_the_place_of_the_empty_one(model):
    with strong(text="blue").erase(model, STAR).on(model):
        made = model.generate(PROMPTS, negative="green")
        assert not np.array_equal(made, model.generate(PROMPTS))


# -- edits --------------------------------------------------------------------------------------------


def test_the_safety_text_is_the_names_unless_given(model):
    edit = SLD().erase(model, [STAR, Concept("heart")])
    assert edit.manifest.report["safety_texts"] == ["star, red star", "heart"]
    with edit.on(model):
        assert model.acting[0].texts == ["star, red star", "heart"]
        before = model.cost.snapshot()
        model.sample(model.encode(PROMPTS[:1]), [3], steps=20)
        assert model.cost.rows("denoiser", before) == 4 * 20
    given = SLD(text="violence, blood | nudity").erase(model, STAR)
    assert given.manifest.report["safety_texts"] == ["violence, blood", "nudity"]
    assert SLD.configured(None, text="violence, blood").text == "violence, blood"


def test_what_does_not_fit_is_reported(model):
    assert SLD().erase(model, STAR).manifest.report["safety_tokens_cut"] == {"tokenizer": 0}
    cut = SLD(text="star " * 30).erase(model, STAR).manifest.report["safety_tokens_cut"]
    assert cut == {"tokenizer": 30 + 2 - 16}


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [
        ("pixart", {"tokenizer": 300 + 1 - 120}),
        ("sd3", {"tokenizer": 300 + 2 - 16, "tokenizer_2": 300 + 2 - 16, "tokenizer_3": 300 + 1 - 256}),
    ],
)  # fmt: skip
def test_what_a_pipeline_cuts_before_the_tokenizer_would_is_reported(layout, wanted):
    model = tiny_layout(layout)
    edit = SLD(text="star " * 300).erase(model, STAR)
    assert edit.manifest.report["safety_tokens_cut"] == wanted
    parts = ("tokenizer", "tokenizer_3") if layout == "sd3" else ("tokenizer",)
    rows = sum(model.layout.room(part) for part in parts)
    assert model.encode("star").embeddings.shape[1] == rows


def test_it_travels_and_stacks(model, tmp_path):
    edit = strong().erase(model, STAR)
    edit.save(tmp_path / "sld.safetensors")
    again = Edit.load(tmp_path / "sld.safetensors")
    assert again == edit and not again.manifest.targets and not again.tensors
    with edit.on(model):
        one = model.generate(PROMPTS)
        other = strong(text="blue").erase(model, STAR)
        with other.on(model):
            assert not np.array_equal(model.generate(PROMPTS), one)
    with again.on(model):
        assert np.array_equal(model.generate(PROMPTS), one)
    assert strong(text="a").erase(model, STAR).digest != strong(text="b").erase(model, STAR).digest


def test_half_precision():
    model = tiny_diffusion(dtype=torch.bfloat16)
    with strong().erase(model, STAR).on(model):
        made = model.sample(model.encode(PROMPTS), [3, 4])
    assert made.dtype == torch.bfloat16 and torch.isfinite(made).all()
