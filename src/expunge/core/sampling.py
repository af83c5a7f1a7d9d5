"""Outputs of a model for many prompts, in batches, each one made once.

The noise of a picture depends on its own seed alone (the adapter's promise), so a picture may be made
in any batch, and one that was made before need not be made again.  :class:`OutputCache` names each
output by everything that can change it: the model's state (base weights, dtype, edits in order) and
protocol (sampler, tokenizer, templates), the text, the seed and the sampler's options.  An audit of a
second edit therefore finds the pictures of the original and of the never model ready.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..edit.files import atomic_write
from ..errors import PromptError
from ..method import Outputs, Prompt

if TYPE_CHECKING:
    from ..concept import Concept
    from ..models.base import Model

__all__ = [
    "SHARED", "OutputCache", "Search", "as_prompts", "expand", "output_key", "outputs", "pictures", "prompts_digest",
    "remembered", "validation_prompts",
]  # fmt: skip

SEED_STEP = 1_000_003
"""Further pictures of a prompt use seeds this far apart, so that neighbouring prompts share none."""


@dataclasses.dataclass(frozen=True)
class Search:
    """What a search found, and its share of the rows (by component and direction) and ``seconds`` that were spent."""

    found: Any
    cost: Mapping[str, float]


class OutputCache:
    """Outputs by key, the least recently used dropped first; optionally also kept in a folder.

    Args:
        folder: Where to keep outputs between processes; ``None`` keeps them in memory only.
        limit: Bytes held in memory.  A dropped output is read from the folder or made again.
    """

    def __init__(
        self, folder: str | os.PathLike[str] | None = None, limit: int = 256 * 2**20
    ) -> None:
        self.folder = Path(folder) if folder is not None else None
        self.limit = limit
        self.hits = 0
        self.misses = 0
        self.results: dict[str, Any] = {}
        """What attacks did (see :mod:`.kept_attempts`), under names that say everything that can change it."""
        self.searches: dict[str, Search] = {}
        """What :func:`remembered` has found, and what each of these searches cost."""
        self.recalled: Counter[str] = Counter()
        """Rows and seconds that searches found in memory cost when they were run, since this was last emptied."""
        self._held: OrderedDict[str, Any] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> Any | None:
        """One output (a picture ``(h, w, 3)`` or a text), or ``None``."""
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
        elif self.folder is not None:
            found = self._read(key)
            if found is not None:
                self._hold(key, found)
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: str, output: Any) -> None:
        """Keep one output."""
        self._hold(key, output)
        if self.folder is not None:
            self._write(key, output)

    @contextlib.contextmanager
    def also_in(self, folder: str | os.PathLike[str] | None) -> Iterator[None]:
        """Keep what is made inside the block in a folder too, and look there; ``None`` changes nothing.

        For programs: what attacks share among themselves is in the process's own cache.
        """
        before = self.folder
        self.folder = before if folder is None else Path(folder)
        try:
            yield
        finally:
            self.folder = before

    def clear(self, searches: bool = True) -> None:
        """Forget what is held in memory; a folder is left as it is.

        Args:
            searches: Forget what :func:`remembered` found, too.
        """
        self._held.clear()
        self.results.clear()
        if searches:
            self.searches.clear()
        self.recalled.clear()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def _hold(self, key: str, output: Any) -> None:
        if key in self._held:
            return
        if isinstance(output, np.ndarray):
            output = output.copy()  # a view would keep its whole batch alive
            output.setflags(write=False)
        self._held[key] = output
        self._bytes += _size(output)
        while self._bytes > self.limit and len(self._held) > 1:
            _, dropped = self._held.popitem(last=False)
            self._bytes -= _size(dropped)

    def _read(self, key: str) -> Any | None:
        assert self.folder is not None
        file = self.folder / key[:2] / f"{key}.npz"
        try:
            with np.load(file, allow_pickle=False) as archive:
                value = archive["output"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            return None  # damaged: it is made again and written over
        return str(value) if value.dtype.kind == "U" else value

    def _write(self, key: str, output: Any) -> None:
        assert self.folder is not None
        archive = io.BytesIO()
        np.savez(archive, output=np.asarray(output))
        atomic_write(self.folder / key[:2] / f"{key}.npz", archive.getvalue())


def _size(output: Any) -> int:
    return int(output.nbytes) if isinstance(output, np.ndarray) else len(str(output)) + 64


SHARED = OutputCache()
"""The process's own cache, used by audits that are not given one."""


def remembered(
    keys: Sequence[str], make: Callable[[list[int]], Sequence[Any]], model: Any
) -> list[Any]:
    """Results of a search that reads nothing of the model under attack, kept for the process.

    Args:
        keys: Name everything that can change each result.
        make: The results of those that are not known yet, by their positions.
        model: Whose rows the search counts.
    """
    known = SHARED.searches
    new = [k for k, key in enumerate(keys) if key not in known]
    for key in {key for key in keys if key in known}:
        SHARED.recalled.update(known[key].cost)
    if new:
        before, start = model.cost.snapshot(), time.perf_counter()
        made = make(new)
        cost = {**model.cost.since(before), "seconds": time.perf_counter() - start}
        share = {name: spent / len(new) for name, spent in cost.items()}
        known |= {keys[k]: Search(found, share) for k, found in zip(new, made, strict=True)}
    return [known[key].found for key in keys]


