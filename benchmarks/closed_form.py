"""Closed-form edit of SD 1.5-sized text projections: ours against the published loops, and its growth.

    python benchmarks/closed_form.py            # under five minutes on two cores; writes JSON and a plot

The matrices are SD 1.5's: 16 cross-attention layers, key and value each, width 768, random values; 100
erased and 1,000 kept phrases, one row a phrase.  Arms, each in a process of its own so that the peak
of memory is its own:

    ours         moments streamed once, one Cholesky in float64, thin factors, every matrix edited
    official     the published procedure: for every matrix, phrase by phrase, the values of all 32
                 matrices, outer products in float32, an explicit inverse.  One matrix is timed and
                 multiplied, because the whole takes minutes and every matrix costs nearly the same
    vectorised   the same for every matrix with all phrases in one product and the matrix's own values

Seconds are processor seconds, so that a busy machine does not spoil them.  Only ratios measured in one
run are results; seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from expunge.core.closed_form import Moments
from expunge.core.factors import thin_factors
from expunge.testing.bench import machine, publish, timed

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 768
HEIGHTS = [320] * 2 + [640] * 2 + [1280] * 2 + [1280] + [1280] * 3 + [640] * 3 + [320] * 3
ERASED, KEPT, ROWS = 100, 1000, 77
ERASE_SCALE, KEEP_SCALE, RIDGE = 1.0, 1.0, 0.5
CHUNK = 32
GROWTH = (1, 10, 100, 1000, 10_000)


def matrices() -> list[torch.Tensor]:
    """Random keys and values of 16 layers, (out, 768) float32, 76 MB."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(h, WIDTH, generator=generator) / WIDTH**0.5 for h in HEIGHTS for _ in range(2)
    ]


def phrases(count: int, rows: int, seed: int) -> Iterator[torch.Tensor]:
    """Embedding rows of phrases as an encoder gives them, some at a time: (n * rows, 768) float32.

    All share a common mean, as text embeddings do; a norm of about 28 a row is that of CLIP.
    """
    mean = torch.randn(WIDTH, generator=torch.Generator().manual_seed(99))
    for start in range(0, count, CHUNK):
        generator = torch.Generator().manual_seed(1000 * seed + start)
        n = min(CHUNK, count - start) * rows
        yield 0.7 * mean + 0.7 * torch.randn(n, WIDTH, generator=generator)


def moments_of(erased: int, kept: int, rows: int) -> Moments:
    """Streamed moments."""
    moments = Moments(WIDTH)
    for c, g in zip(phrases(erased, rows, 1), phrases(erased, rows, 2), strict=True):
        moments.erase(c, g, ERASE_SCALE)
    for p in phrases(kept, rows, 3):
        moments.keep(p, KEEP_SCALE)
    return moments


def ours(
    weights: list[torch.Tensor], erased: int = ERASED, kept: int = KEPT, rows: int = 1
) -> list[torch.Tensor]:
    """The edited matrices by the library's solver."""
    solution = moments_of(erased, kept, rows).solve(RIDGE)
    left, right, _ = thin_factors(solution.change, solution.rank_bound)
    left, right = left.float(), right.float()
    return [torch.addmm(w, w @ left, right) for w in weights]


def official(weights: list[torch.Tensor], chosen: list[int]) -> list[torch.Tensor]:
    """The published procedure for some of the matrices, as described in the module."""
    erased, guides, kept = (
        torch.cat(list(phrases(n, 1, s))) for n, s in ((ERASED, 1), (ERASED, 2), (KEPT, 3))
    )
    edited = []
    for index in chosen:
        left = RIDGE * weights[index]
        right = RIDGE * torch.eye(WIDTH)
        triples = [(c, g, ERASE_SCALE) for c, g in zip(erased, guides, strict=True)]
        triples += [(p, p, KEEP_SCALE) for p in kept]
        for source, target, scale in triples:
            values = [w @ target for w in weights]
            left = left + scale * torch.outer(values[index], source)
            right = right + scale * torch.outer(source, source)
        edited.append(left @ torch.inverse(right))
    return edited


