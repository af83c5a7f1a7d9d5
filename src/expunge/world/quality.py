"""Measures how good the world's models are, against the targets they were made for.

    python -m expunge.world.quality                        # everything, about 40 minutes on one core
    python -m expunge.world.quality --only clip oracle     # some parts; the others keep their numbers

Every rate is written with its number of pictures and a 95 % Wilson interval to `quality.json`, together
with its target and whether that was reached. Seeds come from the test range, templates are held out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import captions, models, scenes
from . import vocabulary as v
from .oracle import FLAGS, HEADS, Oracle
from .quality_table import GUIDANCE, STEPS, TARGETS, THRESHOLD, described, misses, rate

FILE = Path(__file__).with_name("quality.json")
PARTS = ("oracle", "reconstructions", "clip", "padding", "generated", "never")


def recognised(pictures: np.ndarray, judge: Oracle) -> dict[str, Tensor]:
    """The oracle's probabilities, with everything set to zero where the picture is unrecognisable."""
    found = judge(pictures)
    lost = judge.unrecognisable(found) > THRESHOLD
    return {name: torch.where(lost[:, None], 0.0, rows) for name, rows in found.items()}


def attribute_hits(
    pictures: np.ndarray, made: Sequence[scenes.Scene], judge: Oracle
) -> dict[str, list[bool]]:
    """For each attribute, whether the oracle reads it right off each picture where it applies."""
    found, truth = judge(pictures), scenes.targets(list(made))
    hits: dict[str, list[bool]] = {}
    for name in HEADS:
        applies = truth[name] >= 0
        right = found[name][:, : len(HEADS[name])].argmax(-1).numpy() == truth[name]
        hits[name] = list(right[applies])
    flags = found["flags"].numpy() > THRESHOLD
    present = flags[:, : len(v.OBJECTS)] == (truth["presence"] > 0.5)
    hits["presence"] = list(present.reshape(-1))
    hits["hazard"] = list(flags[:, FLAGS.index(v.HAZARD)] == (truth["hazard"] > 0))
    for mark in v.MARKS:
        hits[mark] = list(flags[:, FLAGS.index(mark)] == (truth[f"stamp_{mark}"] > 0))
    hits["recognisable"] = list(~flags[:, FLAGS.index("unrecognisable")])
    return hits


def held_out(
    count: int, setting: str = "clean-world"
) -> tuple[np.ndarray, list[str], list[scenes.Scene]]:
    """Pictures of test seeds."""
    seeds = range(v.TEST_SEEDS.start, v.TEST_SEEDS.start + count)
    return scenes.batch(seeds, scenes.SETTINGS[setting])


def measure_oracle(n: int) -> dict[str, Any]:
    """The oracle on held-out rendered pictures, and how often it sees a reference concept that is not there."""
    judge = models.oracle()
    pictures, _, made = held_out(n)
    found = {
        name: rate(hits, TARGETS["oracle"])
        for name, hits in attribute_hits(pictures, made, judge).items()
    }
    return {"held_out": found, "false_positives": false_positives(n, judge)}


def false_positives(n: int, judge: Oracle) -> dict[str, Any]:
    """How often the oracle reports each reference concept on rendered pictures without any of them."""
    pictures, _, _ = held_out(n, "concept-free")
    seen = recognised(pictures, judge)
    return {name: rate((judge.confidence(name, seen) > THRESHOLD).numpy()) for name in v.REFERENCE}


def measure_reconstructions(n: int) -> dict[str, Any]:
    """The oracle on what the autoencoder gives back."""
    judge, vae = models.oracle(), models.autoencoder()
    pictures, _, made = held_out(n)
    parts = []
    with torch.no_grad():
        for first in range(0, n, 100):
            pixels = (
                torch.from_numpy(pictures[first : first + 100]).permute(0, 3, 1, 2).float() / 127.5
                - 1
            )
            parts.append(vae.decode(vae.encode(pixels).latent_dist.mode()).sample)
    copies = as_pictures(torch.cat(parts))
    error = np.abs(copies.astype(np.float32) - pictures).mean() / 255
    hits = attribute_hits(copies, made, judge)
    return {name: rate(h, TARGETS["reconstructions"]) for name, h in hits.items()} | {
        "error": round(float(error), 4)
    }


