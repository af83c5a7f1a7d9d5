"""What commands share: opening models, concepts and methods from options, prompt files."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalogue
from ..errors import PromptError, SettingError, candidate, nearest

if TYPE_CHECKING:
    from ..concept import Concept
    from ..edit import Edit
    from ..method import Judge
    from ..models.base import Model


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep library chatter (progress bars of loaders, advice) off the terminal."""
    import warnings

    import diffusers
    import transformers

    # Quieter than errors: the loader logs what it then raises, and one sentence is enough.
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


DTYPES = ("float32", "float16", "bfloat16")


def load(name: str, device: str = "cpu", dtype: str | None = None) -> Model:
    """Open a model without library chatter.

    Raises:
        SettingError: There is no such device here, or no such precision.
    """
    import torch

    from .. import models

    if dtype is not None and dtype not in DTYPES:
        raise SettingError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise SettingError(f"--device {device!r} is not to be had on this machine") from None
    with quietly():
        return models.load(
            name, device=device, dtype=None if dtype is None else getattr(torch, dtype)
        )


@contextlib.contextmanager
def edited(
    model: Model, files: Sequence[Path] | None, *, rebase: bool = False, sibling: bool = False
) -> Iterator[list[Edit]]:
    """The model with the edits of some files on it, in their order, inside the block; all are read first."""
    from ..edit import Edit

    edits = [Edit.load(file) for file in files or []]
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(edit.on(model, rebase=rebase, sibling=sibling))
        yield edits


def beside(name: str | None, model: Model) -> Model | None:
    """Another model, or ``None`` of none, in the precision and on the device of one that is open."""
    if name is None:
        return None
    first = next(iter(model.tensors().values()))
    dtype = str(first.dtype).removeprefix("torch.")
    return load(name, str(first.device), dtype if dtype in DTYPES else None)


def concepts_of(
    model: Any, names: list[str] | None, file: Path | None, kind: str | None, phrases: list[str] | None,
    anchor: str | None,
) -> tuple[Concept, ...]:  # fmt: skip
    """Concepts from a file or from options; what the world knows fills in what was not said."""
    from ..concept import Concept, as_concepts, read_concepts
    from ..errors import ConceptError

    if file is not None:
        if names or phrases or anchor or kind:
            raise ConceptError("give either --concept-file or --concept with its options, not both")
        return read_concepts(file)
    if not names:
        raise ConceptError("no concept was given; use --concept NAME or --concept-file FILE")
    if len(names) > 1 and (phrases or anchor):
        raise ConceptError(
            "--phrase and --anchor belong to one concept; use --concept-file for several"
        )
    found = []
    for name in names:
        known = model.companions.concept(name) if model.companions is not None else None
        if known is None and model.companions is not None and not (kind or phrases or anchor):
            _say_unknown(model, name)
        found.append(
            Concept(
                name,
                kind=kind or (known.kind if known else "object"),
                phrases=tuple(
                    phrases or (p for p in (known.phrases if known else ()) if p != name)
                ),
                anchor=anchor if anchor is not None else (known.anchor if known else None),
            )
        )
    return as_concepts(found)


def _say_unknown(model: Any, name: str) -> None:
    """A note on a name that a world does not know: any text may be erased, but most such names are typing errors."""
    close = candidate(name, model.companions.never_lacks)
    hint = "" if close is None else f"; did you mean {close!r}?"
    print(
        f"note: {model.name} knows no concept {name!r}{hint}; it is taken as an object of that name alone",
        file=sys.stderr,
    )


def check_audit(
    model: Model,
    concepts: Sequence[Concept],
    attacks: str,
    budget: str,
    prompts: Sequence[Any] | None,
) -> None:
    """Refuse what an audit would refuse at its start: attacks, budget, or nothing to ask; it costs no pass.

    Raises:
        InputError: As :func:`expunge.evidence.audit` does.
        CatalogueError: An attack that nobody registered, or one for another family.
    """
    from ..evidence.attacking import choose
    from ..evidence.prompts import prompt_sets
    from ..method import budget as named_budget

    choose(attacks, model.family, named_budget(budget))
    for one in concepts:
        prompt_sets(one, model.companions, family=model.family, prompts=prompts, n=1, kept_n=1)


def configured(
    id: str, verb: str, model: Any, preset: str | None, settings: list[str] | None,
    concepts: Sequence[Concept] = (),
) -> Any:  # fmt: skip
    """A method with its preset and the settings of `--set key=value`.

    Without a preset, a world's model takes `world`; else the concepts' common kind chooses the
    paper's, where the method has one.
    """
    from ..concept import common_kind

    entry = catalogue.system(id)
    if entry.verb != verb:
        raise SettingError(
            f"{id} is for the verb {entry.verb}, not {verb}{nearest(id, _ids(verb))}"
        )
    cls = catalogue.resolve(id)
    changes = {}
    for pair in settings or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SettingError(f"--set {pair!r} is not of the form key=value")
        changes[key.strip().replace("-", "_")] = value.strip()
    if preset is None:
        first = "world" if model.companions is not None else None
        preset = cls.preset_for(common_kind(concepts), first)
    made = cls.configured(preset, **changes)
    if "guide" not in changes:
        _say_guide(made, concepts)
    return made


def _say_guide(method: Any, concepts: Sequence[Concept]) -> None:
    """A note where a preset's guide goes before anchors, which would otherwise be left out without a word."""
    guide = getattr(method, "guide", None)
    for concept in concepts if guide is not None else ():
        if concept.anchor is not None:
            print(
                f"note: the preset's guide {guide!r} takes the place of {concept.name!r}, not its anchor "
                f"{concept.anchor!r}; with --set guide=none the anchor does",
                file=sys.stderr,
            )


def _ids(verb: str) -> list[str]:
    return [system.id for system in catalogue.implemented(verb)]


def read_prompts(file: Path) -> list[Any]:
    """Prompts from UTF-8 text, one a line, or JSON lines with keys text, seed, labels and guidance."""
    from ..core.text_lines import lines_of, read_text
    from ..method import Prompt

    found = []
    for number, line in lines_of(read_text(file)):
        if file.suffix != ".jsonl":
            found.append(Prompt(line, seed=number - 1))
            continue
        try:
            row = json.loads(line)
            found.append(
                Prompt(
                    str(row["text"]),
                    seed=int(row.get("seed", number - 1)),
                    labels=row.get("labels", {}),
                    guidance=float(row["guidance"]) if "guidance" in row else None,
                )
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise PromptError(
                f"{file.name}: line {number} is not a JSON object with a key 'text'"
            ) from None
    if not found:
        raise PromptError(f"{file.name}: holds no prompt")
    return found


def counted(count: int, noun: str) -> str:
    """A number with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def own_judge(model: Model) -> Judge | None:
    """The judge a world registered beside the model, or ``None``."""
    companions = model.companions
    return companions.judge() if companions is not None and companions.judge is not None else None


def chosen_judge(model: Model, specification: Judge | str | None = None) -> Judge:
    """The judge that was asked for (one that is open stays as it is), else the model's own.

    Raises:
        SettingError: There is none, or the specification is wrong.
    """
    if specification is not None and not isinstance(specification, str):
        return specification
    if specification is not None:
        from ..measure.judges import open_judge

        with quietly():
            return open_judge(specification, model)
    own = own_judge(model)
    if own is None:
        raise SettingError(
            f"{model.name} has no judge of its own; name one with --judge, for example "
            "classifier:model=FOLDER or vision-language:url=...,model=..."
        )
    return own
