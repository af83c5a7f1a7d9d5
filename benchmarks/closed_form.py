"""Closed-form edits of SD 1.5-sized text projections: ours against the published loops, and their growth.

    python benchmarks/closed_form.py            # about five minutes on two cores; writes JSON and a plot
    python benchmarks/closed_form.py --quick    # seconds; small, judges no target, writes only to --out

The matrices are SD 1.5's: 16 cross-attention layers, key and value each, width 768, random values.  Arms,
each in a process of its own so that the peak of memory is its own:

UCE's solve, 100 erased and 1,000 kept phrases, one row a phrase:

    ours         moments streamed once, one Cholesky in float64, thin factors, every matrix edited
    official     the published procedure: for every matrix, phrase by phrase, the values of all 32
                 matrices, outer products in float32, an explicit inverse.  One matrix is timed and
                 multiplied, because the whole takes minutes and every matrix costs nearly the same
    vectorised   the same for every matrix with all phrases in one product and the matrix's own values

Whole RECE (UCE and three epochs of deriving and erasing, all 77 rows of a text), for one text and for ten,
the empty text and one other kept:

    rece_ours        the eraser's own code: all solves, what it reports of every epoch, and the edit of every
                     matrix
    rece_official    the published procedure: in every solve, for every matrix, text by text, the values of
                     all 32 matrices, outer products of all rows in float32, and an explicit inverse; sums
                     over all layers in every derivation.  Of each solve one matrix is timed and multiplied.
                     Left out are the copies of all layers and the texts' encoding for every matrix
    rece_vectorised  the same with all rows in one product and the matrix's own values only

Memory:

    whole_prompts        100 erased and 1,000 kept texts with all their rows
    prompts_N            TRCE's first stage: N pairs by their end-of-text row, N kept texts with all 77 rows,
                         made while they are read.  Flat: from the fewest to the most prompts the peak grows by
                         at most 1 % of the bytes of their rows (a buffer of 1,024 rows fills on the way)

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _closed_form import (
    FULL,
    QUICK,
    RIDGE,
    OneMatrix,
    Size,
    Texts,
    looped,
    matrices,
    ours,
    phrases,
    rece_ours,
    rece_published,
    relative,
    uce_blocks,
    vectorised,
)

from expunge.core.closed_form import Solution
from expunge.core.token_policy import Pair, accumulate
from expunge.models.types import TextInput
from expunge.testing.bench import machine, publish, timed

ROOT = Path(__file__).resolve().parent.parent


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024


def rece_arm(size: Size, weights: list[torch.Tensor], name: str) -> dict[str, Any]:
    """Seconds of one form of RECE, by the number of erased texts."""
    found: dict[str, Any] = {}
    for count in size.texts:
        if name == "rece_ours":
            seconds, _ = timed(lambda n=count: rece_ours(size, weights, n), 3)
            found[str(count)] = {"cpu_seconds": seconds}
        elif name == "rece_vectorised":
            seconds, edited = timed(lambda n=count: rece_published(size, weights, n, vectorised), 1)
            mine = rece_ours(size, weights, count)
            far = max(relative(e, m, w) for e, m, w in zip(edited, mine, weights, strict=True))
            found[str(count)] = {"cpu_seconds": seconds, "distance_to_ours": far}
        else:
            solver = OneMatrix(min(4, len(weights) - 1))  # height 640, below the mean height of 780
            whole, _ = timed(lambda n=count, s=solver: rece_published(size, weights, n, s), 1)
            seconds = whole - solver.rest + (len(weights) - 1) * solver.seconds
            found[str(count)] = {
                "timed_matrices": 1, "matrices": len(weights), "cpu_seconds": seconds,
                "distance_to_vectorised": solver.off,
            }  # fmt: skip
    return found


def many_texts(count: int) -> tuple[list[Pair], list[str]]:
    """Pairs and kept texts."""
    pairs = [Pair(f"an unsafe text number {i}", f"a safe text {i}") for i in range(count)]
    return pairs, [f"caption {i} of a large set" for i in range(count)]


def prompts_arm(size: Size, pairs: Sequence[Pair], kept: Sequence[str]) -> dict[str, Any]:
    """Moments of many streamed texts: pairs by their end, kept texts with all rows."""
    text, count = TextInput(("layer",), size.width, Texts(size)), len(pairs)

    def work() -> Solution:
        moments = accumulate(
            text,
            pairs,
            kept,
            "eot_only",
            erase=1.0 / count,
            keep=1e-2 / count,
            kept_policy="all_rows",
        )
        assert (moments.erase_rows, moments.keep_rows) == (count, count * size.rows)
        return moments.solve(1e-3)

    seconds, _ = timed(work, 1)
    return {"prompts": count, "cpu_seconds": seconds}


def uce_arm(size: Size, weights: list[torch.Tensor], name: str) -> dict[str, Any]:
    """One form of UCE's solve."""
    whole = name == "whole_prompts"
    if name in ("ours", "whole_prompts"):
        rows = size.rows if whole else 1
        seconds, _ = timed(
            lambda: ours(size, weights, size.erased, size.kept, rows), 1 if whole else 5
        )
        return {"cpu_seconds": seconds}
    if name == "vectorised":
        seconds, _ = timed(lambda: vectorised(weights, uce_blocks(size), RIDGE), 2)
        return {"cpu_seconds": seconds}
    chosen = min(4, len(weights) - 1)  # as above: the scaling does not flatter us
    each, edited = timed(lambda: looped(weights, chosen, uce_blocks(size), RIDGE), 1)
    mine = ours(size, weights, size.erased, size.kept)
    return {
        "timed_matrices": 1, "matrices": len(weights), "cpu_seconds": each * len(weights),
        "distance_to_ours": relative(edited, mine[chosen], weights[chosen]),
    }  # fmt: skip