def as_pictures(decoded: Tensor) -> np.ndarray:
    """Decoded pictures in -1..1 as uint8 (n, 64, 64, 3)."""
    scaled = (decoded / 2 + 0.5).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def measure_clip(groups: int) -> dict[str, Any]:
    """Share of pictures whose own caption wins among 64 different captions, and the other way."""
    model, words = models.clip()
    hits: dict[str, list[bool]] = {"picture_to_text": [], "text_to_picture": []}
    for group in range(groups):
        start = v.TEST_SEEDS.start + 50_000 + 400 * group
        pictures, texts, _ = scenes.batch(range(start, start + 160), scenes.SETTINGS["full"])
        rows = [texts.index(text) for text in dict.fromkeys(texts)][:64]
        ids = words(
            [texts[i] for i in rows], padding="max_length", return_tensors="pt", truncation=True
        ).input_ids
        pixels = torch.from_numpy(pictures[rows]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            image = model.get_image_features(pixel_values=pixels).pooler_output
            text = model.get_text_features(input_ids=ids).pooler_output
        scores = (
            torch.nn.functional.normalize(image, dim=-1)
            @ torch.nn.functional.normalize(text, dim=-1).T
        )
        own = torch.arange(len(rows))
        hits["picture_to_text"] += (scores.argmax(1) == own).tolist()
        hits["text_to_picture"] += (scores.argmax(0) == own).tolist()
    both = rate(hits["picture_to_text"] + hits["text_to_picture"], TARGETS["clip.retrieval"])
    return {"retrieval": both, "among": 64} | {name: rate(h) for name, h in hits.items()}


def measure_padding(n: int) -> dict[str, Any]:
    """How well a linear probe reads the object off single positions of the text tower's output."""
    tower, words = models.text_encoder(), models.tokenizer()
    _, _, made = held_out(n * 3, "full")
    made = [scene for scene in made if scene.kind == "object" and not scene.negated][:n]
    labels = np.array([v.OBJECTS.index(scene.things[0].object) for scene in made])
    got = words(
        [scene.caption for scene in made],
        padding="max_length",
        return_tensors="pt",
        truncation=True,
    )
    with torch.no_grad():
        hidden = torch.cat(
            [tower(input_ids=ids).last_hidden_state for ids in got.input_ids.split(200)]
        )
    end = got.attention_mask.sum(1) - 1
    rows = torch.arange(len(made))
    last = torch.full_like(end, hidden.shape[1] - 1)
    places = {
        "start": torch.zeros_like(end),
        "end_of_text": end,
        "first_padding": (end + 1).minimum(last),
        "last": last,
    }
    return {
        name: rate(probe(hidden[rows, place].numpy(), labels)) for name, place in places.items()
    }


def probe(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Hits of a ridge classifier on the second half after fitting the first."""
    half = len(labels) // 2
    features = (features - features[:half].mean(0)) / (features[:half].std(0) + 1e-6)
    features = np.concatenate([features, np.ones((len(features), 1))], 1)
    wanted = np.eye(labels.max() + 1)[labels[:half]]
    gram = features[:half].T @ features[:half] + 10.0 * np.eye(features.shape[1])
    weights = np.linalg.solve(gram, features[:half].T @ wanted)
    return (features[half:] @ weights).argmax(1) == labels[half:]


@torch.no_grad()
def generate(
    pipe: Any, prompts: Sequence[captions.Prompt], batch: int = 32, steps: int = STEPS
) -> np.ndarray:
    """A picture of each prompt with the stock pipeline; the noise is the prompt's own seed."""
    parts = []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        noise = torch.stack(
            [torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(p.seed)) for p in some]
        )
        out = pipe([p.text for p in some], latents=noise, guidance_scale=GUIDANCE, num_inference_steps=steps,
                   output_type="pt", height=64, width=64)  # fmt: skip
        parts.append(as_pictures(out.images * 2 - 1))
        print(f"  {first + len(some)}/{len(prompts)} pictures", flush=True)
    return np.concatenate(parts)


def prompt_sets(n: int) -> dict[str, list[captions.Prompt]]:
    """About `n` held-out prompts, by kind of concept, every concept of a kind equally often."""
    shares = {"object": 0.40, "style": 0.15, "identity": 0.30, "unsafe": 0.15}
    found: dict[str, list[captions.Prompt]] = {}
    for kind, share in shares.items():
        names = v.concept_names(kind)
        each = max(1, round(n * share / len(names)))
        found[kind] = [
            p
            for i, name in enumerate(names)
            for p in captions.prompts_for(name, each, seed=1000 + i)
        ]
    return found


def judged(
    prompts: Sequence[captions.Prompt], seen: dict[str, Tensor]
) -> dict[str, list[tuple[str, bool]]]:
    """For each attribute that prompts determine: (wanted value, whether the picture shows it), per prompt."""
    found: dict[str, list[tuple[str, bool]]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        for name, wanted in prompt.labels.items():
            if name == "hazard":
                hit = bool(seen["flags"][row, FLAGS.index(v.HAZARD)] > THRESHOLD)
                found[name].append((v.HAZARD, hit))
            elif name in HEADS:
                best = int(seen[name][row].argmax())
                found[name].append(
                    (wanted, bool(seen[name][row, best] > 0) and HEADS[name][best] == wanted)
                )
    return found


def measure_generated(variant: str, n: int) -> dict[str, Any]:
    """Pictures of held-out prompts, read by the oracle: every attribute, without and with reference concepts."""
    judge, pipe = models.oracle(), quiet(variant)
    prompts = [p for group in prompt_sets(n).values() for p in group]
    pictures = generate(pipe, prompts)
    probabilities = judge(pictures)
    hits = judged(prompts, recognised(pictures, judge))
    # The never model was not taught the reference concepts: its targets are for the others.
    aims = {name: TARGETS.get(f"generated.{name}") for name in hits}
    taught = variant != "never"
    rates = {
        name: rate([h for _, h in rows], aims[name] if taught else None)
        for name, rows in hits.items()
    }
    others = {
        name: [h for wanted, h in rows if wanted not in v.REFERENCE] for name, rows in hits.items()
    }
    rest = {
        name: rate(found, None if taught or not found else aims[name])
        for name, found in others.items()
    }
    per: dict[str, list[bool]] = defaultdict(list)
    for rows in hits.values():
        for wanted, hit in rows:
            per[wanted].append(hit)
    lost = (judge.unrecognisable(probabilities) > THRESHOLD).numpy()
    return {
        "rates": rates,
        "without_reference_concepts": rest,
        "by_value": {name: rate(values) for name, values in sorted(per.items())},
        "unrecognisable": rate(lost),
        "pictures": len(prompts),
    }


def quiet(variant: str) -> Any:
    """The pipeline without its progress bar, fast memory layout."""
    pipe = models.pipeline(variant)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.to(memory_format=torch.channels_last)
    return pipe


def reference_rates(variant: str, n: int) -> dict[str, np.ndarray]:
    """For each reference concept, whether the pictures asked for it show it."""
    judge, pipe = models.oracle(), quiet(variant)
    found = {}
    for index, name in enumerate(v.REFERENCE):
        prompts = captions.prompts_for(name, n, seed=2000 + index)
        seen = recognised(generate(pipe, prompts), judge)
        found[name] = (judge.confidence(name, seen) > THRESHOLD).numpy()
    return found


def measure_never(n: int, generated: dict[str, Any], positives: dict[str, Any]) -> dict[str, Any]:
    """Never against original: reference concepts, and the mean over everything that both were taught."""
    shown = {variant: reference_rates(variant, n) for variant in ("original", "never")}
    concepts: dict[str, Any] = {}
    for name in v.REFERENCE:
        chance = positives[name]["value"]
        never = rate(shown["never"][name])
        met = never["value"] <= chance + TARGETS["never.margin"]
        concepts[name] = {
            "original": rate(shown["original"][name]),
            "never": never,
            "false_positives": chance,
            "met": met,
        }
    means = {}
    for variant in ("original", "never"):
        rest = generated[variant]["without_reference_concepts"]
        means[variant] = float(
            np.mean([rest[name]["value"] for name in ("object", "colour", "style", "person")])
        )
    gap = abs(means["original"] - means["never"])
    kept = {name: round(value, 4) for name, value in means.items()}
    return {
        "concepts": concepts,
        "mean_of_rest": kept
        | {"gap": round(gap, 4), "target": TARGETS["never.mean_gap"], "met": gap <= 0.03},
    }


def run(parts: Sequence[str], n: int, file: Path = FILE) -> dict[str, Any]:
    """Measure the parts, keep what the table holds of the others, write after each."""
    table: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}

    def variants(count: int) -> dict[str, Any]:
        made = [name for name in models.VARIANTS if (models.weights() / "unet" / name).is_dir()]
        return {name: measure_generated(name, count) for name in made}

    work: dict[str, Callable[[], Any]] = {
        "oracle": lambda: measure_oracle(max(n, 1000)),
        "reconstructions": lambda: measure_reconstructions(max(n, 1000)),
        "clip": lambda: measure_clip(16),
        "padding": lambda: measure_padding(2000),
        "generated": lambda: variants(n),
        "never": lambda: measure_never(
            max(50, n // 5), table["generated"], table["oracle"]["false_positives"]
        ),
    }
    for part in sorted(parts, key=PARTS.index):
        print(part, flush=True)
        table[part] = work[part]()
        table["made"] = described()
        table.pop("missed", None)
        table["missed"] = misses(table)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)
    return table


def main() -> None:
    """Measure from the command line and show what is below its target."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS)
    )
    parser.add_argument("--n", type=int, default=1000, help="pictures of each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = run(options.only, options.n, options.out)
    for name, value in table["missed"].items():
        print(f"below target: {name} = {value}")


if __name__ == "__main__":
    main()
