"""`expunge benchmark`: read and check a published set of prompts, and run a model on it with a judge."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SettingError
from . import common
from .options import (
    ConceptOption,
    DeviceOption,
    DtypeOption,
    EditOption,
    JudgeOption,
    KindOption,
    PhraseOption,
    RebaseOption,
    SeedsOption,
    SiblingOption,
    folder_for_results,
)

__all__ = ["benchmark"]

Edited = Callable[[Any], Any]
"""A model with the edits that were asked for, as a context that gives them."""

NAME_HELP = "A benchmark as `ID` or `ID:setting=value,...`; `list` names them."


def benchmark(
    name: Annotated[str, typer.Argument(help=NAME_HELP)],
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            "-f",
            help="Its file; `hub` or `hub:OWNER/NAME/FILE` for a dataset of the hub.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    show: Annotated[
        int, typer.Option(min=0, help="Prompts to print; published ones may offend.")
    ] = 0,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A model to run on it.")
    ] = None,
    edit: EditOption = None,
    judge: JudgeOption = None,
    concept: ConceptOption = None,
    kind: KindOption = None,
    phrase: PhraseOption = None,
    seeds: SeedsOption = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; the model's own otherwise.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 64,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Folder that receives `benchmark.json`.",
            callback=folder_for_results,
        ),
    ] = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    sibling: SiblingOption = False,
    rebase: RebaseOption = False,
) -> None:
    """Check a published set of prompts; with a model and a judge, draw it and say how often the concept is shown."""
    if name == "list":
        _list()
        return
    from ..measure.benchmarks import open_table

    kind_of = open_table(name)
    edited = functools.partial(common.edited, files=edit, rebase=rebase, sibling=sibling)
    if file is None:
        if model is None or kind_of.id != "t2isafety":
            raise SettingError(f"{kind_of.id}: no file was given; use --file FILE, or --file hub")
        _own_safety(common.load(model, device, dtype), edited, seeds, steps, batch, limit, out)
        return
    table = kind_of.load(file).limited(limit)
    print(_described(kind_of, table))
    for prompt in table.prompts[:show]:
        print(f"  seed {prompt.seed}: {prompt.text}")
    if model is None:
        return
    opened = common.load(model, device, dtype)
    if kind_of.id == "t2isafety":
        _safety(opened, table.prompts, judge, edited, seeds, steps, batch, out)
        return
    wanted = _concept(opened, concept, kind, phrase, kind_of)
    _run(opened, table, kind_of, judge, edited, wanted, seeds, steps, batch, out)


def _list() -> None:
    from ..measure.benchmarks import TABLES, table_class

    for id in TABLES:
        cls = table_class(id)
        place = f", hub: {'/'.join(cls.hub)}" if cls.hub else ""
        print(f"{id:16} {cls.title} ({cls.source}{place})")


def _described(kind: Any, table: Any) -> str:
    concepts = {prompt.concept for prompt in table.prompts if prompt.concept}
    guided = sum(prompt.guidance is not None for prompt in table.prompts)
    lines = [
        f"{table.source}: {table.rows} rows are of the schema {kind.id}, {len(table.prompts)} prompts chosen"
    ]
    if table.complete is False:
        lines.append(f"the published file has {table.published} rows")
    lines.append(f"{len(concepts)} concepts named, {guided} prompts with a guidance of their own")
    return "\n".join([*lines, f"protocol {table.protocol}"])


def _concept(
    opened: Any, names: list[str] | None, kind: str | None, phrases: list[str] | None, table: Any
) -> Any:
    if not names:
        return None
    if len(names) > 1:
        raise SettingError(
            "--concept was given twice; a set of prompts is judged for one concept, or each for its own"
        )
    (found,) = common.concepts_of(opened, names, None, kind or table.kind, phrases, None)
    return found


def _run(
    opened: Any, table: Any, kind: Any, judge: str | None, edited: Edited, concept: Any, seeds: int,
    steps: int | None, batch: int, out: Path | None,
) -> None:  # fmt: skip
    from ..core.progress import Progress
    from ..core.prompt_scores import score_table

    decides = common.chosen_judge(opened, judge)
    known = opened.companions.concept if opened.companions is not None else None
    options: dict[str, Any] = {} if steps is None else {"steps": steps}
    with common.quietly(), edited(opened) as edits:
        with Progress(table.id, len(table.prompts) * seeds, unit="picture") as bar:
            done = [0]

            def advance(at: int, _: int) -> None:
                bar.advance("", at - done[0])
                done[0] = at

            found = score_table(
                opened, table, decides, kind, concept, concepts=known, seeds=seeds, batch=batch, progress=advance,
                **options,
            )  # fmt: skip
    print(f"judge {found.judge}")
    print(_line("shown", found.rate))
    print(_line("unrecognisable", found.unrecognisable))
    for label, values in found.groups.items():
        for value, share in values.items():
            print(_line(f"{label} {value}", share))
    for word, number in found.summary.items():
        print(f"{_line(word.replace('_', ' '), number)}, {number.protocol}")
    _write(out, {"model": opened.name, "edits": [edit.digest for edit in edits], **found.to_dict()})


def _line(name: str, share: Any) -> str:
    if share.value is None:
        return f"{name}: no output to judge"
    low, high = share.interval
    return (
        f"{name}: {100 * share.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}], {share.n} prompts"
    )


def _own_safety(
    opened: Any,
    edited: Edited,
    seeds: int,
    steps: int | None,
    batch: int,
    limit: int | None,
    out: Path | None,
) -> None:
    """T2ISafety on a world's own prompts, by its own guard."""
    make = getattr(opened.companions, "safety", None)
    if make is None:
        raise SettingError(
            f"t2isafety: {opened.name} brings no prompts of its own; use --file FILE"
        )
    world = make()
    _measured(
        opened,
        world.prompts(limit or 400),
        world.guard,
        world.errors(),
        edited,
        seeds,
        steps,
        batch,
        out,
    )


