"""The options that several commands share, with their help, in one place."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SettingError


def folder_for_results(place: Path | None) -> Path | None:
    """Refuse, before any work is done, a place where no folder can be written; nothing is made yet.

    Raises:
        SettingError: It, or what stands above it, is no folder, or may not be written to.
    """
    if place is None:
        return None
    nearest = place
    while not os.path.lexists(nearest) and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise SettingError(f"--out {str(place)!r}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise SettingError(f"--out {str(place)!r}: {nearest} may not be written to")
    return place


def file_for_results(place: Path | None) -> Path | None:
    """The same for one file."""
    if place is None:
        return None
    if place.is_dir():
        raise SettingError(f"--out {str(place)!r}: is a folder; a file is needed")
    folder_for_results(place.parent)
    return place


MODEL_HELP = "`world` (also `world/never`, `world/sibling`, `world/facts`), a folder, or a hub id."
ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
DeviceOption = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps, ...")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16; float32 is the default.")
]
OutOption = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Folder that receives the results.", callback=folder_for_results
    ),
]
EditOption = Annotated[
    list[Path] | None,
    typer.Option("--edit", "-e", help="An edit file; repeat to stack several, in order."),
]
SiblingOption = Annotated[
    bool,
    typer.Option(
        "--sibling",
        help="Allow edits on other weights of the same structure, as of a fine-tuned sibling of their model.",
    ),
]
RebaseOption = Annotated[
    bool,
    typer.Option(
        "--rebase", help="Allow edits on another stack of edits than they were fitted on."
    ),
]
WithoutGateOption = Annotated[
    bool,
    typer.Option(
        "--without-gate", help="Export a gated edit for all prompts alike; its gate is lost."
    ),
]
ConceptOption = Annotated[
    list[str] | None,
    typer.Option("--concept", "-c", help="Name of the concept; repeat for several."),
]
FileOption = Annotated[
    Path | None,
    typer.Option("--concept-file", help="YAML or JSON file of concepts, instead of `--concept`."),
]
KindOption = Annotated[
    str | None,
    typer.Option(
        help="object, style, identity, unsafe, mark, class or fact; the world knows its own concepts."
    ),
]
PhraseOption = Annotated[
    list[str] | None,
    typer.Option("--phrase", help="Another phrasing of the concept; repeat for several."),
]
AnchorOption = Annotated[str | None, typer.Option(help="What may take the concept's place.")]
KeepOption = Annotated[
    list[str] | None,
    typer.Option("--keep", "-k", help="A concept or prompt to preserve; repeat for several."),
]
MethodOption = Annotated[
    str, typer.Option(help="Catalogue id of an eraser; see `expunge methods --verb erase`.")
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="Named settings of the method; else `world` for `world` models, or `paper:KIND` of the concept."
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", "-s", help="A setting as `key=value`; repeatable.")
]
SeedOption = Annotated[int, typer.Option(help="Everything random derives from it.")]
OriginalOption = Annotated[
    str | None, typer.Option(help="The model before erasing, when `--model` is edited already.")
]
NeverOption = Annotated[
    str | None, typer.Option(help="A model that never saw the concept; the world brings its own.")
]
JudgeOption = Annotated[
    str | None,
    typer.Option(
        help="Who says what is shown: `ID` or `ID:setting=value,...` (docs/judges.md); the world's own is the default."
    ),
]
AttacksOption = Annotated[str, typer.Option(help="Attack ids joined by commas, `all` or `none`.")]
BudgetOption = Annotated[
    str, typer.Option(help="Allowance for each attacked prompt: `paper`, `world` or `quick`.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder for outputs and attacks; another audit with it pays only for what depends on its own edit."
    ),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="File of prompts that name the concept, one a line.")
]
SeedsOption = Annotated[int, typer.Option(min=1, help="Pictures for each prompt.")]
NOption = Annotated[int, typer.Option("--n", min=1, help="Prompts for the concept.")]
KeptNOption = Annotated[int, typer.Option(min=1, help="Prompts for each kept concept.")]
AttackNOption = Annotated[int, typer.Option(min=1, help="Prompts each attack tries.")]