def as_prompts(
    prompts: str | Prompt | Sequence[str | Prompt],
    concept: str | None = None,
    *,
    empty: bool = False,
) -> list[Prompt]:
    """Texts and prompts as prompts; a bare text gets its position as seed.

    Args:
        prompts: One or several.
        concept: What bare texts are about.
        empty: The empty text is a prompt, too.

    Raises:
        PromptError: Nothing was given, or an entry is empty or not a text.
    """
    if not isinstance(prompts, (str, Prompt, Iterable)):
        raise PromptError(
            f"prompts is {prompts!r}; a text, a prompt, or several of them are needed"
        )
    entries = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
    needed = "a text" if empty else "a non-empty text"
    found = []
    for position, entry in enumerate(entries):
        if isinstance(entry, str):
            entry = Prompt(entry, seed=position, concept=concept)
        read = isinstance(entry, Prompt) and isinstance(entry.text, str)
        if not read or not (empty or entry.text.strip()):
            raise PromptError(f"prompt {position + 1} is {entry!r}; {needed} is needed")
        found.append(entry)
    if not found:
        raise PromptError("no prompt was given; at least one is needed")
    return found


def validation_prompts(
    model: Model, concept: Concept, data: Any, n: int, seed: int = 0
) -> list[Prompt]:
    """Prompts of a concept that a method may look at while it learns.

    Args:
        model: Its companions are asked where there is no ``data``.
        concept: What the prompts shall call for.
        data: Texts or prompts; those that name another concept are left out.  All of them are used.
        n: Development prompts of the world a model comes from.
        seed: Another seed gives other development prompts.

    Returns:
        An empty list where neither ``data`` nor a world has any.
    """
    if data is not None:
        return [p for p in as_prompts(data) if p.concept in (None, concept.name)]
    companions = model.companions
    if companions is None or companions.prompts is None:
        return []
    if companions.concept(concept.name) is None:
        return []
    return list(companions.prompts(concept.name, n, seed=seed, split="development"))


def expand(prompts: Sequence[Prompt], seeds: int) -> list[Prompt]:
    """Each prompt ``seeds`` times, prompt by prompt, with seeds that no two prompts share."""
    if seeds < 1:
        raise PromptError(f"seeds is {seeds}; at least one picture a prompt is needed")
    return [
        dataclasses.replace(p, seed=(p.seed + k * SEED_STEP) % 2**62)
        for p in prompts
        for k in range(seeds)
    ]


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Names a list of prompts: texts, seeds, concepts, labels."""
    record = [dataclasses.asdict(prompt) for prompt in prompts]
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:32]


def output_key(model: str, prompt: Prompt, options: Mapping[str, Any]) -> str:
    """The name of one output: model (state and protocol), text, seed, options (a prompt's guidance among them)."""
    if prompt.guidance is not None:
        options = {**options, "guidance": prompt.guidance}
    record = [
        model,
        prompt.text,
        int(prompt.seed),
        sorted((k, repr(v)) for k, v in options.items()),
    ]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def outputs(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    batch: int = 64,
    cache: OutputCache | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Outputs:
    """What the model makes of ``n`` prompts with their own seeds, in their order.

    Args:
        model: Any model that can generate, in its present state.
        prompts: ``n`` prompts; equal prompts with equal seeds are made once.
        batch: Prompts given to ``model.generate`` at a time.
        cache: Where to look first and to keep what is made; ``None`` makes everything.
        progress: Called with (done, n) after each batch.
        options: Passed on to ``model.generate`` (``steps``, ``guidance``, ...); part of the key.

    Returns:
        uint8 pictures ``(n, h, w, 3)``, or a list of ``n`` texts.
    """
    model.needs("generate")
    # A control is code with state of its own: its outputs have no name under which to keep them.
    cache = None if model.controls else cache
    own = model.name if cache is None else f"{model.state.key}|{model.protocol_key}"
    # What an option left out stands for is the model's own default, which differs between models.
    defaults = {name: getattr(model, name, None) for name in ("steps", "guidance")}
    keys = [output_key(own, prompt, {**defaults, **options}) for prompt in prompts]
    made: dict[str, Any] = {}
    missing: dict[str, Prompt] = {}
    for key, prompt in zip(keys, prompts, strict=True):
        if key in made or key in missing:
            continue
        found = cache.get(key) if cache is not None else None
        if found is None:
            missing[key] = prompt
        else:
            made[key] = found
    wanted = list(missing)
    done = len(keys) - len(wanted)
    for start in range(0, len(wanted), batch):
        part = wanted[start : start + batch]
        entries = [missing[key] for key in part]
        fresh = model.generate(entries, seeds=[p.seed for p in entries], **options)
        for key, output in zip(part, fresh, strict=True):
            made[key] = output
            if cache is not None:
                cache.put(key, output)
        done += len(part)
        if progress is not None:
            progress(done, len(keys))
    ordered = [made[key] for key in keys]
    if ordered and isinstance(ordered[0], np.ndarray):
        return np.stack(ordered)
    return ordered


def pictures(model: Model, prompts: Any, **options: Any) -> Outputs:
    """:func:`outputs` for texts or prompts, in the words of a picture model."""
    return outputs(model, as_prompts(prompts), **options)
