"""The contract battery: what every method must keep, one small named check each.

    for name, check in checks_for(MyMethod):
        check()                      # raises AssertionError in words
    check_method(MyMethod)           # all of them; one error that lists what failed

It runs on tiny random models, so it says nothing about whether a method works: that is for its claims.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..edit import Edit
from ..errors import ExpungeError, SettingError, UnsupportedModel
from ..method import Attack, Attempts, Eraser, Method
from ..models.base import Model
from . import bench as on
from .resuming import a_killed_run_resumes_to_the_same_edit

__all__ = ["check_method", "checks_for"]

Check = Callable[[], None]


def check_method(method: type[Method]) -> None:
    """Run the whole battery on a method's class; AssertionError with a line for each failed check."""
    failed = []
    for name, check in checks_for(method):
        try:
            check()
        except Exception as error:  # every check is run, whatever the others do
            failed.append(f"{name}: {error or type(error).__name__}")
    if failed:
        raise AssertionError(f"{method.__name__} breaks the contract:\n" + "\n".join(failed))


def checks_for(method: type[Method]) -> Iterator[tuple[str, Check]]:
    """``(name, callable)`` of every check that applies; each can be run alone and in any order.

    Checks that need a model are left out for families without a tiny model here.
    """
    checks = [*STATIC]
    if on.bench(method) is not None:
        if issubclass(method, Eraser):
            checks += [wrong_family, *ERASER]
        elif issubclass(method, Attack):
            checks += [wrong_family, *ATTACK]
    for check in checks:
        yield check.__name__.replace("_", " "), _bound(check, method)


def _bound(check: Callable[[type[Method]], None], method: type[Method]) -> Check:
    def run() -> None:
        _forget_pictures()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check(method)

    return run


def _forget_pictures() -> None:
    # Pictures that were drawn before are served from memory, which would hide a raising model.
    from ..core.sampling import SHARED

    SHARED.clear()


# -- without a model -------------------------------------------------------------------------------


def class_variables_are_filled(method: type[Method]) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.id), (
        f"id {method.id!r} is not a catalogue id"
    )
    for name in ("title", "source", "families"):
        assert getattr(method, name), f"{name} is empty"
    assert isinstance(method.families, tuple), "families is not a tuple"
    assert isinstance(method.version, int) and method.version >= 1, "version is not from 1 on"


def docstring_names_the_source(method: type[Method]) -> None:
    import inspect

    module = inspect.getmodule(method)
    text = f"{method.__doc__ or ''} {getattr(module, '__doc__', '') or ''}"
    assert method.__doc__, "the class has no docstring"
    number = re.search(r"\d{4}\.\d{4,5}", method.source)
    wanted = number.group() if number else method.source
    assert wanted in text, f"neither class nor module docstring names the source {wanted}"


def defaults_construct(method: type[Method]) -> None:
    made = method()
    assert method(**made.settings()) == made, "settings() does not rebuild the method"


def settings_are_stored_unchanged(method: type[Method]) -> None:
    made = on.quick(method)
    for name, value in on.quick(method).settings().items():
        assert getattr(made, name) == value and made.settings()[name] == value, (
            f"{name} was changed"
        )
    for field in dataclasses.fields(method):
        assert field.metadata.get("help"), f"setting {field.name} has no help"
        assert made.settings()[field.name] is getattr(made, field.name)
    assert copy.copy(made) == made


def settings_are_frozen(method: type[Method]) -> None:
    made = method()
    for field in dataclasses.fields(method):
        try:
            setattr(made, field.name, getattr(made, field.name))
        except dataclasses.FrozenInstanceError:
            continue
        raise AssertionError(f"{field.name} can be set after construction")


def unknown_setting_is_refused_with_the_nearest_name(method: type[Method]) -> None:
    names = [field.name for field in dataclasses.fields(method)] or ["anything"]
    for name in names:
        wrong = f"{name}x"
        try:
            method.configured(None, **{wrong: 1})
        except SettingError as error:
            near = name in str(error) or not dataclasses.fields(method)
            assert wrong in str(error) and near, f"the sentence does not help: {error}"
            continue
        raise AssertionError(f"the unknown setting {wrong!r} was accepted")


def presets_construct(method: type[Method]) -> None:
    for preset, changes in method.presets.items():
        made = method.configured(preset)
        for name, value in changes.items():
            assert made.settings()[name] == value, f"preset {preset!r} does not set {name}"
    try:
        method.configured("no such preset")
    except SettingError:
        return
    raise AssertionError("an unknown preset was accepted")


STATIC = (
    class_variables_are_filled, docstring_names_the_source, defaults_construct,
    settings_are_stored_unchanged, settings_are_frozen,
    unknown_setting_is_refused_with_the_nearest_name, presets_construct,
)  # fmt: skip


# -- shared by erasers and attacks -------------------------------------------------------------------


