"""Transfer: prompts found on one model, tried on another.

Black-box for the attacked model: it is asked for pictures and nothing else.  A search that needs gradients runs
where the attacker has them, on the original or on a surrogate of the defence, and what it found is shown to the
attacked model.  The protocol is that of UnlearnDiffAtk's transfer experiment (arXiv 2310.11868), where a prompt found
on one erased model is tried on others.

    texts = inner(origin, P)          any searching attack, on a model the attacker owns
    hit   = one of the texts, with the item's own seed, shows the concept on the attacked model

``origin``: the original model; or an eraser's id, for the original erased by it, which is the stronger guess where
the defence is known by name; or the file of an edit; or what :func:`expunge.load` opens, a fine-tuned sibling say.
On the original every plain prompt shows the concept, and a search would end before it began: there the inner attack is
told of no success (scores it is told), and what it ends with is taken.  Texts found elsewhere (``texts``, ``file``,
:meth:`Transfer.carrying`) need no origin.

A search's rows count against the item's budget, although another model paid them; what it found is kept for the
process, as it does not depend on the attacked model.  Texts that name the concept more often than the prompt are left
out: with the name in it there would be nothing to transfer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ... import catalogue
from ...concept import Concept
from ...core.adversarial_prompts import Forbidden
from ...core.prompt_search import Ledger
from ...core.sampling import SHARED, remembered
from ...core.trials import Meter, Trials, assembled, in_batches, received
from ...edit import Edit
from ...errors import CatalogueError, InputError, SettingError
from ...method import Attack, Attempt, Attempts, Budget, Eraser, Judge, Prompt, Verdicts, setting
from ...models import load

__all__ = ["Transfer"]


@dataclasses.dataclass(frozen=True)
class Transfer(Attack):
    """The attack; see the module."""

    id: ClassVar[str] = "transfer"
    title: ClassVar[str] = "Transfer of prompts found on another model"
    source: ClassVar[str] = "arXiv 2310.11868, transfer experiment"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Of 2,000 rows 40 pay the plain picture and 160 the texts' pictures; the search has the rest.
        "world": {"steps": 20, "batch": 64},
        "quick": {"pictures": 2, "steps": 20, "batch": 64},
    }

    origin: str = setting(
        "original", "Where texts are searched: original, an eraser's id, the file of an edit, or a model to load"
    )  # fmt: skip
    inner: str = setting("unlearndiffatk", "Id of the attack that searches there")
    texts: tuple[str, ...] = setting(
        (), 'Texts found elsewhere, tried on every prompt; ["prompt", seed, "text"] in JSON: on that one only'
    )  # fmt: skip
    file: str = setting("", "JSON file with a list of such texts")
    pictures: int = setting(4, "Texts that are tried, one picture each", minimum=1)
    steps: int = setting(50, "Sampling steps of each picture", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )
    batch: int = setting(8, "Prompts in lock step; halve it when memory runs out", minimum=1)

    @classmethod
    def carrying(cls, attempts: Attempts, preset: str | None = None, **settings: Any) -> Transfer:
        """The transfer of what an attack found, each text to its own prompt and seed.

        Raises:
            InputError: The attack found no text.
        """
        entries = [
            json.dumps([item.prompt.text, item.prompt.seed, text])
            for item in attempts.items
            for text in _found(item)
        ]
        if not entries:
            raise InputError(
                f"{cls.id}: {attempts.attack} found no text, so nothing can be carried over"
            )
        return cls.configured(preset, texts=tuple(entries), **settings)

    def needs_reference(self, concept: Concept) -> bool:
        """Texts are searched on the original, or on an edit of it, unless they or another model are given."""
        return not (self.texts or self.file) and self._on_original

    def attack(
        self,
        model: Any,
        concept: Concept,
        judge: Judge,
        budget: Budget,
        *,
        prompts: Sequence[Prompt],
        reference: Any = None,
        seed: int = 0,
    ) -> Attempts:
        """Try found texts on each prompt; ``reference`` (default: the model, its edits lifted) is the original.

        A budget that does not pay the inner attack's least search, the plain picture and one text's is refused.
        See :meth:`expunge.method.Attack.attack`.

        Raises:
            CatalogueError: ``inner`` is no attack on such models, or ``origin`` no eraser.
            InputError: ``file`` or an entry of it cannot be read.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        original = model if reference is None else reference
        meter = Meter(model, original)
        with original.lifted():
            forbidden = Forbidden(original.tokenizer, concept, len(original.token_table()))
        given = _entries([*self.texts, *_read(self.file)])

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            """Some prompts in lock step."""
            ledger = Ledger(len(part), budget.denoiser_rows)
            shown = (model, concept, judge, part, ledger)
            trials = Trials(*shown, steps=self.steps, guidance=self.guidance)
            details: list[dict[str, Any]] = [{} for _ in part]
            item = trials.open.nonzero().flatten().tolist()
            if given:
                found = [_matching(given, part[i]) for i in item]
            else:
                asked = [part[i] for i in item]
                searched = self._searched(
                    original, concept, judge, budget, asked, trials.price, seed
                )
                found = [texts for texts, _ in searched]
                for i, (_, rows) in zip(item, searched, strict=True):
                    ledger.spend([i], rows)
                    details[i]["inner_rows"] = rows
            self._try(trials, item, found, forbidden, details)
            return trials, trials.attempts(details)

        items, pictures = in_batches(prompts, self.batch, one)
        return assembled(self, judge, budget, seed, items, pictures, meter.read())

    def _try(
        self, trials: Trials, item: Sequence[int], found: Sequence[Sequence[str]], forbidden: Forbidden,
        details: list[dict[str, Any]],
    ) -> None:  # fmt: skip
        """Show each item its texts, one of every open item at a time."""
        queues: list[list[str]] = []
        for i, texts in zip(item, found, strict=True):
            limit = forbidden.count(trials.prompts[i].text)
            good = [text for text in dict.fromkeys(texts) if forbidden.count(text) <= limit]
            queues.append(good[: self.pictures])
            details[i] |= {"found": good, "naming": len(set(texts)) - len(good)}
        for number in range(self.pictures):
            pays = trials.open & trials.ledger.affords(trials.price)
            now = [
                (i, own[number])
                for i, own in zip(item, queues, strict=True)
                if number < len(own) and bool(pays[i])
            ]
            if not now:
                break
            trials.show([i for i, _ in now], [text for _, text in now])

    def _searched(
        self, original: Any, concept: Concept, judge: Judge, budget: Budget, asked: Sequence[Prompt],
        price: int, seed: int,
    ) -> list[tuple[list[str], int]]:  # fmt: skip
        """Texts the inner attack found for each prompt, and the denoiser rows that cost it."""
        if not asked:
            return []
        left = budget.denoiser_rows
        if left is not None:
            left = max(0, left - price * (1 + self.pictures))
        allowance = dataclasses.replace(budget, denoiser_rows=left)
        inner = self._inner(original, allowance, concept)
        with original.lifted():
            state = (original.state.key, original.protocol_key)
        given = Edit.load(self.origin) if self._by_file else None
        # A file may be written anew while the process lives; what is in it names the surrogate.
        origin = self.origin if given is None else given.digest
        shared = (self.id, self.version, inner.id, inner.version, inner.settings(), origin, state, concept,
                  judge.protocol, allowance, seed)  # fmt: skip
        keys = [repr((*shared, prompt)) for prompt in asked]

        def search(new: list[int]) -> list[tuple[list[str], int]]:
            with self._opened(original, concept, seed, given) as owned:
                heard = Unheeding(judge) if self.origin == "original" else judge
                made = inner.attack(
                    owned, concept, heard, allowance, prompts=[asked[k] for k in new],
                    reference=original, seed=seed,
                )  # fmt: skip
            most = allowance.denoiser_rows or 0
            return [(_found(item), int(item.details.get("rows", most))) for item in made.items]

        return remembered(keys, search, original)

    def _inner(self, original: Any, allowance: Budget, concept: Concept) -> Attack:
        """The inner attack under its own preset, with this attack's pictures."""
        found = catalogue.resolve(self.inner)
        if not issubclass(found, Attack) or issubclass(found, Transfer):
            raise CatalogueError(
                f"{self.id}: inner is {self.inner!r}; allowed is the id of an attack that searches texts"
            )
        names = {field.name for field in dataclasses.fields(found)}
        same = {"steps": self.steps, "guidance": self.guidance, "batch": self.batch}
        made = found.configured(
            found.preset_for(concept.kind, allowance.name),
            **{k: v for k, v in same.items() if k in names},
        )
        original.check_family(made)
        return made

    @contextlib.contextmanager
    def _opened(
        self, original: Any, concept: Concept, seed: int, given: Edit | None
    ) -> Iterator[Any]:
        """The model that texts are searched on; ``given``: the surrogate's edit, where a file holds it."""
        if self.origin == "original":
            with original.lifted():
                yield original
        elif self._on_original:
            with original.lifted():
                # An eraser fits the original, so that is lifted first.
                surrogate = self._made(original, concept, seed) if given is None else given
                with surrogate.on(original):
                    yield original
        else:
            yield load(self.origin).beside(original)

    @property
    def _on_original(self) -> bool:
        """Whether the model that texts are searched on is the original, as it is or edited."""
        return self.origin == "original" or self._by_file or self._eraser() is not None

    @property
    def _by_file(self) -> bool:
        return self.origin.endswith(".safetensors")

    def _eraser(self) -> type[Eraser] | None:
        ids = [system.id for system in catalogue.implemented("erase", "diffusion")]
        return catalogue.resolve(self.origin) if self.origin in ids else None

    def _made(self, original: Any, concept: Concept, seed: int) -> Edit:
        """The edit of the eraser that is named, made once for the process."""
        eraser = self._eraser()
        assert eraser is not None
        method = eraser.configured(
            eraser.preset_for(concept.kind, "world" if original.companions is not None else None)
        )
        settings = (method.id, method.version, method.settings(), original.state.key, concept, seed)
        key = repr(("surrogate", *settings))
        if key not in SHARED.results:
            SHARED.results[key] = method.erase(original, concept, seed=seed)
        found: Edit = SHARED.results[key]
        return found


