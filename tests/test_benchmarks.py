"""The programs in ``benchmarks/``: the clocks they share, and a small run of each."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from expunge.testing import bench, tiny_diffusion

ROOT = Path(__file__).resolve().parent.parent


def loaded(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def sampling() -> Iterator[ModuleType]:
    yield from loaded("sampling")


@pytest.fixture(scope="module")
def closed_form() -> Iterator[ModuleType]:
    yield from loaded("closed_form")


@pytest.fixture(scope="module")
def sparse_autoencoders() -> Iterator[ModuleType]:
    yield from loaded("sparse_autoencoders")


@pytest.fixture(scope="module")
def finetuning() -> Iterator[ModuleType]:
    yield from loaded("finetuning")


@pytest.fixture(scope="module")
def advunlearn() -> Iterator[ModuleType]:
    yield from loaded("advunlearn")


def test_a_bank_saves_the_walks_of_an_inner_attack(advunlearn, tmp_path, capsys):
    file = tmp_path / "advunlearn.json"
    advunlearn.main(["--quick", "--out", str(file)])
    found = json.loads(file.read_text())
    ours, published = found["arms"]["ours"], found["arms"]["published"]
    # One point and five retain points, forward and backward; two attack steps on top.
    assert ours["rows_an_update"] == {"plain": 12, "attacked": 16}
    # Walks of 1.5 steps with both branches, two teachers (one for what is held), forward and backward.
    assert published["rows_an_update"] == {"plain": 7 + 5 * 6, "attacked": 7 + 5 * 6 + 2 * 7}
    theirs, own = 200 * 37 + 800 * 51, ours["bank_rows"] + 200 * 12 + 800 * 16
    assert found["rows"] == pytest.approx(theirs / own) and found["seconds"] > 0
    assert "rows: 3.2 times less, target 4: missed" in capsys.readouterr().out
    assert advunlearn.arguments(["--quick"]).out is None
    method = advunlearn.AdvUnlearn()
    assert advunlearn.by_hand(method, True) == 30 * 53 + 53 + 5 * 52


@pytest.fixture(scope="module")
def attacks() -> Iterator[ModuleType]:
    yield from loaded("attacks")


def test_attacks_are_counted_beside_the_ceiling_and_one_at_a_time(attacks, tmp_path, capsys):
    tiny_diffusion().pipeline.save_pretrained(tmp_path / "tiny")
    file = tmp_path / "attacks.json"
    attacks.main(["--model", str(tmp_path / "tiny"), "--quick", "--out", str(file)])
    found = json.loads(file.read_text())
    ours, single = found["arms"]["random-tokens"], found["arms"]["random-tokens, single"]
    # The plain picture and one draw of each prompt, 20 steps of both branches.
    assert (ours["rows"], ours["items"]) == (2 * 2 * 40, 2) and (
        single["rows"],
        single["items"],
    ) == (2 * 40, 1)
    assert found["backward_share_of_rows"] == {"random-tokens": 0}
    share = found["share_of_unet_best"]["random-tokens"]
    assert share > 0 and found["rows_a_second_over_one_at_a_time"]["random-tokens"] > 0
    assert f"random-tokens: {share:.1%}" in capsys.readouterr().out
    assert attacks.arguments(["--quick"]).out is None
    one = {"unet, a": (10.0, None), "x": (5.0, {"rows": 40}), "x, single": (2.0, {"rows": 8})}
    assert attacks.compared([one], ["x"], 100)["shares"] == {"x": 0.8}
    assert attacks.compared([one], ["x"], 100)["single"] == {"x": 2.0}


@pytest.fixture(scope="module")
def few_shot_erasing() -> Iterator[ModuleType]:
    yield from loaded("few_shot_erasing")


def test_a_plain_loop_is_timed_beside_few_shot_erasing(few_shot_erasing, tmp_path, capsys):
    file = tmp_path / "few_shot.json"
    few_shot_erasing.main(["--quick", "--steps", "2", "--out", str(file)])
    found = json.loads(file.read_text())
    [seconds] = found["arms"]["seconds_a_step"]
    assert set(seconds) == {"ours", "plain", "floor"} and min(seconds.values()) > 0
    assert found["step_ratio"] == pytest.approx(seconds["plain"] / seconds["ours"])
    assert "step_ratio:" in capsys.readouterr().out
    assert few_shot_erasing.arguments(["--quick"]).out is None
    model = tiny_diffusion()
    before = {name: p.detach().clone() for name, p in model.tensors().items()}
    for arm in (few_shot_erasing.ours, few_shot_erasing.plain, few_shot_erasing.floor):
        arm(model, 1)
        assert all(
            not p.requires_grad and p.grad is None and bool((p == before[n]).all())
            for n, p in model.tensors().items()
        )


def test_fine_tunes_run_the_passes_that_were_counted_by_hand(finetuning, tmp_path, capsys):
    tiny_diffusion().pipeline.save_pretrained(tmp_path / "tiny")
    file = tmp_path / "finetuning.json"
    finetuning.main(["--model", str(tmp_path / "tiny"), "--quick", "--out", str(file)])
    found = json.loads(file.read_text())
    assert set(found["over_floor"]) == set(finetuning.WORKS)
    said = capsys.readouterr().out
    for id, one in found["arms"].items():
        rows = one["rows"]
        assert rows["backward_counted"] == rows["backward_needed"], id
        # Depths are random: a short bank may walk twice the mean, or almost nothing.
        assert (
            0.3 * rows["forward_needed"] <= rows["forward_counted"] <= 2 * rows["forward_needed"]
        ), id
        assert one["over_floor"] > 0 and f"{id}: over_floor" in said
    with pytest.raises(SystemExit):
        finetuning.arguments(["--methods", "no-such"])


def test_a_small_run_writes_ratios_and_counts(sampling, tmp_path, capsys):
    tiny_diffusion().pipeline.save_pretrained(tmp_path / "tiny")
    file = tmp_path / "sampling.json"
    sampling.main(["--model", str(tmp_path / "tiny"), "--quick", "--out", str(file)])
    found = json.loads(file.read_text())
    assert found["benchmark"] == "sampling" and found["setting"]["model"] == "tiny"
    assert found["setting"]["quick"] and found["setting"]["threads"] == 1
    shares, said = found["share_of_unet_best"], capsys.readouterr().out
    for name in ("whole", "without_decoding"):
        met = shares[name] >= 0.9
        assert found["target_met"][name] is met
        assert f"{name}: {shares[name]:.1%}" in said and ("met" if met else "missed") in said
    assert 0 < shares["whole"] < shares["without_decoding"]
    assert found["arms"]["ours"]["denoiser_rows"] == 4 * 2 * 2  # pictures, steps, branches
    assert found["same_pictures_as_stock"] is True
    assert found["denoiser_rows_saved"] == {"same_pictures_again": 1}
    assert found["texts_encoded_saved"] == {"same_pictures_again": 1, "other_seeds": 1}
    counted = found["arms"]["caching"]
    assert counted["first"]["texts_encoded"] == 2  # one prompt and the empty one
    assert counted["other_seeds"]["denoiser_rows"] == counted["first"]["denoiser_rows"] == 4


def test_a_missed_target_is_called_missed():
    assert bench.verdict("whole", "89.9%", "90%", met=False) == "whole: 89.9%, target 90%: missed"
    assert bench.verdict("whole", "90.0%", "90%", met=True).endswith("target 90%: met")


def test_ratios_are_taken_within_a_round(sampling):
    made = sampling.Made(None, 100, {"pictures_of": 2.0})
    slow = {"unet, a": (20.0, None), "unet, b": (16.0, None), "ours": (22.0, made)}
    slow |= {"batched": (44.0, None), "looped": (33.0, None)}
    fast = {name: (seconds / 2, result) for name, (seconds, result) in slow.items()}
    fast["ours"] = (11.0, sampling.Made(None, 100, {"pictures_of": 1.0}))
    found = sampling.compared([slow, fast], count=10, looped=5, total=100)
    assert found["best"] == "unet, b"
    assert found["median"] == pytest.approx(
        {"whole": 16 / 22, "without_decoding": 0.8, "one_at_a_time": 3.0, "batched": 2.0}
    )


def test_a_smoke_run_never_writes_over_the_record(sampling):
    assert sampling.arguments(["--quick"]).out is None
    assert sampling.arguments([]).out == ROOT / "results" / "benchmarks" / "sampling.json"


def test_every_round_runs_every_work_and_begins_elsewhere():
    log: list[str] = []
    rounds = list(bench.interleaved({name: lambda n=name: log.append(n) for name in "abc"}, 3))
    assert "".join(log) == "abcbcacab" and [sorted(one) for one in rounds] == [list("abc")] * 3


def test_clocked_calls_are_timed_and_restored(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(bench.time, "process_time", lambda: float(next(ticks)))
    model = tiny_diffusion()
    with bench.clocked((model, "token_ids"), (model, "encode")) as spent:
        model.token_ids(["a star"])
    assert spent == {"token_ids": 1.0, "encode": 0.0}
    assert "token_ids" not in vars(model)


def test_results_are_published_with_their_arms_and_printed_without(tmp_path, capsys):
    file = tmp_path / "deep" / "b.json"
    bench.publish({"benchmark": "b", "ratio": 2.0, "arms": {"x": {"cpu_seconds": 1}}}, file)
    assert json.loads(file.read_text())["arms"] == {"x": {"cpu_seconds": 1}}
    assert json.loads(capsys.readouterr().out) == {"benchmark": "b", "ratio": 2.0}
    bench.publish({"benchmark": "b"}, None)
    assert [p.name for p in file.parent.iterdir()] == ["b.json"]


def test_the_forms_of_a_closed_form_edit_are_one_edit(closed_form, tmp_path):
    file = tmp_path / "closed_form.json"
    closed_form.main(["--quick", "--out", str(file)])
    found = json.loads(file.read_text())
    arms = found["arms"]
    assert found["setting"]["quick"] and found["benchmark"] == "closed_form"
    # Single precision and an explicit inverse on one side, double precision on the other.
    assert arms["official"]["distance_to_ours"] < 1e-3
    for texts in ("1", "2"):
        assert arms["rece_vectorised"][texts]["distance_to_ours"] < 1e-2
        assert arms["rece_official"][texts]["distance_to_vectorised"] < 1e-2
    assert set(found["rece_speedup_over_official"]) == {"1 text", "2 texts"}
    assert set(found["peak_bytes_by_prompts"]) == {"40", "120"}
    # Sizes of a quick run say nothing about targets.
    assert found["rece_target_met"] is False and found["memory_flat"] is False


def test_memory_is_flat_and_targets_met_by_what_was_measured(closed_form):
    size = closed_form.FULL
    arms = {n: {"cpu_seconds": 1.0, "peak_over_base_bytes": 0, "edited_bytes": 0}
            for n in ("ours", "official", "vectorised", "whole_prompts")}  # fmt: skip
    arms |= {
        f"rece_{name}": {"1": {"cpu_seconds": s}, "10": {"cpu_seconds": 2 * s}}
        for name, s in (("ours", 1.0), ("official", 50.0), ("vectorised", 4.0))
    }
    arms |= {f"prompts_{n}": {"peak_over_base_bytes": 100} for n in size.prompts}
    found = closed_form.summary(size, arms, {})
    assert found["rece_target_met"] and found["memory_flat"]
    assert found["rece_speedup_over_vectorised"] == {"1 text": 4.0, "10 texts": 4.0}
    arms["rece_official"]["1"]["cpu_seconds"] = 49.0
    more = (size.prompts[-1] - size.prompts[0]) * 3 * size.rows * size.width * 4
    arms["prompts_10000"]["peak_over_base_bytes"] = 100 + more // 50
    found = closed_form.summary(size, arms, {})
    assert not found["rece_target_met"] and not found["memory_flat"]


def test_our_sparse_trainer_learns_what_the_plain_one_does(sparse_autoencoders, tmp_path):
    file = tmp_path / "sparse_autoencoders.json"
    sparse_autoencoders.main(["--quick", "--out", str(file)])
    found = json.loads(file.read_text())
    assert found["setting"]["quick"] and found["over_plain"] > 0
    ours, plain = found["quality"]["ours"], found["quality"]["plain"]
    # One update is the same in both, AuxK of dead units and the order of its parts included.
    assert ours["r2"] == pytest.approx(plain["r2"], abs=1e-4) and ours["l0"] == plain["l0"]
    assert found["at_equal_or_better_quality"]["plain"]
    assert sparse_autoencoders.arguments(["--quick"]).out is None
