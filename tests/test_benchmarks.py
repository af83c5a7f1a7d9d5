"""The programs in ``benchmarks/``: the clocks they share, and a small run of one of them."""

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


@pytest.fixture(scope="module")
def sampling() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("sampling", ROOT / "benchmarks" / "sampling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # dataclasses look their module up
        patch.setitem(sys.modules, "sampling", module)
        spec.loader.exec_module(module)
        yield module


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


def test_a_missed_target_is_called_missed(sampling):
    assert sampling.verdict("whole", 0.899).endswith("target 90%: missed")
    assert sampling.verdict("whole", 0.9).endswith("target 90%: met")


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
