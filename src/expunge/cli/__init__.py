"""The command line: `expunge methods | generate | erase | audit | run | attack | measure | sweep | ...`.

Heavy libraries are imported inside the commands, so that `expunge --help` and `expunge methods` stay quick.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ExpungeError, SettingError
from . import attacking, benchmark, common, generating, listing, measure, sweeping
from .options import (
    AnchorOption,
    AttackNOption,
    AttacksOption,
    BudgetOption,
    CacheOption,
    ConceptOption,
    DeviceOption,
    DtypeOption,
    EditOption,
    FileOption,
    JudgeOption,
    KeepOption,
    KeptNOption,
    KindOption,
    MethodOption,
    ModelOption,
    NeverOption,
    NOption,
    OriginalOption,
    OutOption,
    PhraseOption,
    PresetOption,
    PromptsOption,
    RebaseOption,
    SeedOption,
    SeedsOption,
    SetOption,
    SiblingOption,
    WithoutGateOption,
)
from .ui import ui

if TYPE_CHECKING:
    from ..concept import Concept

__all__ = ["app", "main"]

DEMO_ATTACKS = "closed-form,unlearndiffatk,ring-a-bell,language-variants,random-tokens"
"""One of each sort, so that the demonstration stays a matter of minutes on two cores."""

# The boxed help cuts names of options on a narrow terminal; the plain one does not.
HELP: Any = "markdown" if shutil.get_terminal_size().columns >= 80 else None

app = typer.Typer(
    help="Find a concept in a trained model, erase it, try to bring it back, and show the evidence.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=HELP,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(listing.methods)
app.command()(generating.generate)
world_app = typer.Typer(help="The built-in world.", no_args_is_help=True)
app.add_typer(world_app, name="world")


def main() -> None:
    """Run the command line; errors raised on purpose become one sentence and exit status 1."""
    try:
        status = app(standalone_mode=False)
    except typer.Exit as stop:
        raise SystemExit(stop.exit_code) from None
    except ExpungeError as error:
        _fail(str(error), error.cure)
    except OSError as error:
        _fail(f"{error.filename or 'file'}: {error.strerror or error}")
    except KeyboardInterrupt:
        _fail("interrupted; the same command takes up where a run folder allows it", status=130)
    except Exception as error:  # usage errors of typer's parser, whichever click it brings
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # a group alone: boxed help is shown already
            print(message, end="\n" if message else "", file=sys.stderr)
            raise SystemExit(2) from None
        _fail(message, "`expunge COMMAND --help` lists the options.", status=2)
    if status:  # what a command raised as typer.Exit comes back as a number
        raise SystemExit(status)


def _fail(message: str, cure: str = "", status: int = 1) -> None:
    # Control characters in a user's text must not reach the terminal raw.
    text = "".join(c if c.isprintable() or c == "\n" else "?" for c in message)
    print(f"expunge: {text}" + (f"\n  {cure}" if cure else ""), file=sys.stderr)
    raise SystemExit(status)


@app.command()
def erase(
    model: ModelOption, out: OutOption, method: MethodOption = "rece", concept: ConceptOption = None,
    concept_file: FileOption = None, kind: KindOption = None, phrase: PhraseOption = None,
    anchor: AnchorOption = None, keep: KeepOption = None, preset: PresetOption = None, set_: SetOption = None,
    edit: EditOption = None, seed: SeedOption = 0, device: DeviceOption = "cpu", dtype: DtypeOption = None,
    sibling: SiblingOption = False, rebase: RebaseOption = False,
) -> None:  # fmt: skip
    """Erase concepts; writes `edit.safetensors` and `edit.json`. The model itself is not changed."""
    opened = common.load(model, device, dtype)
    wanted = common.concepts_of(opened, concept, concept_file, kind, phrase, anchor)
    _erase(
        opened, wanted, method, preset, set_, keep, edit, seed, out, rebase=rebase, sibling=sibling
    )


def _erase(
    model: Any, wanted: tuple[Concept, ...], method: str, preset: str | None, settings: list[str] | None,
    keep: list[str] | None, below: list[Path] | None, seed: int, out: Path, *, rebase: bool = False,
    sibling: bool = False,
) -> Any:  # fmt: skip
    from ..edit.files import atomic_write

    eraser = common.configured(method, "erase", model, preset, settings, wanted)
    with common.quietly(), common.edited(model, below, rebase=rebase, sibling=sibling):
        judge = common.own_judge(model)
        edit = eraser.erase(model, wanted, keep=keep or (), judge=judge, seed=seed, run=out / "run")
    edit.save(out / "edit.safetensors")
    atomic_write(
        out / "edit.json",
        (json.dumps(edit.manifest.model_dump(mode="json"), indent=1) + "\n").encode(),
    )
    names = ", ".join(c.name for c in wanted)
    took = f" in {edit.manifest.seconds:.1f} s" if edit.manifest.seconds is not None else ""
    print(f"erased {names} with {method}{took}: {out / 'edit.safetensors'}")
    return edit


app.command()(attacking.attack)


@app.command()
def audit(
    model: ModelOption, out: OutOption, concept: ConceptOption = None, concept_file: FileOption = None,
    kind: KindOption = None, phrase: PhraseOption = None, anchor: AnchorOption = None, edit: EditOption = None,
    original: OriginalOption = None, never: NeverOption = None, judge: JudgeOption = None,
    attacks: AttacksOption = "all", budget: BudgetOption = "world", prompts: PromptsOption = None,
    seeds: SeedsOption = 1, n: NOption = 100, kept_n: KeptNOption = 20, attack_n: AttackNOption = 20,
    seed: SeedOption = 0, device: DeviceOption = "cpu", dtype: DtypeOption = None, sibling: SiblingOption = False,
    cache: CacheOption = None, rebase: RebaseOption = False,
) -> None:  # fmt: skip
    """Measure what is left of a concept, what broke, and what attacks bring back; writes the evidence."""
    opened = common.load(model, device, dtype)
    wanted = common.concepts_of(opened, concept, concept_file, kind, phrase, anchor)
    from ..edit import Edit

    edits = [Edit.load(file) for file in edit or []]
    decides = common.chosen_judge(opened, judge)
    asked = common.read_prompts(prompts) if prompts is not None else None
    _audit(opened, edits, wanted, out, original=common.beside(original, opened), never=common.beside(never, opened),
           judge=decides, attacks=attacks, budget=budget, prompts=asked, seeds=seeds, n=n, kept_n=kept_n,
           attack_n=attack_n, seed=seed, sibling=sibling, rebase=rebase, cache=cache)  # fmt: skip


def _audit(
    model: Any, edits: list[Any], wanted: tuple[Concept, ...], out: Path, *, judge: Any = None,
    cache: Path | None = None, **options: Any,
) -> Any:  # fmt: skip
    """Audit with what is open and read already, save, and tell."""
    from ..core.sampling import SHARED
    from ..evidence import audit as run_audit

    with common.quietly(), SHARED.also_in(cache):
        evidence = run_audit(
            model, edits, list(wanted), judge=common.chosen_judge(model, judge),
            command=shlex.join(["expunge", *sys.argv[1:]]), **options,
        )  # fmt: skip
        written = evidence.save(out)
    from rich.console import Console

    console = Console()
    for name in evidence.concepts:
        console.print(evidence.table(name, width=console.width))
    print("\n".join(f"{name}: {path}" for name, path in written.items()))
    return evidence


@app.command()
def run(
    model: ModelOption, out: OutOption, method: MethodOption = "rece", concept: ConceptOption = None,
    concept_file: FileOption = None, kind: KindOption = None, phrase: PhraseOption = None,
    anchor: AnchorOption = None, keep: KeepOption = None, preset: PresetOption = None, set_: SetOption = None,
    edit: EditOption = None, never: NeverOption = None, judge: JudgeOption = None, attacks: AttacksOption = "all",
    n: NOption = 100, budget: BudgetOption = "world", prompts: PromptsOption = None, seeds: SeedsOption = 1,
    kept_n: KeptNOption = 20, attack_n: AttackNOption = 20, seed: SeedOption = 0,
    device: DeviceOption = "cpu", dtype: DtypeOption = None, cache: CacheOption = None,
    sibling: SiblingOption = False, rebase: RebaseOption = False,
) -> None:  # fmt: skip
    """Erase, then audit: everything in one folder."""
    opened = common.load(model, device, dtype)
    wanted = common.concepts_of(opened, concept, concept_file, kind, phrase, anchor)
    # All that the audit needs, before an erasure that may take hours.
    decides = common.chosen_judge(opened, judge)
    asked = common.read_prompts(prompts) if prompts is not None else None
    common.check_audit(opened, wanted, attacks, budget, asked)
    lacking = common.beside(never, opened)
    from ..edit import Edit

    allowed: dict[str, Any] = {"rebase": rebase, "sibling": sibling}
    made = _erase(opened, wanted, method, preset, set_, keep, edit, seed, out, **allowed)
    below = [Edit.load(file) for file in edit or []]
    _audit(opened, [*below, made], wanted, out, never=lacking, judge=decides, attacks=attacks, budget=budget,
           prompts=asked, seeds=seeds, n=n, kept_n=kept_n, attack_n=attack_n, seed=seed, cache=cache,
           **allowed)  # fmt: skip


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An edit file.")],
    as_json: Annotated[bool, typer.Option("--json", help="The whole manifest.")] = False,
) -> None:
    """Show an edit's provenance, its size per layer, ranks and condition numbers."""
    from ..edit import Edit

    edit = Edit.load(file)
    manifest = edit.manifest.plain()
    if as_json:
        print(json.dumps(manifest | {"digest": edit.digest}, indent=1, ensure_ascii=False))
        return
    from ..edit.summary import print_summary

    print_summary(edit)


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="An edit file.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File (diffusers, kohya) or folder (peft, full).")
    ],
    format: Annotated[str, typer.Option(help="diffusers, peft, kohya or full.")] = "diffusers",
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="The model it was fitted on, as for `erase`; peft, full, kohya of some layouts and the edits of "
            "closed-form erasers need it.",
        ),
    ] = None,
    edit: Annotated[
        list[Path] | None,
        typer.Option(
            "--edit",
            "-e",
            help="An edit that FILE was fitted on top of; repeat in order. Only `full` holds them too.",
        ),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Rank to cut to; needed for dense edits.")
    ] = None,
    without_gate: WithoutGateOption = False,
    sibling: SiblingOption = False,
    rebase: RebaseOption = False,
) -> None:
    """Write an edit for another program: a LoRA in its key layout, or a full folder."""
    from ..edit import Edit

    made = Edit.load(file)
    if format in ("diffusers", "kohya") and out.suffix != ".safetensors":
        raise SettingError(
            f"--out {str(out)!r}: {format} is one file, whose name must end in .safetensors"
        )
    if model is None and (edit or format in ("peft", "full") or made.kind == "shared-low-rank"):
        raise SettingError(
            "the model that the edit was fitted on is needed here; give it by --model"
        )
    opened = common.load(model) if model else None
    allowed = {"rebase": rebase, "sibling": sibling}
    with common.quietly(), contextlib.ExitStack() as stack:
        if opened is not None:
            stack.enter_context(common.edited(opened, edit, **allowed))
        report = made.export(
            out, format=format, model=opened, rank=rank, without_gate=without_gate, **allowed
        )
    lost = f", relative error {report['relative_error']:.2e}" if report["rank"] else ""
    print(f"{report['tensors']} tensors as {format}{lost}: {out}")
    if report["left_out"]:
        print(f"left out, this format cannot carry them: {', '.join(report['left_out'])}")
    if "warning" in report:
        print(f"warning: {report['warning']}", file=sys.stderr)


