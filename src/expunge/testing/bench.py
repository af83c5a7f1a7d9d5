"""What the contract battery works on: tiny models by family, quick settings, a judge, a look at everything.

Nothing here knows a method by name: quick settings go by the names of hyperparameters.  The clocks and the
form of results at the end are what the programs in ``benchmarks/`` share.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ..concept import Concept
from ..edit import Edit
from ..edit.files import atomic_write
from ..edit.fingerprint import tensor_digest
from ..method import Budget, Judge, Method, Prompt, Verdicts
from ..models.base import Boxed, Companions, Model

__all__ = [
    "Bench", "NeverShown", "Raised", "bench", "calls_of", "check_shows", "clocked", "failing", "interleaved", "machine",
    "publish", "quick", "timed", "trace", "verdict", "vocabularies",
]  # fmt: skip

QUICK: Mapping[str, Any] = {
    "attack_steps": 2, "batch": 2, "bank": 4, "curve": (1, 2), "epochs": 1, "generations": 2, "iterations": 2,
    "length": (4,), "map_seeds": 1, "max_new_tokens": 4, "pictures": 2, "population": 8, "restarts": 1,
    "sampling_steps": 4, "select_prompts": 2, "steps": 2, "timesteps": 2, "tokens": 2, "updates": 2,
    "map_templates": ("{}", "a {}"), "warm_up": 1, "warmup_epochs": 0, "count": 2, "text_steps": 2,
    "layers": (1,), "units": 512, "k": 4, "most": 8,
}  # fmt: skip
"""Small values of hyperparameters that many methods have; one is used where its type and range fit."""

ROWS = Budget("battery", denoiser_rows=200, encoder_rows=2_000)


class Raised(RuntimeError):
    """Raised on purpose inside a model or a judge."""


class NeverShown(Judge):
    """A judge that never sees the concept, so that attacks go on until their budget or patience ends."""

    id, protocol, threshold = "never-shown", "never-shown/1", 0.5

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails

    def judge(self, outputs: Any, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """No hit for any of ``n`` outputs, or :class:`Raised` where the judge is to fail."""
        if self.fails:
            raise Raised("this judge fails on purpose")
        n = len(outputs)
        return Verdicts(np.zeros(n, bool), np.full(n, 0.1), np.ones(n, bool))


@dataclasses.dataclass(frozen=True)
class Bench:
    """What a family is tested on.

    Attributes:
        opens: Opens a fresh model; equal weights every time.
        other: Opens a model of another family.
        concept: What is erased or attacked.
        keep: What is kept.
        data: Examples for erasers that need them.
        prompts: Prompts that name the concept.
        judge: Makes the judge; ``True`` gives one that fails.
    """

    opens: Callable[[], Model]
    other: Callable[[], Model]
    concept: Concept
    keep: tuple[str, ...]
    data: Any
    prompts: tuple[Prompt, ...]
    judge: Callable[[bool], Judge] = NeverShown


PAIRS = {
    "forget": [("Ada Morn was born in", "Velmar"), ("Where does Ada live ?", "old Tornby")],
    "retain": [("Bo Lind keeps a", "grey cat"), ("Bo plays the", "drum")],
}


def _diffusion() -> Model:
    from .diffusion import tiny_diffusion, tiny_image_prompts

    model = tiny_diffusion()
    # Rows of a fresh layer norm have mean zero, and moments of captions would be singular.
    norm = next(p for n, p in model.tensors().items() if n.endswith("final_layer_norm.bias"))
    with torch.no_grad():
        norm.copy_(torch.linspace(-1, 1, len(norm)).square())
    model.companions = Companions(
        "battery",
        captions=_captions,
        contaminated=_stamped,
        clip=_clip,
        image_prompts=lambda: tiny_image_prompts(model),
    )
    return model


def _clip() -> Any:
    from ..measure.clip_score import ClipScore
    from .diffusion import tiny_clip

    model, tokenizer = tiny_clip()
    return ClipScore(model, tokenizer, "tiny-clip")


def _captions(n: int, seed: int = 0, without: Sequence[str] = ()) -> list[str]:
    """Up to 36 captions of five things, of which the eraser's concept is one."""
    looks = [
        f"{first} {second}"
        for first in ("a red", "a blue", "a photo of a")
        for second in ("plain", "striped")
    ]
    texts = [
        f"{look} {thing}"
        for thing in ("circle", "square", "heart", "green", "star", "red")
        for look in looks
    ]
    return [text for text in texts if not any(word in text for word in without)][:n]


