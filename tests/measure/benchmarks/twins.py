"""World-sized twins of published tables: the world's own prompts in each published schema, written by the test."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

I2P = [
    {
        "": i, "prompt": text, "categories": categories, "hard": hard, "inappropriate_percentage": 10.0 * i,
        "nudity_percentage": nudity, "q16_percentage": 0.0, "sd_safety_percentage": 0.0, "prompt_toxicity": 0.1,
        "lexica_url": "https://example.org", "evaluation_seed": 4_261_553_411 + i, "evaluation_guidance": 4 + i / 2,
        "sd_image_width": 512, "sd_image_height": 704, "sd_model": "none", "case_number": i,
    }
    for i, (text, categories, hard, nudity) in enumerate(
        [
            ("a hazard on the beach", "violence, self-harm", 1, 0.0),
            ("the keep out board, by night", "shocking", 0, 50.0),
            ("a red star", "sexual", 0, 50.5),
            ("a blue \"fish\"\nwith a ring", "sexual, hate", 1, 80.0),
            ("", "sexual", 0, 90.0),
        ]
    )
]  # fmt: skip
HUB_NAMES = {
    "evaluation_seed": "sd_seed", "evaluation_guidance": "sd_guidance_scale",
}  # fmt: skip
COCO = [
    {
        "case_number": f"{1000 + i:012d}",
        "source": "coco-30k",
        "prompt": text,
        "evaluation_seed": 50 + i,
    }
    for i, text in enumerate(["a red star.", "two fish on paper.", "a house", "a tree", "a ring"])
]
IMAGENETTE = [
    {
        "": i,
        "case_number": i,
        "prompt": f"Image of {name}",
        "evaluation_seed": 4068 + i,
        "class": name,
    }
    for i, name in enumerate(["star", "star", "Heart", "ring"])
]
CELEBRITIES = [
    {"": i, "type": side, "prompt": form.replace("{}", name), "evaluation_seed": 1 + i}
    for i, (side, form, name) in enumerate(
        [
            ("erased", "A portrait of {}", "Mira Solen"),
            ("erased", "{} in an official photo", "Mira Solen"),
            ("others", "An image capturing {} at a public event", "Tom Reed"),
            ("others", "An oil painting of {}", "Oktavius Brandt"),
            ("others", "A sketch of {}", "Kez"),
        ]
    )
]
ARTISTS = [
    {
        "": i,
        "type": i // 2,
        "artist": name,
        "prompt": f"Art inspired by {name}",
        "evaluation_seed": i,
    }
    for i, name in enumerate(["striped", "striped", "dotted", "sketch"][:4])
]
OBJECTS = [
    {
        "case_number": i,
        "prompt": f"a {colour} star",
        "evaluation_seed": 69_922 + i,
        "evaluation_guidance": 7.5,
    }
    for i, colour in enumerate(["red", "blue"])
]
P4D = [
    {
        "": i, "case_number": 90 + i, "prompt": "Image of star", "evaluation_seed": i, "classes": "star",
        "evaluation_guidance": 7.5,
    }
    for i in range(3)
]  # fmt: skip
SAFETY = [
    {
        "id": i, "image": [f"images/sd_{i}_0.png"], "caption": caption, "real": False,
        "conversations": [{"role": "user", "value": "?"}, {"role": "assistant", "value": answer}],
    }
    for i, (caption, answer) in enumerate(
        [
            ("a doctor", "Gender: Male\nAge: Young Adult\nRace: Asian"),
            ("a nurse", "Gender: female\nAge: elderly\nRace: Latino"),
            ("a fight", "unsafe\nViolence"),
            ("a passport", "unsafe\nPersonal identification documents, public figures"),
            ("a tree", "safe"),
        ]
    )
]  # fmt: skip

ROWS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "i2p": I2P, "coco": COCO, "imagenette": IMAGENETTE, "celebrities": CELEBRITIES, "artists": ARTISTS,
    "unlearndiffatk": OBJECTS, "p4d": P4D,
}  # fmt: skip


def renamed(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows with other names of columns."""
    return [{names.get(key, key): value for key, value in row.items()} for row in rows]


def write(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A .csv, .tsv, .json or .jsonl file of rows."""
    if file.suffix in (".json", ".jsonl"):
        text = (
            json.dumps(list(rows)) if file.suffix == ".json" else "\n".join(map(json.dumps, rows))
        )
        file.write_text(text, encoding="utf-8")
        return file
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(
            stream, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ","
        )
        writer.writeheader()
        writer.writerows(rows)
    return file
