"""The command: python -m expunge.run.comparison; see `--help`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ... import catalogue
from ...errors import ExpungeError, SettingError
from .units import (
    ATTACKS,
    CONTROLS,
    Choice,
    closed_forms,
    default_methods,
    many_case,
    recorded,
    table_case,
)  # fmt: skip
from .work import Bench, Cell, measure

KINDS = {"people": "identity", "objects": "object"}
"""Parts that erase many concepts, and of which kind."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m expunge.run.comparison",
        description="Compare erasers on the same work; a cell that is recorded is not measured again.",
    )
    parser.add_argument(
        "--methods", type=_list, help="ids with settings, uce,trce:stage2=false; default: all closed forms, "
        "and in the tables fine-tunes too",
    )  # fmt: skip
    parser.add_argument(
        "--table", type=_list, default=[], help="concepts erased alone, for example star,hazard"
    )
    parser.add_argument(
        "--people", type=_numbers, default=[], help="how many people at once, for example 1,5,20,32"
    )
    parser.add_argument(
        "--objects", type=_numbers, default=[], help="how many objects at once, 1,3,6"
    )
    parser.add_argument(
        "--sequence", type=_numbers, default=[], help="people one after another, and at once, 20"
    )
    parser.add_argument(
        "--attacks", type=_list, default=_list(ATTACKS), help=f"id@prompts of the tables, or none; default {ATTACKS}",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=int, default=130, help="pictures of each set of a cell (130)"
    )
    parser.add_argument("--seeds", type=_numbers, default=[0], help="seeds (0)")
    parser.add_argument("--split", choices=("test", "development"), default="test")
    parser.add_argument("--model", default="world")
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/comparison"), help="pictures and fitted edits"
    )
    parser.add_argument(
        "--plan", action="store_true", help="list the cells and what is recorded; measure nothing"
    )
    options = parser.parse_args(given)
    if not (options.table or options.people or options.objects or options.sequence):
        parser.error("nothing was asked for; give --table, --people, --objects or --sequence")
    if options.pictures < 1:
        parser.error(f"--pictures is {options.pictures}; at least 1 is needed")
    return options


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in _list(text)]


def methods(named: Sequence[str] | None) -> list[Choice]:
    """The methods asked for; what is only planned is said in a sentence and left out.

    Raises:
        CatalogueError: An id that nobody registered.
        SettingError: A wrong setting, a method for something else, or nothing left.
    """
    found = []
    for choice in default_methods() if named is None else [Choice.parse(name) for name in named]:
        if catalogue.system(choice.id).class_path is None:
            print(f"{choice.id} is planned, not implemented yet; it is left out", file=sys.stderr)
            continue
        choice.method("erase")
        found.append(choice)
    if not found:
        raise SettingError("none of the methods is implemented, so there is nothing to compare")
    return found


def attacks(named: Sequence[str]) -> list[Choice]:
    """The attacks of the tables, each with its number of prompts (100 unless given)."""
    found = [Choice.parse(name) for name in named if name != "none"]
    for choice in found:
        choice.method("attack")
    return [c if c.n is not None else dataclasses.replace(c, n=100) for c in found]


def cells(
    options: argparse.Namespace,
    bench: Bench,
    chosen: Sequence[Choice],
    searches: Sequence[Choice],
    many: Sequence[Choice],
) -> Iterator[Cell]:
    """All cells that were asked for: pictures first, attacks last.

    Args:
        chosen: Methods of the tables of one concept.
        searches: Attacks on them.
        many: Methods that erase many concepts, at once or one after another.
    """
    arms: list[str | Choice] = [*CONTROLS, *chosen]
    known, pictures = bench.companions, options.pictures
    for seed in options.seeds:
        tables = {name: table_case(known, name, seed, pictures) for name in options.table}
        for name, case in tables.items():
            for arm in arms:
                yield Cell(name, "pictures", arm, case, seed, pictures)
        for part, kind in KINDS.items():
            numbers = set(getattr(options, part)) | set(
                options.sequence if part == "people" else ()
            )
            for number in sorted(numbers):
                case = many_case(known, kind, number, seed, pictures)
                yield Cell(part, "pictures", "original", case, seed, pictures)
                for choice in many:
                    yield Cell(part, "pictures", choice, case, seed, pictures)
        for number in options.sequence:
            case = many_case(known, "identity", number, seed, pictures, taken=True)
            yield Cell("sequence", "pictures", "original", case, seed, pictures)
            for choice in many:
                yield Cell("sequence", "sequence", choice, case, seed, pictures)
        for name, case in tables.items():
            for attack in searches:
                for arm in arms:
                    yield Cell(name, "attack", arm, case, seed, pictures, attack)


def main(given: Sequence[str] | None = None) -> int:
    """Measure what is asked for and not recorded yet.

    Returns:
        0, or 1 where a method refused a cell, or 2 after a mistake in what was asked for.
    """
    options, refused = arguments(given), 0
    from ...models import load

    try:
        # Mistakes in names show before the model is opened.
        chosen, searches = methods(options.methods), attacks(options.attacks)
        many = chosen if options.methods is not None else closed_forms()
        bench = Bench(load(options.model), options.cache, options.split)
        work = list(cells(options, bench, chosen, searches, many))
        for place, cell in enumerate(work, 1):
            began, there = time.perf_counter(), recorded(cell.request(bench))
            word = "recorded" if there else "to do" if options.plan else ""
            if not there and not options.plan:
                try:
                    measure(cell, bench)
                except ExpungeError as error:
                    # One method that refuses one case does not stop the others.
                    word, refused = f"failed: {error}", 1
            spent = time.perf_counter() - began
            print(f"[{place}/{len(work)}] {cell.title}: {word or f'{spent:.0f} s'}", flush=True)
    except ExpungeError as error:
        print(error, file=sys.stderr)
        return 2
    return refused


if __name__ == "__main__":
    sys.exit(main())