def arm(size: Size, name: str) -> Any:
    """Run one arm in this process."""
    if name == "growth":
        return growth(size)
    weights = matrices(size)
    torch.linalg.cholesky(torch.eye(size.width).double())  # libraries load their parts on first use
    texts = many_texts(int(name.removeprefix("prompts_")) if name.startswith("prompts_") else 0)
    base = peak()
    if name.startswith("rece_"):
        found = rece_arm(size, weights, name)
    elif name.startswith("prompts_"):
        found = prompts_arm(size, *texts)
    else:
        found = uce_arm(size, weights, name)
    found["peak_over_base_bytes"] = peak() - base
    found["edited_bytes"] = sum(w.numel() * 4 for w in weights)
    return found


def growth(size: Size) -> list[dict[str, float]]:
    """Seconds of moments, and of everything, against the number of erased phrases."""
    weights = matrices(size)
    ours(size, weights, 10, 0)
    found = []
    for count in size.growth:
        encoded, _ = timed(
            lambda n=count: [len(x) for s in (1, 2) for x in phrases(size, n, 1, s)], 2
        )
        whole, _ = timed(lambda n=count: ours(size, weights, n, 0), 1 if count > 1000 else 2)
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


def measured(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """All arms, each in a process of its own; a quick run stays in this one."""
    found: dict[str, Any] = {}
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    for name in names:
        if options.quick:
            found[name] = arm(QUICK, name)
        else:
            command = [sys.executable, __file__, "--arm", name, "--threads", str(options.threads)]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            found[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    return found


def summary(size: Size, found: dict[str, Any], setting: dict[str, Any]) -> dict[str, Any]:
    """The ratios of a run."""
    limit = found["ours"]["edited_bytes"] + 300 * 10**6
    peaks = [found[f"prompts_{n}"]["peak_over_base_bytes"] for n in size.prompts]
    added = (peaks[-1] - peaks[0]) / (size.prompts[-1] - size.prompts[0])
    share = added / (3 * size.rows * size.width * 4)  # a pair and a kept text, float32
    uce = {name: found[name]["cpu_seconds"] for name in ("ours", "official", "vectorised")}
    rece = {
        other: {
            f"{n} text{'s' * (n > 1)}": found[f"rece_{other}"][str(n)]["cpu_seconds"]
            / found["rece_ours"][str(n)]["cpu_seconds"]
            for n in size.texts
        }
        for other in ("official", "vectorised")
    }
    return {
        "benchmark": "closed_form",
        "setting": {
            "width": size.width, "matrices": 2 * len(size.heights), "erased": size.erased, "kept": size.kept,
            **setting,
        },
        "speedup_over_official": uce["official"] / uce["ours"],
        "speedup_over_vectorised": uce["vectorised"] / uce["ours"],
        "rece_speedup_over_official": rece["official"],
        "rece_speedup_over_vectorised": rece["vectorised"],
        "rece_target_met": size is FULL and min(rece["official"].values()) >= 50,
        "peak_within_limit": {
            name: found[name]["peak_over_base_bytes"] <= limit for name in ("ours", "whole_prompts")
        },
        "limit_bytes": limit,
        "peak_bytes_by_prompts": {str(n): p for n, p in zip(size.prompts, peaks, strict=True)},
        "peak_growth_over_bytes_of_rows": share,
        "memory_flat": size is FULL and share <= 0.01,
        "arms": found,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all arms and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", help="run one arm and print its numbers (used internally)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each arm")
    parser.add_argument("--quick", action="store_true", help="small matrices, in this process")
    parser.add_argument("--out", type=Path, help="where to write; default: the record in results/")
    options = parser.parse_args(arguments)
    size = QUICK if options.quick else FULL
    if not options.quick or options.arm:
        torch.set_num_threads(options.threads)
    if options.arm:
        print(json.dumps(arm(size, options.arm)))
        return
    names = [
        "ours",
        "vectorised",
        "official",
        "whole_prompts",
        "rece_ours",
        "rece_vectorised",
        "rece_official",
    ]
    names += [f"prompts_{n}" for n in size.prompts] + ["growth"]
    found = measured(options, names)
    result = summary(size, found, {"quick": options.quick, **machine(options.threads)})
    record = ROOT / "results" / "benchmarks" / "closed_form.json"
    publish(result, options.out or (None if options.quick else record))
    if not options.quick:
        plot(found["growth"], ROOT / "docs" / "closed-form-growth.png")


if __name__ == "__main__":
    main()