def _run(
    method: type[Method], model: Model, *, seed: int = 0, fails: bool = False, **more: Any
) -> Any:
    bench = _bench(method)
    made = on.quick(method)
    if isinstance(made, Eraser):
        options = {"keep": bench.keep, "data": bench.data, "judge": bench.judge(fails), **more}
        concepts = options.pop("concepts", bench.concept)
        return made.erase(model, concepts, seed=seed, **options)
    assert isinstance(made, Attack)
    judge = bench.judge(fails)
    return made.attack(model, bench.concept, judge, on.ROWS, prompts=bench.prompts, seed=seed)


def _bench(method: type[Method]) -> on.Bench:
    found = on.bench(method)
    assert found is not None, "no tiny model of this family"
    return found


@contextlib.contextmanager
def _untouched(model: Model, when: str) -> Iterator[None]:
    """Asserts that the block leaves model and process as they were."""
    before = on.trace(model)
    yield
    after = on.trace(model)
    changed = [k for k in {**before, **after} if before.get(k) != after.get(k)]
    assert not changed, f"after {when}, changed: {', '.join(changed[:4])}"


def wrong_family(method: type[Method]) -> None:
    """Refused in words and before any work."""
    model = _bench(method).other()
    if model.family in method.families:
        return
    with _untouched(model, "the wrong family"):
        try:
            _run(method, model)
        except UnsupportedModel as error:
            assert model.family in str(error), f"the sentence does not name the family: {error}"
        else:
            raise AssertionError("a model of another family was accepted")
    assert not model.cost.counts, "work was done on a model of another family"


def nothing_is_left_behind_after_success(method: type[Method]) -> None:
    model = _bench(method).opens()
    with _untouched(model, "success"):
        _run(method, model)


def nothing_is_left_behind_with_gradients_off(method: type[Method]) -> None:
    model = _bench(method).opens()
    with torch.no_grad(), _untouched(model, "success within no_grad"):
        _run(method, model)


def nothing_is_left_behind_by_a_raising_model(method: type[Method]) -> None:
    """The first and the last call that each part gets in a whole run are made to raise."""
    opens = _bench(method).opens
    model = opens()
    with on.calls_of(model) as counts:
        _run(method, model)
    for part, count in counts.items():
        for call in sorted({1, count}) if count else ():
            _forget_pictures()
            model = opens()
            with on.failing(model, part, call), _untouched(model, f"call {call} of {part} raised"):
                try:
                    _run(method, model)
                except on.Raised:
                    pass
                else:
                    raise AssertionError(f"the error raised by call {call} of {part} was swallowed")


# -- erasers -----------------------------------------------------------------------------------------


def erase_returns_an_edit_with_its_provenance(method: type[Method]) -> None:
    """The manifest names method, concepts, base, settings, seed and targets, and something changes."""
    bench = _bench(method)
    model = bench.opens()
    edit = _run(method, model, seed=3)
    assert isinstance(edit, Edit), f"erase returned {type(edit).__name__}"
    manifest = edit.manifest
    assert (manifest.method, manifest.version) == (method.id, method.version)
    assert [c["name"] for c in manifest.concepts] == [bench.concept.name]
    assert manifest.seed == 3 and manifest.keep == list(bench.keep)
    assert set(manifest.settings) == {field.name for field in dataclasses.fields(method)}
    assert manifest.base["components"] and manifest.fitted_on == []
    assert manifest.targets or manifest.acts or manifest.tokens, "the edit names no tensor"
    assert {t.name for t in manifest.targets} <= set(model.tensors())
    assert manifest.cost == {k: v for k, v in manifest.cost.items() if v > 0}
    changes = [edit.change(t.name, model.tensors()[t.name]).abs().max() for t in manifest.targets]
    assert not changes or max(map(float, changes)) > 0, "the edit changes nothing"


def same_seed_gives_an_equal_edit(method: type[Method]) -> None:
    opens = _bench(method).opens
    first, second = _run(method, opens(), seed=1), _run(method, opens(), seed=1)
    assert first.digest == second.digest, "two runs with one seed differ"
    model = opens()
    torch.rand(3)  # the global random state is somewhere else now
    assert _run(method, model, seed=1).digest == first.digest, (
        "the edit depends on global randomness"
    )
    other = _run(method, opens(), seed=2)
    assert other.digest != first.digest, "the digest does not tell seeds apart"


def edits_survive_saving(method: type[Method]) -> None:
    edit = _run(method, _bench(method).opens())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "edit.safetensors"
        edit.save(path)
        again = Edit.load(path)
        assert [p.name for p in Path(folder).iterdir()] == [path.name], "files were left behind"
    assert again.digest == edit.digest and again.manifest == edit.manifest
    assert all(torch.equal(again.tensors[n], t) for n, t in edit.tensors.items())


def apply_and_revert_are_bit_exact(method: type[Method]) -> None:
    """Weights, tokenizers and token tables, and what acts: all of it on, then all as it was."""
    model = _bench(method).opens()
    edit = _run(method, model)
    with _untouched(model, "apply and revert"):
        on.check_shows(edit, model)
        with contextlib.suppress(on.Raised), edit.on(model):
            raise on.Raised