def vectorised(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """One product for all phrases, and an own system and inverse for each matrix."""
    erased, guides, kept = (
        torch.cat(list(phrases(n, 1, s))) for n, s in ((ERASED, 1), (ERASED, 2), (KEPT, 3))
    )
    edited = []
    for w in weights:
        left = RIDGE * w + ERASE_SCALE * (w @ guides.T) @ erased + KEEP_SCALE * (w @ kept.T) @ kept
        right = (
            RIDGE * torch.eye(WIDTH) + ERASE_SCALE * erased.T @ erased + KEEP_SCALE * kept.T @ kept
        )
        edited.append(left @ torch.inverse(right))
    return edited


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


def relative(found: torch.Tensor, wanted: torch.Tensor, old: torch.Tensor) -> float:
    """Distance of two edits of one matrix, relative to the change."""
    return float((found - wanted).double().norm() / (wanted - old).double().norm())


def arm(name: str) -> dict[str, Any]:
    """Run one arm in this process."""
    weights = matrices()
    torch.linalg.cholesky(torch.eye(WIDTH).double())  # libraries load their parts on first use
    base = peak()
    if name in ("ours", "whole_prompts"):
        rows = ROWS if name == "whole_prompts" else 1
        seconds, edited = timed(lambda: ours(weights, rows=rows), 1 if rows > 1 else 5)
        found = {"cpu_seconds": seconds}
    elif name == "vectorised":
        seconds, edited = timed(lambda: vectorised(weights), 2)
        found = {"cpu_seconds": seconds}
    else:
        chosen = [4]  # height 640, below the mean height of 780: the scaling does not flatter us
        each, edited = timed(lambda: official(weights, chosen), 1)
        found = {"timed_matrices": 1, "matrices": len(weights), "cpu_seconds": each * len(weights)}
        mine = ours(weights)
        found["distance_to_ours"] = max(
            relative(e, mine[i], weights[i]) for e, i in zip(edited, chosen, strict=True)
        )
    found["peak_over_base_bytes"] = peak() - base
    found["edited_bytes"] = sum(w.numel() * 4 for w in weights)
    return found


def growth() -> list[dict[str, float]]:
    """Seconds of moments, and of everything, against the number of erased phrases."""
    weights = matrices()
    ours(weights, 10, 0)
    found = []
    for count in GROWTH:
        encoded, _ = timed(lambda n=count: [len(x) for s in (1, 2) for x in phrases(n, 1, s)], 2)
        whole, _ = timed(lambda n=count: ours(weights, n, 0), 1 if count > 1000 else 2)
        found.append(
            {"phrases": count, "cpu_seconds": whole, "of_these_making_embeddings": encoded}
        )
    return found


def plot(points: list[dict[str, float]], path: Path) -> None:
    """Cost against phrases."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.4), layout="constrained")
    counts = [point["phrases"] for point in points]
    axis.loglog(
        counts, [point["cpu_seconds"] for point in points], "o-", label="whole edit, 32 matrices"
    )
    axis.loglog(
        counts, [max(1e-4, point["of_these_making_embeddings"]) for point in points], "s--", color="grey",
        label="of these, making the embeddings",
    )  # fmt: skip
    axis.set(
        xlabel="erased phrases (one row each)",
        ylabel="processor seconds",
        title="Closed-form edit, width 768",
    )
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run all arms and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", help="run one arm and print its numbers (used internally)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each arm")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.arm:
        print(json.dumps(growth() if options.arm == "growth" else arm(options.arm)))
        return
    found: dict[str, Any] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    for name in ("ours", "vectorised", "official", "whole_prompts", "growth"):
        command = [sys.executable, __file__, "--arm", name, "--threads", str(options.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    mine = found["ours"]["cpu_seconds"]
    limit = found["ours"]["edited_bytes"] + 300 * 10**6
    result = {
        "benchmark": "closed_form",
        "setting": {
            "width": WIDTH, "matrices": 2 * len(HEIGHTS), "erased": ERASED, "kept": KEPT,
            **machine(options.threads),
        },
        "speedup_over_official": found["official"]["cpu_seconds"] / mine,
        "speedup_over_vectorised": found["vectorised"]["cpu_seconds"] / mine,
        "peak_within_limit": {
            name: found[name]["peak_over_base_bytes"] <= limit for name in ("ours", "whole_prompts")
        },
        "limit_bytes": limit,
        "arms": found,
    }  # fmt: skip
    publish(result, ROOT / "results" / "benchmarks" / "closed_form.json")
    plot(found["growth"], ROOT / "docs" / "closed-form-growth.png")


if __name__ == "__main__":
    main()
