"""CMMD stands beside the other distances where a CLIP gives embeddings, and is null with a reason where not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expunge import audit
from expunge.evidence import Evidence
from expunge.measure.distances import clip_distance

from .stubs import STAR, edit, triad


class Scorer:
    """A score that looks at colours; embeddings are what each corner of a picture looks like."""

    protocol, name = "clip-score/100-cosine/colours", "colours"

    def scored(self, outputs: Any, prompts: Any) -> tuple[np.ndarray, np.ndarray]:
        rows = np.asarray(outputs, np.float32)[:, ::5, ::5].reshape(len(outputs), -1) / 255
        return rows.mean(axis=1), rows

    def scores(self, outputs: Any, prompts: Any) -> np.ndarray:
        return self.scored(outputs, prompts)[0]


class Plain:
    """A scorer of a caller's own, which gives scores and nothing else."""

    protocol = "clip-score/100-cosine/plain"

    def scores(self, outputs: Any, prompts: Any) -> np.ndarray:
        return np.ones(len(outputs))


def run(clip: Any = None) -> Evidence:
    model, change, _ = triad()
    return audit(model, [change], STAR, attacks="none", n=8, kept_n=6, cache=None, clip=clip)


def test_cmmd_is_of_kept_outputs_to_the_originals() -> None:
    found = run(Scorer())
    assert found.models.original.cmmd_to_original is None
    assert found.reasons["models.original.cmmd_to_original"] == "this is the original itself"
    erased = found.models.erased
    assert erased.cmmd_to_original == pytest.approx(0, abs=1e-6)  # what is kept is drawn as before
    assert found.cmmd_to_original == erased.cmmd_to_original
    protocol = found.protocols["models.erased.cmmd_to_original"]
    assert protocol == "cmmd/gaussian-biased/features=colours/n=18"
    assert found.protocols["cmmd_to_original"] == protocol
    never = found.models.never.cmmd_to_original
    assert never is None or never >= 0


def test_a_model_that_draws_something_else_is_far_away() -> None:
    model, _, _ = triad()
    destroyed = edit(model, star=-1.0, heart=-1.0, cross=-1.0, moon=-1.0)
    found = audit(
        model, [destroyed], STAR, attacks="none", n=8, kept_n=6, cache=None, clip=Scorer()
    )
    assert found.models.erased.cmmd_to_original > 0.3


@pytest.mark.parametrize("clip", [None, Plain()])
def test_without_embeddings_it_is_null_and_says_why(clip: Any) -> None:
    found = run(clip)
    assert found.models.erased.cmmd_to_original is None
    assert "CLIP" in found.reasons["models.erased.cmmd_to_original"]
    assert (found.models.erased.clip_score is None) == (clip is None)


def test_evidence_of_before_there_was_a_cmmd_is_still_read(tmp_path: Path) -> None:
    data = json.loads(run().to_json())

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if "cmmd" not in k}
        return [without(v) for v in value] if isinstance(value, list) else value

    old = without(data)
    assert "cmmd" not in json.dumps(old)
    (tmp_path / "evidence.json").write_text(json.dumps(old))
    assert Evidence.load(tmp_path).models.erased.cmmd_to_original is None


def test_the_report_shows_it_where_it_was_measured(tmp_path: Path) -> None:
    page = run(Scorer()).report(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "CMMD to original" in page


def test_the_embedding_in_use_is_the_one_of_the_score() -> None:
    rows = np.random.default_rng(0).random((6, 4, 4, 3))
    made = Scorer().scored((rows * 255).astype(np.uint8), [None] * 6)[1]
    assert clip_distance(made, made, "colours").value == pytest.approx(0, abs=1e-9)