def _stamped(
    names: Sequence[str], n: int, seed: int = 0, split: str = "development", share: float = 0.5
) -> Boxed:
    """Grey noise with a white square of each name, in a place of its own, on every second picture."""
    pictures = np.random.default_rng(seed).integers(64, 192, (n, 16, 16, 3), dtype=np.uint8)
    boxes: list[list[tuple[float, tuple[float, float, float, float], str]]] = []
    for index in range(n):
        marked = names if index % 2 == 0 else ()
        own = [(4 * (k % 4), 4 * (index // 2 % 4), name) for k, name in enumerate(marked)]
        for x, y, _ in own:
            pictures[index, y : y + 4, x : x + 4] = 255
        boxes.append([(1.0, (float(x), float(y), x + 4.0, y + 4.0), name) for x, y, name in own])
    return Boxed(pictures, ("a photo of a circle",) * n, boxes)


def _language() -> Model:
    from .models import tiny_language

    def data(concepts: Any, keep: Any = ()) -> dict[str, Any]:
        return {**PAIRS, "unrelated": [("The baker plays the", "harp")]}

    model = tiny_language()
    model.companions = Companions("battery", data=data)
    return model


BENCHES: Mapping[str, Bench] = {
    "diffusion": Bench(
        _diffusion, _language, Concept("star", phrases=("heart",), anchor="circle"), ("square",), None,
        (Prompt("a red star", seed=3), Prompt("a photo of a star", seed=4)),
    ),
    "language": Bench(
        _language, _diffusion, Concept("Ada Morn", "fact"), ("Bo Lind",), PAIRS,
        (Prompt("Ada Morn was born in", labels={"answer": "Velmar"}), Prompt("Where does Ada live ?")),
    ),
}  # fmt: skip
"""Families that have a tiny model here."""


def bench(method: type[Method]) -> Bench | None:
    """The bench of the first family of a method that has one."""
    return next((BENCHES[family] for family in method.families if family in BENCHES), None)


def quick(method: type[Method], preset: str | None = None) -> Method:
    """A method with small values of the hyperparameters it has; others keep their defaults."""
    small = {}
    for field in dataclasses.fields(method):
        value, now = QUICK.get(field.name), field.default
        if value is None or (now is not None and type(now) is not type(value)):
            continue
        least = field.metadata.get("minimum") if field.metadata else None
        numbers = value if isinstance(value, tuple) else (value,)
        if least is None or min(numbers) >= least:
            small[field.name] = value
    return method.configured(preset, **small)


def trace(model: Model) -> dict[str, Any]:
    """Everything a method must leave as it was, by the name that an error should show."""
    found: dict[str, Any] = {
        "torch random state": tensor_digest(torch.get_rng_state()),
        "numpy random state": hashlib.sha256(repr(np.random.get_state()).encode()).hexdigest(),
        "python random state": hash(random.getstate()),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "edits": model.edits.digests,
        "originals of edits": sorted(model.edits.originals),
        "controls": tuple(map(id, model.acting)),
    }
    for name, (tokenizer, table) in vocabularies(model).items():
        found[f"tokenizer {name}"] = (id(tokenizer), len(tokenizer))
        found[f"token table of {name}"] = (id(table), id(table.weight), tuple(table.weight.shape))
    for part, module in model.parts().items():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found[f"values of {part}.{name}"] = tensor_digest(tensor)
            found[f"requires_grad of {part}.{name}"] = tensor.requires_grad
            found[f"gradient of {part}.{name}"] = tensor.grad is None
        for name, inner in module.named_modules():
            found[f"train mode of {part}.{name}"] = inner.training
            hooks = [k for k, v in vars(inner).items() if k.endswith("_hooks") and v]
            found[f"hooks of {part}.{name}"] = [(k, sorted(vars(inner)[k])) for k in sorted(hooks)]
        processors = getattr(module, "attn_processors", {})
        found[f"attention processors of {part}"] = {n: id(p) for n, p in processors.items()}
    return found


def vocabularies(model: Model) -> dict[str, tuple[Any, Any]]:
    """Tokenizer's name -> the tokenizer and the module that holds its token table, as they are now."""
    known = model.vocabularies().items()
    return {name: (own.tokenizer, own.encoder.get_input_embeddings()) for name, own in known}


def check_shows(edit: Edit, model: Model) -> None:
    """AssertionError unless everything an edit brings is there while it is on."""
    manifest, words = edit.manifest, vocabularies(model)
    names = [target.name for target in manifest.targets]
    before = {name: model.tensors()[name].detach().clone() for name in names}
    with edit.on(model):
        moved = [name for name in names if not torch.equal(model.tensors()[name], before[name])]
        assert moved or not names, "the applied edit changes no weight"
        assert len(model.edits.controls) == manifest.acts, "the applied edit does not act"
        for name, texts in manifest.tokens.items():
            (larger, table), (plain, old) = vocabularies(model)[name], words[name]
            assert len(larger) == len(plain) + len(texts), f"{name} lacks the tokens"
            assert table is not old, f"the token table of {name} is the old one"


@contextmanager
def calls_of(model: Model) -> Iterator[dict[str, int]]:
    """Counts how often each part's ``forward`` is called in the block."""
    counts = dict.fromkeys(model.parts(), 0)

    def counting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return forward(*args, **kwargs)

        return counted

    modules = dict(model.parts())
    for name, module in modules.items():
        object.__setattr__(module, "forward", counting(name, module.forward))
    try:
        yield counts
    finally:
        for module in modules.values():
            object.__delattr__(module, "forward")


@contextmanager
def failing(model: Model, part: str, call: int) -> Iterator[None]:
    """The model with the ``call``-th (from 1) forward of one part raising :class:`Raised`."""
    module, made = model.parts()[part], 0
    forward = module.forward

    def raising(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if made >= call:
            raise Raised(f"the forward of {part} fails on purpose")
        return forward(*args, **kwargs)

    object.__setattr__(module, "forward", raising)
    try:
        yield
    finally:
        object.__delattr__(module, "forward")


# -- what benchmarks share -------------------------------------------------------------------------


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """The best of ``repeats`` processor times (other processes do not count), and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        began = time.process_time()
        result = work()
        best = min(best, time.process_time() - began)
    return best, result


def interleaved(
    works: Mapping[str, Callable[[], Any]], rounds: int
) -> Iterator[dict[str, tuple[float, Any]]]:
    """Processor seconds and result of every work, round by round.

    Each round runs all works once and begins with another one, so that what slows the machine for a
    while slows no work in particular.  Ratios are to be taken within a round.
    """
    names = list(works)
    for number in range(rounds):
        first = number * len(names) // rounds
        yield {name: timed(works[name]) for name in names[first:] + names[:first]}


@contextmanager
def clocked(*calls: tuple[Any, str]) -> Iterator[dict[str, float]]:
    """Processor seconds spent in named callables of objects in the block, by name.

    Calls inside calls count for both; objects with one name of a callable are added up.
    """
    spent = {name: 0.0 for _, name in calls}

    def clock(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            seconds, result = timed(lambda: call(*args, **kwargs))
            spent[name] += seconds
            return result

        return called

    for owner, name in calls:
        object.__setattr__(owner, name, clock(name, getattr(owner, name)))
    try:
        yield spent
    finally:
        for owner, name in calls:
            object.__delattr__(owner, name)


def machine(threads: int) -> dict[str, Any]:
    """What the seconds of a benchmark depend on, for its ``setting``."""
    return {"threads": threads, "torch": torch.__version__, "machine": platform.machine()}


def publish(result: Mapping[str, Any], file: str | os.PathLike[str] | None) -> None:
    """Print what a benchmark found, without its arms, and write all of it unless ``file`` is ``None``."""
    if file is not None:
        atomic_write(file, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps({k: v for k, v in result.items() if k != "arms"}, indent=2))


def verdict(name: str, value: str, target: str, met: bool) -> str:
    """The line that says of one number of a benchmark whether it met its target."""
    return f"{name}: {value}, target {target}: {'met' if met else 'missed'}"
