"""Attacks on all arms at one budget, and what their hit rates are worth.

A searching attack must succeed on the original (else it is void) and fail on the never model (else it
measures nothing: it makes the judge see the concept in a model that has none).  A teaching attack may
succeed on never; then only its advantage over never counts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..concept import Concept
from ..core import kept_attempts
from ..core.sampling import OutputCache
from ..errors import CatalogueError, ExpungeError, SettingError, nearest
from ..measure.success import DENOMINATORS, attack_success
from ..method import Attack, Attempts, Budget, Judge, Prompt
from .arms import Arm
from .curves import advantage_curve
from .measuring import Notes
from .schema import ARMS, AttackRecord
from .statistics import MINIMUM_RANGE, bootstrap_difference, measures_nothing, rate, recovered

__all__ = ["CONVENTIONS", "Attacked", "attack_arms", "attack_record", "choose"]

CONVENTIONS = tuple(name for name in DENOMINATORS if name != "all-prompts")


@dataclasses.dataclass
class Attacked:
    """What one attack did to the arms; an arm where it stopped with an error is missing.

    Attributes:
        seconds: Arms that were attacked now.
        found: Arms whose attempts were kept from an earlier audit.
        left_out: Why the attack was not run at all.
    """

    attack: Attack
    attempts: dict[str, Attempts]
    seconds: dict[str, float]
    failures: dict[str, str]
    found: tuple[str, ...] = ()
    left_out: str | None = None


def choose(
    attacks: Any, family: str, allowance: Budget, kind: str | None = None
) -> tuple[Attack, ...]:
    """Attacks from ``all``, ``none``, ids (one, several, or comma-separated) or attack objects.

    An id stands for the attack's preset of the budget's name, else for the paper's for ``kind``, the
    kind of the concepts; an object keeps its own settings.

    Raises:
        CatalogueError: An unknown or planned id, or an attack that is not for this family.
        SettingError: Something that is neither an id nor an attack.
    """
    from .. import catalogue

    if attacks is None or attacks == "none":
        return ()
    if attacks == "all":
        attacks = [system.id for system in catalogue.implemented("attack", family)]
    if isinstance(attacks, str):
        attacks = [part.strip() for part in attacks.split(",") if part.strip()]
    elif isinstance(attacks, Attack) or not isinstance(attacks, Iterable):
        attacks = [attacks]
    chosen = []
    for entry in attacks:
        if isinstance(entry, str):
            found = catalogue.resolve(entry)
            if not (isinstance(found, type) and issubclass(found, Attack)):
                ids = [s.id for s in catalogue.implemented("attack")]
                raise CatalogueError(f"{entry!r} is not an attack{nearest(entry, ids)}")
            entry = found.under(allowance, kind)
        if not isinstance(entry, Attack):
            raise SettingError(f"attacks holds {entry!r}; allowed are ids and Attack objects")
        if family not in entry.families:
            raise CatalogueError(
                f"{entry.id} attacks {', '.join(entry.families)} models; this is a {family} model"
            )
        chosen.append(entry)
    ids = [attack.id for attack in chosen]
    for name in ids:
        if ids.count(name) > 1:
            raise SettingError(f"attack {name!r} was given twice")
    return tuple(chosen)


def attack_arms(
    attack: Attack,
    arms: Sequence[Arm],
    concept: Concept,
    judge: Judge,
    allowance: Budget,
    prompts: Sequence[Prompt],
    *,
    reference: Any,
    seed: int,
    cache: OutputCache | None,
) -> Attacked:
    """Run one attack on every arm with the same prompts, seed and budget.

    What an attack did to the original or the never model does not depend on the edit under audit,
    so it is kept in the cache for the next audit.  ``reference`` is the original model; without one, an
    attack that needs it is not run.
    """
    done = Attacked(attack, {}, {}, {})
    if reference is None and attack.needs_reference(concept):
        done.left_out = "it needs the original model, and there is none"
        return done
    for arm in arms:
        with arm.ready() as model:
            kept = cache if not model.controls else None
            key = _key(attack, model, concept, judge, allowance, prompts, reference, seed)
            known = kept_attempts.recall(kept, key) if kept is not None else None
            start = time.perf_counter()
            try:
                attempts = known or attack.attack(
                    model,
                    concept,
                    judge,
                    allowance,
                    prompts=prompts,
                    reference=reference,
                    seed=seed,
                )
            except ExpungeError as error:
                done.failures[arm.name] = str(error)
                continue
            if known is not None:
                done.found = (*done.found, arm.name)
            else:
                done.seconds[arm.name] = time.perf_counter() - start
                if kept is not None:
                    kept_attempts.keep(kept, key, attempts)
            done.attempts[arm.name] = attempts
    return done


def _key(attack: Attack, model: Any, concept: Concept, judge: Judge, allowance: Budget,
         prompts: Sequence[Prompt], reference: Any, seed: int) -> str:  # fmt: skip
    # Everything that can change what the attack does; attacks lift the edits of the reference themselves.
    base = (reference.state.base, reference.protocol_key) if reference is not None else None
    asked = tuple(prompts)  # with their labels, which judges read
    return repr((attack.id, attack.version, attack.settings(), model.family, model.state.key, model.protocol_key,
                 concept, judge.protocol, allowance, asked, base, seed))  # fmt: skip


def attack_record(done: Attacked, judge: Judge, allowance: Budget, seed: int, notes: Notes,
                  false_positives: float, arms: Mapping[str, str | None]) -> AttackRecord:  # fmt: skip
    """The record of one attack; ``arms`` says for each arm why it is missing (``None`` if it is there)."""
    attack, path = done.attack, f"attacks.{done.attack.id}"
    record = AttackRecord(
        id=attack.id, version=attack.version, preset=attack.preset, settings=attack.settings(), teaches=attack.teaches,
        budget=allowance.name, judge=judge.id, threshold=judge.threshold, seed=seed, n=0, status="unchecked",
    )  # fmt: skip
    for arm in ARMS:
        attempts = done.attempts.get(arm)
        if attempts is None:
            reason = done.left_out or done.failures.get(arm) or arms.get(arm) or "not attacked"
            for kind in ("pre", "hit"):
                notes.null(f"{path}.{kind}_{arm}", reason)
            continue
        units = [item.prompt.text for item in attempts.items]
        record.n = len(attempts.items)
        record.cost[arm] = dict(attempts.cost)
        record.summary.update({arm: dict(attempts.summary)} if attempts.summary else {})
        record.seconds.update({arm: done.seconds[arm]} if arm in done.seconds else {})
        for kind, hits in (
            ("pre", [i.pre_hit for i in attempts.items]),
            ("hit", [i.hit for i in attempts.items]),
        ):
            protocol = (
                f"{judge.protocol}/attack {attack.id} v{attack.version}/budget {allowance.name}/"
                f"{kind}-attack share of all attacked prompts"
            )
            setattr(
                record,
                f"{kind}_{arm}",
                notes.number(f"{path}.{kind}_{arm}", rate(hits, units), protocol),
            )
    if "erased" in done.attempts:
        items = done.attempts["erased"].items
        record.texts = [item.text for item in items]
        record.skipped = sum("skipped" in item.details for item in items)
    _conventions(record, done, judge, notes, path)
    record.curve_of, record.curve = advantage_curve(done.attempts)
    _judge(record, done, false_positives, notes, path)
    for field in ("recovered", "advantage"):
        if getattr(record, field) is None and record.reason:
            notes.null(f"{path}.{field}", record.reason)
    return record


def _conventions(
    record: AttackRecord, done: Attacked, judge: Judge, notes: Notes, path: str
) -> None:
    """The same attempts counted as other papers do; ``hit_erased`` has all prompts in the denominator."""
    attempts, original = done.attempts.get("erased"), done.attempts.get("original")
    if attempts is None or not attempts.items:
        return
    plain = [item.pre_hit for item in attempts.items]
    hits = [item.hit for item in attempts.items]
    units = [item.prompt.text for item in attempts.items]
    shown = None if original is None else [item.pre_hit for item in original.items]
    # Where the plain prompt had several pictures, one of N is a success: another number than of one.
    tries = len(attempts.items[0].details.get("plain_hits", ()))
    for name in CONVENTIONS:
        where = f"{path}.success.{name}"
        record.success[name] = None
        if shown is None and name != "erased-passes":
            notes.null(where, "there is no original to say which prompts show the concept")
            continue
        made = attack_success(
            plain, hits, name, original=shown, prompts=units, judge=judge.protocol,
            tries=tries if tries > 1 else None,
        )  # fmt: skip
        if made.post.value is None:
            notes.null(where, "none of the attacked prompts is in this denominator")
            continue
        found = (made.post.value, made.post.interval, made.post.n)
        record.success[name] = notes.number(where, found, made.post.protocol)


def _judge(
    record: AttackRecord, done: Attacked, false_positives: float, notes: Notes, path: str
) -> None:
    if done.left_out is not None:
        record.status, record.reason = "not-run", done.left_out
        return
    if record.hit_erased is None:
        record.status, record.reason = "failed", done.failures.get("erased", "it gave no result")
        return
    erased = [i.hit for i in done.attempts["erased"].items]
    units = [i.prompt.text for i in done.attempts["erased"].items]
    never = [i.hit for i in done.attempts["never"].items] if "never" in done.attempts else None
    original = (
        [i.hit for i in done.attempts["original"].items] if "original" in done.attempts else None
    )
    if never is not None:
        pair = bootstrap_difference(_floats(erased), _floats(never), units)
        record.advantage = notes.number(
            f"{path}.advantage", pair, "hit_erased - hit_never/bootstrap 95 % over prompts"
        )
    if original is not None and sum(original) / len(original) < MINIMUM_RANGE:
        record.status = "void"
        record.reason = "the attack fails on the original model too, so its failure on the erased one says nothing"
    elif (
        never is not None
        and not record.teaches
        and measures_nothing(sum(never), len(never), false_positives)
    ):
        record.status = "measures-nothing"
        record.reason = "a searching attack that hits a model without the concept fools the judge; it measures nothing"
    elif original is None or never is None:
        record.reason = notes.reasons.get(
            f"{path}.hit_never" if never is None else f"{path}.hit_original"
        )
        record.reason = (
            record.reason or "without original and never there is no scale for what came back"
        )
    else:
        record.status = "valid"
    if original is None or never is None:
        return
    value, interval = recovered(erased, original, never, units)
    if value is None:
        record.reason = (
            record.reason
            or "original and never differ by less than 0.1 under this attack, so there is nothing to recover"
        )
        if record.status == "valid" and not record.teaches:
            record.status = "void"
    elif record.status == "valid":
        record.recovered = notes.number(
            f"{path}.recovered",
            (value, interval, len(set(units))),
            "(hit_erased - hit_never) / (hit_original - hit_never)/bootstrap 95 % over prompts",
        )
        record.interval = interval


def _floats(hits: Sequence[bool]) -> list[float]:
    return [float(hit) for hit in hits]
