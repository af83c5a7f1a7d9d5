"""Attacks kept between processes come back as they were, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from expunge.core import kept_attempts
from expunge.core.sampling import OutputCache
from expunge.method import Attempt, Attempts, Prompt


def attempts(outputs: object) -> Attempts:
    prompt = Prompt("a star", 3, "star", {"colour": "red"}, 2.0)
    details = {
        "curve": {"2": True},
        "loss": np.float32(0.5),
        "ids": torch.tensor([1, 2]),
        "none": None,
    }
    item = Attempt(prompt, False, True, 0.75, "un\u00e9 star", details)
    return Attempts(
        "a",
        2,
        {"steps": 3, "layers": [1, 2]},
        True,
        "world",
        "judge",
        0.5,
        7,
        (item,),
        outputs,
        {"d": 5},
    )


def test_pictures_and_texts_come_back_in_another_process(tmp_path: Path) -> None:
    for key, outputs in (
        ("p", np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)),
        ("t", ["an answer"]),
    ):
        made = attempts(outputs)
        kept_attempts.keep(OutputCache(tmp_path), key, made)
        found = kept_attempts.recall(OutputCache(tmp_path), key)
        assert found is not None and np.array_equal(found.outputs, outputs)
        assert (found.attack, found.version, found.settings, found.cost) == (
            "a",
            2,
            made.settings,
            {"d": 5},
        )
        (item,) = found.items
        assert item.prompt == made.items[0].prompt and (item.hit, item.pre_hit, item.score) == (
            True,
            False,
            0.75,
        )
        assert item.details == {"curve": {"2": True}, "loss": 0.5, "ids": [1, 2], "none": None}


def test_another_key_finds_nothing_and_memory_alone_serves_too(tmp_path: Path) -> None:
    cache = OutputCache()
    kept_attempts.keep(cache, "one", attempts(["x"]))
    assert (
        kept_attempts.recall(cache, "one") is not None
        and kept_attempts.recall(cache, "two") is None
    )
    kept_attempts.keep(OutputCache(tmp_path), "one", attempts(["x"]))
    (file,) = (tmp_path / "attacks").iterdir()
    file.rename(kept_attempts._file(tmp_path, "two"))  # a file under a name that is not its own
    assert kept_attempts.recall(OutputCache(tmp_path), "two") is None
    for content in (b"", b"\x08\0\0\0\0\0\0\0{}      ", b"not safetensors at all"):
        kept_attempts._file(tmp_path, "one").write_bytes(content)
        assert kept_attempts.recall(OutputCache(tmp_path), "one") is None


def test_a_folder_is_lent_to_a_cache_for_a_while(tmp_path: Path) -> None:
    cache = OutputCache()
    with cache.also_in(None):
        cache.put("ab1", "text")
    with cache.also_in(tmp_path):
        cache.put("ab2", "text")
    assert cache.folder is None and [p.name for p in tmp_path.rglob("*.npz")] == ["ab2.npz"]
