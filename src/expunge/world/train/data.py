"""Rendered pictures with captions and labels, kept on disk because several recipes read the same ones.

`python -m expunge.world.train.data --setting full --count 40000` fills the cache folder; recipes call `pool`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from expunge.world.train.common import DEFAULT_CACHE

CHUNK = 500


@dataclass(frozen=True)
class Pool:
    """Pictures (n, 64, 64, 3) uint8, their captions, and integer labels by name (-1: not applicable)."""

    images: np.ndarray
    captions: list[str]
    labels: dict[str, np.ndarray]
    folder: Path

    def __len__(self) -> int:
        return len(self.captions)


def pool_folder(cache: Path, setting: str, start: int, count: int) -> Path:
    """Where the pictures of these seeds stand."""
    return Path(cache) / "pools" / f"{setting}-{start}-{count}"


def pool(cache: Path, setting: str, count: int, start: int = 0) -> Pool:
    """The pictures of seeds start .. start + count, rendered on first use."""
    folder = pool_folder(cache, setting, start, count)
    if not folder.exists():
        _render(folder, setting, count, start)
    labels = {
        path.stem[6:]: np.load(path, allow_pickle=False)
        for path in sorted(folder.glob("label-*.npy"))
    }
    images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
    return Pool(images, json.loads((folder / "captions.json").read_text("utf-8")), labels, folder)


def _render(folder: Path, setting: str, count: int, start: int) -> None:
    from expunge.world import scenes

    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    images = np.lib.format.open_memmap(temporary / "images.npy", "w+", np.uint8, (count, 64, 64, 3))
    captions: list[str] = []
    labels: dict[str, list[np.ndarray]] = {}
    began = time.monotonic()
    for first in range(0, count, CHUNK):
        seeds = range(start + first, start + min(first + CHUNK, count))
        pictures, texts, made = scenes.batch(seeds, scenes.SETTINGS[setting])
        images[first : first + len(texts)] = pictures
        captions += texts
        for key, value in scenes.targets(made).items():
            labels.setdefault(key, []).append(np.asarray(value))
    images.flush()
    (temporary / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    for key, parts in labels.items():
        np.save(temporary / f"label-{key}.npy", np.concatenate(parts), allow_pickle=False)
    if folder.exists():  # somebody else was faster
        shutil.rmtree(temporary)
    else:
        os.replace(temporary, folder)
    print(
        f"[data] {setting}: {count} pictures, {count / (time.monotonic() - began):.0f} a second",
        flush=True,
    )


def main() -> None:
    """Fill the cache from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", default="full")
    parser.add_argument("--count", type=int, default=40_000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path(DEFAULT_CACHE))
    options = parser.parse_args()
    pool(options.cache, options.setting, options.count, options.start)


if __name__ == "__main__":
    main()
