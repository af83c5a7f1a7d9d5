"""Activations from memory and from shards on disk: each row once an epoch, any batch first, damage noticed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.core.sparse_autoencoder.stream import ActivationCache, Rows, as_activations
from expunge.errors import NonFiniteError, RunError, SettingError, WrongShape

X = torch.arange(46.0).reshape(23, 2)


def cache(folder: Path, **more: Any) -> ActivationCache:
    return ActivationCache.write(
        folder, [X[:9].reshape(3, 3, 2), X[9:]], shard_rows=5, mix=2, **more
    )


def taken(
    source: Any, count: int, size: int = 4, seed: int = 0, first: int = 0
) -> list[torch.Tensor]:
    return list(itertools.islice(source.batches(size, seed, first), count))


@pytest.fixture(params=["rows", "cache"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return Rows(X) if request.param == "rows" else cache(tmp_path / "cache")


def test_every_row_once_an_epoch_in_another_order(source: Any) -> None:
    rows = torch.cat(taken(source, 23))  # 4 epochs of 23 rows
    epochs = rows.split(23)
    for epoch in epochs:
        assert torch.equal(epoch[:, 0].sort().values, X[:, 0])
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(torch.cat(taken(source, 5, seed=1)), rows[:20])
    assert torch.equal(torch.cat(list(source.blocks())).float(), X)


def test_a_stream_can_begin_at_any_batch(source: Any) -> None:
    whole = taken(source, 14)
    for first in range(13):
        assert all(
            torch.equal(a, b)
            for a, b in zip(taken(source, 14 - first, first=first), whole[first:], strict=True)
        )
    big = taken(source, 1, size=60)[0]  # a batch of more than two epochs
    assert big.shape == (60, 2) and torch.equal(big[:4], whole[0])


def test_a_cache_is_float16_and_is_not_written_twice(tmp_path: Path) -> None:
    made = cache(tmp_path, source="layer 3")
    assert made.shards == [5, 5, 5, 5, 3] and (made.rows, made.width) == (23, 2)
    assert next(made.blocks()).dtype == torch.float16

    def never() -> Any:
        raise AssertionError("the stream was read again")
        yield

    again = ActivationCache.write(tmp_path, never(), source="layer 3", mix=2)
    assert again.digest == made.digest and torch.equal(taken(again, 1)[0], taken(made, 1)[0])
    with pytest.raises(
        RunError, match="holds activations of 'layer 3', wanted are those of 'layer 4'"
    ):
        ActivationCache.write(tmp_path, [X], source="layer 4")


def test_a_killed_cache_is_written_again(tmp_path: Path) -> None:
    def stops() -> Any:
        yield X[:9]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ActivationCache.write(tmp_path, stops(), shard_rows=5)
    assert [p.name for p in tmp_path.iterdir()] == ["00000.safetensors"]
    with pytest.raises(RunError, match="no finished cache"):
        ActivationCache(tmp_path)
    assert cache(tmp_path).rows == 23


def test_a_limit_ends_the_reading(tmp_path: Path) -> None:
    def endless() -> Any:
        for _ in range(4):
            yield X[:9]
        raise AssertionError("read past the limit")

    made = ActivationCache.write(tmp_path, endless(), limit=20, shard_rows=8, dtype="float32")
    assert made.rows == 20 and made.shards == [8, 8, 4]


def test_what_float16_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="stored as float16"):
        ActivationCache.write(tmp_path, [X * 1e5])
    assert ActivationCache.write(tmp_path, [X * 1e5], dtype="bfloat16").rows == 23


def test_damage_is_noticed(tmp_path: Path) -> None:
    made = cache(tmp_path)
    (tmp_path / "00001.safetensors").write_bytes(b"nothing")
    with pytest.raises(RunError, match="is damaged"):
        list(made.blocks())
    (tmp_path / "00001.safetensors").write_bytes((tmp_path / "00004.safetensors").read_bytes())
    with pytest.raises(RunError, match=r"holds \(3, 2\) numbers, the index says \(5, 2\)"):
        list(made.blocks())
    index = json.loads((tmp_path / "cache.json").read_text())
    (tmp_path / "cache.json").write_text(json.dumps({"shards": index["shards"]}))
    with pytest.raises(RunError, match=r"cache\.json is damaged"):
        ActivationCache(tmp_path)


def test_streams_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for stream, error in (([], SettingError), ([X, X[:, :1]], (WrongShape, RuntimeError))):
        with pytest.raises(error):
            ActivationCache.write(tmp_path, stream, shard_rows=23)
    with pytest.raises(SettingError, match="float16, bfloat16, float32; got 'int8'"):
        ActivationCache.write(tmp_path, [X], dtype="int8")


def test_what_activations_may_be(tmp_path: Path) -> None:
    made = cache(tmp_path)
    assert as_activations(made) is made
    assert as_activations(X.reshape(23, 1, 2)).rows == as_activations(X.numpy()).rows == 23
    assert as_activations([X[:3], X[3:]]).rows == 23
    assert as_activations(X).digest != as_activations(X + 1).digest
