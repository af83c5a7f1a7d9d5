"""Gates and adapters by hand: scores on three tokens, Eq. (9) in float64, rows, pairs of guidance, cross terms."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expunge.concept import Concept
from expunge.core.gated_adapters import Gate, GatedAdapters, features
from expunge.core.layer_choice import block_weights
from expunge.edit import Edit
from expunge.erase.diffusion.spm import SPM
from expunge.errors import MissingPart, UnsupportedModel
from expunge.models.types import Condition, Context
from expunge.testing import tiny_diffusion, tiny_layout

SIZE = 0.3


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def adapted(model, seed=0, names=None, name="star", **settings):
    """Adapters of random factors."""
    method, draw = SPM(**settings), torch.Generator().manual_seed(seed)
    tensors = {"alpha": torch.tensor(method.alpha)}
    for weight in names or block_weights(model):
        out, *width = model.tensor(weight).shape
        tensors[f"up.{weight}"] = SIZE * torch.randn(out, method.rank, generator=draw)
        tensors[f"down.{weight}"] = SIZE * torch.randn(method.rank, *width, generator=draw)
    return Edit.make(
        method,
        model,
        (Concept(name, phrases=("heart",)),),
        kind="gated-adapter",
        tensors=tensors,
        acts=True,
    )


def latents(model, count=2, seed=1):
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def predicted(model, texts, context=None, condition=None):
    with torch.no_grad():
        own = model.encode(texts) if condition is None else condition
        return model.predict(latents(model, own.rows), torch.tensor([500]), own, context).value


# -- gates ---------------------------------------------------------------------------------------------


def test_the_token_score_by_hand(model):
    gate = Gate(("red star", "heart"), "token")
    said = {"a red star": 1.0, "a star": 0.5, "a red circle": 0.5, "a heart": 1.0, "a circle": 0.0, "": 0.0,
            "a RED  Star of star": 1.0}  # fmt: skip
    found = gate.token(model, model.encode(list(said)))
    assert found.tolist() == list(said.values())
    assert gate.of(model, model.encode(["a star"])).tolist() == [0.5]
    # What no text is known for has no tokens; special tokens, shared by all texts, never count.
    unknown = dataclasses.replace(model.encode(["a red star"]), texts=None)
    assert gate.token(model, unknown).tolist() == [0.0]


def test_only_tokens_within_the_context_count(model):
    long = "circle " * 14 + "star"
    assert Gate(("star",), "token").token(model, model.encode([long])).tolist() == [0.0]
    assert Gate(("star",), "token").token(
        model, model.encode(["circle " * 13 + "star"])
    ).tolist() == [1.0]


def test_the_feature_score_is_the_cosine_of_all_rows(model):
    condition = model.encode(["a red star", "a circle"])
    one, two = (
        model.encode(["star"]).embeddings.double(),
        model.encode(["heart"]).embeddings.double(),
    )
    rows = condition.embeddings.double()
    wanted = [
        max(float((row * c).sum() / row.norm() / c.norm()) for c in (one, two)) for row in rows
    ]
    gate = Gate(("star", "heart"), "feature")
    torch.testing.assert_close(
        gate.of(model, condition), torch.tensor(wanted), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        Gate(("star",), "feature", 2.0).of(model, model.encode(["star"])), torch.tensor([2.0])
    )


def test_the_larger_counts_times_the_factor_and_open_is_one(model):
    condition = model.encode(["a red star", "a circle", ""])
    scores = {
        s: Gate(("star",), s).of(model, condition) for s in ("max", "feature", "token", "open")
    }
    assert torch.equal(scores["max"], scores["feature"].maximum(scores["token"]))
    assert scores["max"][0] == 1.0 and scores["max"][1] == scores["feature"][1] < 1
    assert scores["open"].tolist() == [1.0] * 3
    assert torch.equal(Gate(("star",), factor=0.0).of(model, condition), torch.zeros(3))
    torch.testing.assert_close(Gate(("star",), factor=2.0).of(model, condition), 2 * scores["max"])


def test_masked_rows_count_as_zeros_and_lengths_may_differ():
    rows = torch.tensor([[[3.0, 0.0], [7.0, 7.0]]])
    masked = Condition(rows, torch.tensor([[1, 0]]))
    assert features(masked).tolist() == [[3.0, 0.0, 0.0, 0.0]]
    model = tiny_diffusion()
    whole = model.encode(["a star"])
    short = Condition(whole.embeddings[:, :5])
    gate = Gate(("star",), "feature")
    padded = torch.zeros_like(whole.embeddings)
    padded[:, :5] = short.embeddings
    torch.testing.assert_close(gate.of(model, short), gate.of(model, Condition(padded)))
    longer = Condition(torch.cat([whole.embeddings, torch.zeros(1, 3, 32)], 1))
    torch.testing.assert_close(gate.of(model, longer), gate.of(model, whole))


def test_the_gate_belongs_to_the_prompt_in_both_branches(model):
    gate = Gate(("star",))
    both = Condition.concatenate(
        [model.unconditional().repeat(2), model.encode(["a star", "a circle"])]
    )
    flags = torch.tensor([False, False, True, True])
    found = gate.of(model, both, flags)
    alone = gate.of(model, model.encode(["a star", "a circle"]))
    # Rows of a batch of another size may differ in the last bit: which kernel runs is the processor's choice.
    torch.testing.assert_close(found, alone.repeat(2), rtol=0, atol=1e-6)
    assert not torch.equal(
        gate.of(model, both), found
    )  # outside guidance each row goes by its own text
    with pytest.raises(UnsupportedModel, match="1 unconditional rows beside 3 prompts"):
        gate.of(model, both, torch.tensor([False, True, True, True]))


def test_gradients_reach_embeddings_through_the_gate(model):
    rows = model.encode(["a circle"]).embeddings.clone().requires_grad_(True)
    Gate(("star",)).of(model, Condition(rows)).sum().backward()
    assert rows.grad is not None and float(rows.grad.abs().max()) > 0


@pytest.mark.parametrize("layout", ["sdxl", "pixart", "sana", "sd3", "flux"])
def test_gates_of_every_layout(layout):
    model = tiny_layout(layout)
    found = Gate(("red star",)).of(model, model.encode(["red star", "a star of red", "a circle"]))
    torch.testing.assert_close(found[:2], torch.ones(2))
    assert float(found[2]) < 1
    assert Gate(("red star",), "token").of(model, model.encode(["a red"])).tolist() == [0.5]


# -- adapters ------------------------------------------------------------------------------------------


def layer_of(model, end):
    return next(n for n in block_weights(model) if n.endswith(end))


@pytest.mark.parametrize("end", ["attn2.to_v.weight", "proj_in.weight", "ff.net.0.proj.weight"])
@pytest.mark.parametrize("doubled", [False, True])
def test_equation_nine_and_the_published_code_by_hand(model, end, doubled):
    """Two adapters on one layer: y = W x + sum gamma (down x) up; doubled: (sum gamma up) (sum gamma down) x."""
    name = layer_of(model, end)
    compat = "official" if doubled else "paper"
    edits = [
        adapted(model, i, [name], n, rank=2, alpha=3.0, compat=compat)
        for i, n in enumerate(("star", "circle"))
    ]
    module = dict(model.denoiser.named_modules())[
        name.removeprefix("unet.").removesuffix(".weight")
    ]
    draw, condition = (
        torch.Generator().manual_seed(3),
        model.encode(["a red star", "a blue circle"]),
    )
    shape = (
        (2, module.weight.shape[1], 3, 3)
        if module.weight.ndim == 4
        else (2, 5, module.weight.shape[1])
    )
    given = torch.randn(shape, generator=draw)
    with edits[0].on(model), edits[1].on(model), torch.no_grad():
        made = plain = module(given)
        gates = [c.gate.of(model, condition) for c in model.edits.controls]
        context = Context(layer=name.removesuffix(".weight"), inputs=(given,))
        for control in model.edits.controls:
            control.condition(context, condition)
        for control in model.edits.controls:
            made = control.activations(context, made)
    x = (given.permute(0, 2, 3, 1) if given.ndim == 4 else given).double()
    ups, downs = (
        [e.tensors[f"{s}.{name}"].double().flatten(1) for e in edits] for s in ("up", "down")
    )
    wanted = plain.double().clone()
    for row in range(2):
        g = [float(gate[row]) for gate in gates]
        if doubled:
            up, down = (sum(w * f for w, f in zip(g, fs, strict=True)) for fs in (ups, downs))
            change = 1.5 * x[row] @ down.T @ up.T
        else:
            change = sum(
                w * 1.5 * x[row] @ d.T @ u.T for w, u, d in zip(g, ups, downs, strict=True)
            )
        wanted[row] += change.permute(2, 0, 1) if change.ndim == 3 else change
    torch.testing.assert_close(made.double(), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made, plain, atol=1e-2)


def test_one_doubled_adapter_acts_by_the_square(model):
    names = [layer_of(model, "attn2.to_v.weight")]
    edit = adapted(model, 0, names, compat="official", factor=0.5)
    squared = SPM.regated(edit, compat="paper", gate="open", factor=0.25)
    with SPM.regated(edit, gate="open").on(model):
        double = predicted(model, ["a circle"])
    with squared.on(model):
        torch.testing.assert_close(predicted(model, ["a circle"]), double, atol=1e-5, rtol=1e-5)


def test_rows_do_not_mix_and_rows_of_gate_zero_are_the_bare_models(model):
    edit = adapted(model, gate="token")
    plain = predicted(model, ["a circle", "a star", "a square"])
    with edit.on(model):
        made = predicted(model, ["a circle", "a star", "a square"])
        assert torch.equal(made[[0, 2]], plain[[0, 2]])
        assert not torch.allclose(made[1], plain[1], atol=1e-2)
        assert torch.equal(predicted(model, ["a circle", "", "a square"])[0], plain[0])
        hooks = sum(len(m._forward_hooks) for m in model.denoiser.modules())
    assert hooks == 0 and not any(m._forward_hooks for m in model.denoiser.modules())
    for settings in ({"factor": 0.0}, {"gate": "open", "factor": 0.0}):
        with SPM.regated(edit, **settings).on(model):
            assert torch.equal(predicted(model, ["a circle", "a star", "a square"]), plain)


def test_guided_pictures_of_a_batch_are_those_of_single_ones(model):
    edit = adapted(model)
    texts = ["a red star", "a circle"]
    with edit.on(model), torch.no_grad():
        together = model.sample(model.encode(texts), [4, 5], steps=2)
        for i, text in enumerate(texts):
            alone = model.sample(model.encode([text]), [4 + i], steps=2)
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-3, rtol=1e-3)


def test_further_branches_of_guidance_go_by_their_prompts(model):
    edit = adapted(model)
    with edit.on(model):
        (control,) = model.edits.controls
        context = Context(conditional=torch.tensor([False, False, True, True]), layer="somewhere")
        both = Condition.concatenate(
            [model.unconditional().repeat(2), model.encode(["a star", "a circle"])]
        )
        control.condition(context, both)
        four = control.gates(context, 4)
        assert torch.equal(control.gates(context, 8), torch.cat([four, four[2:], four[2:]]))
        with pytest.raises(UnsupportedModel, match="somewhere has 5 rows"):
            control.gates(context, 5)
        with pytest.raises(UnsupportedModel, match="3 rows"):
            control.gates(context, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    model = tiny_diffusion(dtype=dtype)
    edit = adapted(tiny_diffusion(), gate="token")
    texts = ["a circle", "a star"]
    plain = predicted_in(model, texts, dtype)
    with edit.on(model):
        made = predicted_in(model, texts, dtype)
    assert (
        made.dtype == dtype
        and torch.equal(made[0], plain[0])
        and not torch.equal(made[1], plain[1])
    )


def predicted_in(model, texts, dtype):
    with torch.no_grad():
        return model.predict(
            latents(model).to(dtype), torch.tensor([500]), model.encode(texts)
        ).value


def test_adapters_that_cannot_stand_there_are_refused(model):
    table = "text_encoder.embeddings.token_embedding.weight"
    out, width = model.tensor(table).shape
    tensors = {
        "alpha": torch.tensor(1.0),
        f"up.{table}": torch.zeros(out, 1),
        f"down.{table}": torch.zeros(1, width),
    }
    bare = Edit.make(
        SPM(), model, (Concept("star"),), kind="gated-adapter", acts=True, tensors=tensors
    )
    with pytest.raises(MissingPart, match="no adapter can stand beside it"):
        bare.apply(model)
    assert not model.edits.digests
    one, two = (adapted(model, i, rank=r, compat="official") for i, r in enumerate((1, 2)))
    with one.on(model), pytest.raises(UnsupportedModel, match="rank 1 and 2"):
        two.apply(model)
    with one.on(model), SPM.regated(two, compat="paper").on(model):
        assert len(model.edits) == 2
    assert GatedAdapters(model, one, Gate(("star",))).layers[0] == block_weights(model)[0][:-7]