class Unheeding(Judge):
    """A judge's scores without its verdicts: no picture counts as a success, so a search goes on to its end."""

    def __init__(self, judge: Judge) -> None:
        self.judged, self.id = judge, judge.id
        self.protocol, self.threshold = f"{judge.protocol}/unheeded", judge.threshold

    def judge(self, outputs: Any, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """Verdicts on ``n`` outputs, no hit among them."""
        made = self.judged.judge(outputs, concept, prompts)
        return dataclasses.replace(made, hit=np.zeros(len(outputs), bool))


def _found(item: Attempt) -> list[str]:
    """Every text that an attempt names as found, the one it showed first."""
    texts = [item.text] if item.text else []

    def walk(value: Any) -> None:
        if isinstance(value, Mapping):
            texts.extend(
                v for k, v in value.items() if k in ("found", "text") and isinstance(v, str)
            )
            for inner in value.values():
                walk(inner)
        elif isinstance(value, (list, tuple)):
            for inner in value:
                walk(inner)

    walk(item.details)
    return list(dict.fromkeys(text for text in texts if text.strip()))


def _read(file: str) -> list[str]:
    """Entries of a JSON file, each as a text."""
    if not file:
        return []
    try:
        data = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"transfer: {Path(file).name} cannot be read as JSON ({error})") from None
    if not isinstance(data, list):
        raise InputError(
            f"transfer: {Path(file).name} holds {type(data).__name__}; allowed is a list"
        )
    return [entry if isinstance(entry, str) else json.dumps(entry) for entry in data]


def _entries(texts: Sequence[str]) -> list[tuple[str | None, int | None, str]]:
    """(prompt, seed, text) of each entry; prompt and seed are ``None`` where it is for all."""
    found: list[tuple[str | None, int | None, str]] = []
    for number, text in enumerate(texts, 1):
        entry: Any = text
        if text.lstrip().startswith("["):
            with contextlib.suppress(json.JSONDecodeError):
                entry = json.loads(text)
        match entry:
            case str() if entry.strip():
                found.append((None, None, entry))
            case [str() as prompt, int() as seed, str() as own] if own.strip():
                found.append((prompt, seed, own))
            case _:
                raise SettingError(
                    f'transfer: entry {number} of texts is {text[:60]!r}; allowed is a text or ["prompt", seed, "text"]'
                )
    return found


def _matching(given: Sequence[tuple[str | None, int | None, str]], prompt: Prompt) -> list[str]:
    """The texts that are for a prompt."""
    return [t for p, s, t in given if p is None or (p == prompt.text and s == prompt.seed)]