def bad_concepts_are_refused(method: type[Method]) -> None:
    """None, one twice, what is no name, and one that is to be kept at the same time."""
    bench = _bench(method)
    wrong: list[Any] = [[], [bench.concept, bench.concept], "", 3.5]
    asked: list[dict[str, Any]] = [{"concepts": bad} for bad in wrong]
    for more in [*asked, {"keep": [*bench.keep, bench.concept.name.upper()]}]:
        model = bench.opens()
        with _untouched(model, f"the bad input {more!r}"):
            try:
                _run(method, model, **more)
            except (ExpungeError, TypeError):
                continue
        raise AssertionError(f"{more!r} was accepted")


ERASER = (
    erase_returns_an_edit_with_its_provenance, same_seed_gives_an_equal_edit, edits_survive_saving,
    apply_and_revert_are_bit_exact, bad_concepts_are_refused, nothing_is_left_behind_after_success,
    nothing_is_left_behind_with_gradients_off, nothing_is_left_behind_by_a_raising_model,
    a_killed_run_resumes_to_the_same_edit,
)  # fmt: skip


# -- attacks -----------------------------------------------------------------------------------------


def attack_returns_one_attempt_a_prompt(method: type[Method]) -> None:
    bench = _bench(method)
    found = _run(method, bench.opens(), seed=3)
    assert isinstance(found, Attempts), f"attack returned {type(found).__name__}"
    assert (found.attack, found.version, found.seed) == (method.id, method.version, 3)
    assert found.teaches == getattr(method, "teaches", None)
    assert found.budget == on.ROWS.name and found.threshold == on.NeverShown.threshold
    assert [item.prompt for item in found.items] == list(bench.prompts), "not one item a prompt"
    assert len(found.outputs) == len(bench.prompts), "not one output a prompt"
    assert set(found.settings) == {field.name for field in dataclasses.fields(method)}
    assert not any(item.hit or item.pre_hit for item in found.items), "a hit the judge did not give"


def the_budget_is_respected(method: type[Method]) -> None:
    bench = _bench(method)
    model = bench.opens()
    before = model.cost.snapshot()
    found = _run(method, model)
    counted = model.cost.since(before)
    assert found.cost == counted, f"reported cost {found.cost} is not the counted one {counted}"
    rows = max(model.cost.rows(part, before) for part in ("denoiser", "language"))
    allowed = (on.ROWS.denoiser_rows or 0) * len(bench.prompts)
    assert 0 < rows <= allowed, f"{rows} rows for a budget of {allowed}"


def adversarial_texts_do_not_name_the_concept(method: type[Method]) -> None:
    """Beyond what the prompt itself says, no attempt's text holds the name or a phrase."""
    bench = _bench(method)
    for item in _run(method, bench.opens()).items:
        for word in bench.concept.names:
            said = (item.text or "").lower().count(word.lower())
            assert said <= item.prompt.text.lower().count(word.lower()), (
                f"the text {item.text!r} adds the forbidden {word!r}"
            )


def same_seed_gives_equal_attempts(method: type[Method]) -> None:
    opens = _bench(method).opens
    first = _run(method, opens(), seed=1)
    _forget_pictures()
    second = _run(method, opens(), seed=1)
    assert [(i.text, i.score) for i in first.items] == [(i.text, i.score) for i in second.items]
    same = [bool((torch.as_tensor(a) == torch.as_tensor(b)).all()) if not isinstance(a, str) else a == b
            for a, b in zip(first.outputs, second.outputs, strict=True)]  # fmt: skip
    assert all(same), "two runs with one seed show different outputs"


def nothing_is_left_behind_by_a_raising_judge(method: type[Method]) -> None:
    model = _bench(method).opens()
    with _untouched(model, "a judge raised"):
        try:
            _run(method, model, fails=True)
        except on.Raised:
            return
        raise AssertionError("the error of the judge was swallowed")


def bad_prompts_are_refused(method: type[Method]) -> None:
    bench = _bench(method)
    made = on.quick(method)
    assert isinstance(made, Attack)
    model = bench.opens()
    with _untouched(model, "a prompt that is no text"):
        try:
            made.attack(model, bench.concept, bench.judge(False), on.ROWS, prompts=[None])  # type: ignore[list-item]
        except ExpungeError:
            return
    raise AssertionError("a prompt that is no text was accepted")


ATTACK = (
    attack_returns_one_attempt_a_prompt, the_budget_is_respected,
    adversarial_texts_do_not_name_the_concept, same_seed_gives_equal_attempts,
    bad_prompts_are_refused, nothing_is_left_behind_by_a_raising_judge,
    nothing_is_left_behind_after_success, nothing_is_left_behind_with_gradients_off,
    nothing_is_left_behind_by_a_raising_model,
)  # fmt: skip