def _safety(
    opened: Any, prompts: Any, judge: str | None, edited: Edited, seeds: int, steps: int | None, batch: int,
    out: Path | None,
) -> None:  # fmt: skip
    guard = common.chosen_judge(opened, judge)
    if not hasattr(guard, "look"):
        raise SettingError(
            f"t2isafety: judge {guard.id!r} names no categories; use --judge imageguard:url=...,model=... or "
            "trained-guard:folder=..."
        )
    _measured(opened, prompts, guard, None, edited, seeds, steps, batch, out)


def _measured(
    opened: Any, prompts: Any, guard: Any, errors: Any, edited: Edited, seeds: int, steps: int | None,
    batch: int, out: Path | None,
) -> None:  # fmt: skip
    from ..measure.t2isafety import T2ISafety

    method = T2ISafety(seeds=seeds, steps=steps, batch=batch)
    with common.quietly(), edited(opened) as edits:
        report = method.measure(opened, guard, prompts, errors=errors)
    print(f"protocol {report.protocol}")
    for name, found in report.fairness.items():
        if found.value is None:
            print(f"fairness {name}: nobody to be seen")
            continue
        if found.interval is None or found.unbiased is None:
            print(
                f"fairness {name}: NKL {found.value:.3f} (one prompt: no interval), {found.n} pictures"
            )
            continue
        low, high = found.interval
        print(
            f"fairness {name}: NKL {found.value:.3f} (without its bias {found.unbiased:.3f} [{low:.3f}, {high:.3f}]), "
            f"{found.n} pictures"
        )
    for task, share in report.safe.items():
        print(_line(f"safe, {task}", share))
    for domain, kinds in report.domains.items():
        for word, share in kinds.items():
            print(_line(f"safe, {domain} {word}", share))
    for domain, counts in report.coverage.items():
        print(
            f"coverage {domain}: " + ", ".join(f"{word} {count}" for word, count in counts.items())
        )
    _write(
        out, {"model": opened.name, "edits": [edit.digest for edit in edits], **report.to_dict()}
    )


def _write(out: Path | None, record: dict[str, Any]) -> None:
    if out is None:
        return
    from ..edit.files import atomic_write

    atomic_write(
        out / "benchmark.json", (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode()
    )
    print(f"all of it: {out / 'benchmark.json'}")
