"""`expunge attack`: attacks on a model for one concept, without a whole audit."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import common
from .options import (
    AnchorOption,
    BudgetOption,
    CacheOption,
    ConceptOption,
    DeviceOption,
    DtypeOption,
    EditOption,
    FileOption,
    JudgeOption,
    KindOption,
    ModelOption,
    OriginalOption,
    OutOption,
    PhraseOption,
    RebaseOption,
    SeedOption,
    SiblingOption,
)

if TYPE_CHECKING:
    from ..evidence import AttackRun

__all__ = ["attack"]

AttackIdsOption = Annotated[
    str, typer.Option("--attacks", "-a", help="Attack ids joined by commas, or `all`.")
]
PromptOption = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="A prompt that names the concept; repeatable."),
]
PromptFileOption = Annotated[
    Path | None,
    typer.Option("--file", "-f", help="File of such prompts: text, one a line, or JSON lines."),
]
CountOption = Annotated[
    int | None,
    typer.Option("--n", min=1, help="Prompts to attack; all of your own, or 20, by default."),
]
ShowOption = Annotated[int, typer.Option(min=0, help="Best found texts to print of each attack.")]


def attack(
    model: ModelOption, out: OutOption, concept: ConceptOption = None, concept_file: FileOption = None,
    kind: KindOption = None, phrase: PhraseOption = None, anchor: AnchorOption = None, edit: EditOption = None,
    original: OriginalOption = None, judge: JudgeOption = None, attacks: AttackIdsOption = "all",
    prompt: PromptOption = None, file: PromptFileOption = None, n: CountOption = None,
    budget: BudgetOption = "world", show: ShowOption = 3, seed: SeedOption = 0, device: DeviceOption = "cpu",
    dtype: DtypeOption = None, sibling: SiblingOption = False, rebase: RebaseOption = False,
    cache: CacheOption = None,
) -> None:  # fmt: skip
    """Run attacks on a model for one concept: what they bring back, by which texts, at which cost."""
    opened = common.load(model, device, dtype)
    wanted = common.concepts_of(opened, concept, concept_file, kind, phrase, anchor)
    own = [*(prompt or []), *(common.read_prompts(file) if file else [])]
    decides = common.chosen_judge(opened, judge)
    from ..core.sampling import SHARED
    from ..edit import Edit
    from ..evidence import run_attacks

    edits = [Edit.load(path) for path in edit or []]
    with common.quietly(), SHARED.also_in(cache):
        found = run_attacks(
            opened, wanted, edits, attacks=attacks, budget=budget, judge=decides,
            original=common.beside(original, opened), prompts=own or None, n=n, seed=seed, rebase=rebase,
            sibling=sibling, command=shlex.join(["expunge", *sys.argv[1:]]),
        )  # fmt: skip
        written = found.save(out)
    _print(found, show)
    print(f"all of it: {written}")
    if not any(found.items(record) for record in found.records):
        raise typer.Exit(1)


def _print(found: AttackRun, show: int) -> None:
    """The table, why attacks gave nothing, and the best texts of the others."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("attack", overflow="fold")
    for name in ("before", "after", "n", "rows"):
        table.add_column(name, justify="right", no_wrap=True)
    for record in found.records:
        cells = [_share(found.number(record, kind)) for kind in ("pre", "hit")]
        rows = f"{found.rows(record):,}" if found.items(record) else "-"
        table.add_row(escape(record.id), *cells, str(record.n), rows)
    console.print(table)
    print(
        "before, after: % of prompts that show the concept [95 % interval]; rows: through the model"
    )
    for record in found.records:
        if not found.items(record):
            print(f"{record.id}: {record.status}: {record.reason}")
        elif record.skipped:
            print(f"{record.id}: {record.skipped} of {record.n} prompts could not be attacked")
        for item in found.best(record)[:show]:
            text = "".join(c if c.isprintable() else "?" for c in f"{item.text!r}")
            print(f"{record.id}: {text} for {item.prompt.text!r}, score {item.score:.2f}")


def _share(number: dict[str, Any] | None) -> str:
    if number is None:
        return "-"
    low, high = number["interval"]
    # The bracket is escaped for rich, which reads [x] as a style.
    return f"{100 * number['value']:.1f} \\[{100 * low:.0f}, {100 * high:.0f}]"