@app.command()
def demo(out: OutOption = Path("out/demo"), seed: SeedOption = 0) -> None:
    """Erase "star" from the world's pipeline with RECE, attack it quickly, and write the evidence."""
    opened = common.load("world")
    wanted = common.concepts_of(opened, ["star"], None, None, None, None)
    made = _erase(
        opened, wanted, "rece", None, None, ["circle", "square", "triangle"], None, seed, out
    )
    with common.quietly():
        made.export(out / "star-lora.safetensors", format="diffusers", model=opened)
    _audit(
        opened,
        [made],
        wanted,
        out,
        attacks=DEMO_ATTACKS,
        budget="quick",
        n=24,
        kept_n=4,
        attack_n=6,
        seed=seed,
    )
    print(f"look at {out / 'report.html'}")


@world_app.command("export")
def world_export(
    out: Annotated[Path, typer.Argument(help="Folder that receives plain library folders.")],
) -> None:
    """Write the world's models as plain library folders (float32) that `from_pretrained` loads."""
    with common.quietly():
        from ..world.models import export as write

        for folder in write(out):
            print(folder)


# Commands of files of their own; `--help` lists commands in the order in which they are added.
app.command()(sweeping.sweep)
app.command()(sweeping.leaderboard)
app.command()(measure.measure)
app.command()(benchmark.benchmark)
app.command()(ui)
