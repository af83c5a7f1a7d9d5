"""`expunge generate`: pictures or texts of prompts, with edits on the model."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from . import common
from .options import (
    DeviceOption,
    DtypeOption,
    EditOption,
    ModelOption,
    OutOption,
    RebaseOption,
    SeedOption,
    SeedsOption,
    SiblingOption,
)

__all__ = ["generate"]

NEGATIVE_HELP = (
    "What shall not be drawn: the text of guidance's unconditional branch, for all prompts. Models without that "
    "branch, and guidance 1, refuse it."
)


def generate(
    model: ModelOption,
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", help="What to draw or answer; repeatable.")
    ],
    out: OutOption,
    edit: EditOption = None,
    seeds: SeedsOption = 1,
    seed: SeedOption = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; the model's own otherwise.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Classifier-free guidance; the model's own otherwise.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help=NEGATIVE_HELP)] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    sibling: SiblingOption = False,
    rebase: RebaseOption = False,
) -> None:
    """Generate pictures (PNG files) or texts (`texts.json`), with edits applied."""
    opened = common.load(model, device, dtype)
    from ..edit.files import atomic_write
    from ..method import Prompt

    asked = [Prompt(text, seed=seed + k) for text in prompt for k in range(seeds)]
    given: dict[str, Any] = {"steps": steps, "guidance": guidance, "negative": negative}
    options = {name: value for name, value in given.items() if value is not None}
    with common.quietly(), common.edited(opened, edit, rebase=rebase, sibling=sibling):
        made = opened.generate(asked, **options)
    if opened.family == "language":
        rows = [
            {"prompt": p.text, "seed": p.seed, "output": text}
            for p, text in zip(asked, made, strict=True)
        ]
        atomic_write(
            out / "texts.json", (json.dumps(rows, indent=1, ensure_ascii=False) + "\n").encode()
        )
        print(f"{common.counted(len(rows), 'text')} in {out / 'texts.json'}")
        return
    from ..evidence.gallery import png

    for index, (item, picture) in enumerate(zip(asked, made, strict=True)):
        atomic_write(out / f"{index:04d}-seed{item.seed}.png", png(picture))
    print(f"{common.counted(len(made), 'picture')} in {out}")
