"""The documentation says what the code and the records say: generated parts, order of a page, examples."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from expunge import catalogue
from expunge.errors import RunError
from expunge.run import pages, results

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
IDS = [system.id for system in pages.systems()]
ORDER = (
    "Idea", "Equation", "Example", "Hyperparameters", "What we measured", "What differs from the paper",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    not DOCS.is_dir(), reason="a source archive comes without the docs and the recorded claims"
)


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty folder of claims."""
    monkeypatch.setenv("EXPUNGE_RESULTS", str(tmp_path / "results"))
    return tmp_path / "results"


def page(id: str) -> str:
    return (DOCS / "methods" / f"{id}.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# -- the committed pages ---------------------------------------------------------------------------


def test_committed_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_RESULTS", str(ROOT / "results"))
    stale = [
        path.relative_to(ROOT).as_posix()
        for path, text in pages.render(DOCS).items()
        if path.read_text(encoding="utf-8") != text
    ]
    assert not stale, f"{', '.join(stale)}: the generated part is stale; run `make docs`"


@pytest.mark.parametrize("id", IDS)
def test_page_has_its_markers_and_the_order_of_contributing(id: str) -> None:
    text = page(id)
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == list(ORDER)
    for name, heading in (("settings", "Hyperparameters"), ("claims", "What we measured")):
        section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
        assert pages.between(section, name, f"{id}.md, {heading}")


def test_no_page_is_left_over() -> None:
    assert {path.stem for path in (DOCS / "methods").glob("*.md")} == set(IDS)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_links_inside_the_project_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert not broken


# -- the examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("id", IDS)
def test_commands_of_a_page_are_commands(id: str) -> None:
    from typer.main import get_command

    from expunge.cli import app
    from expunge.cli.common import configured

    lines = [line for block in blocks(page(id), "sh") for line in _lines(block)]
    assert lines
    for line in lines:
        program, name, *arguments = shlex.split(line)
        command = get_command(app).commands[name]  # type: ignore[attr-defined]
        given = command.make_context(name, arguments).params
        assert program == "expunge"
        if "method" in given:
            model = type("Model", (), {"companions": None})()
            configured(given["method"], "erase", model, given["preset"], given["set_"])
        if given.get("attacks") not in (None, "all", "none"):
            for attack in given["attacks"].split(","):
                assert catalogue.system(attack).verb == "attack"


def _lines(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("id", IDS)
def test_python_of_a_page_imports_and_sets_what_exists(id: str) -> None:
    cls = catalogue.resolve(id)
    found = blocks(page(id), "python")
    assert found
    made = 0
    for node in (node for block in found for node in ast.walk(ast.parse(block))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            cls.__name__,
            f"{cls.__name__}.configured",
        ):
            preset = [ast.literal_eval(argument) for argument in node.args]
            changes = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            assert cls.configured(*preset, **changes).id == id
            made += 1
    assert made


# -- what is generated -----------------------------------------------------------------------------


def test_settings_name_every_hyperparameter_and_preset() -> None:
    for id in IDS:
        cls, text = catalogue.resolve(id), pages.settings(catalogue.resolve(id))
        for row in cls.describe():
            assert f"| `{row['name']}` |" in text
        assert all(f"| `{name}` |" in text for name in cls.presets)
        for line in text.splitlines():
            if line.startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", line)) in (3, 5), line


def test_without_records_a_sentence_stands_there(records: Path) -> None:
    assert pages.measured("uce", 1) == pages.NOTHING
    assert pages.every_claim() == "No claim recorded yet."
    assert pages.benchmarks() == "No benchmark recorded yet."


def test_a_failure_is_shown_as_failed_and_what_waits_as_waiting(records: Path) -> None:
    results.record("a-breaks", "uce", 1, {"rate": 0.5}, True, 10, [0])
    results.record(
        "a-breaks", "uce", 1, {"rate": 0.12345}, False, 1234, [0, 1], interval={"rate": [0.1, 0.2]},
        note="too | weak",
    )  # fmt: skip
    results.record("b-waits", "uce", 1, {}, None, 0, [0], note="needs an arm")
    results.record("c-old", "uce", 7, {"rate": 1}, True, 5, [0], interval=[0.5, 1.0])
    own, everything = pages.measured("uce", 1), pages.every_claim()
    for text in (own, everything):
        assert (
            "| a-breaks | **failed**: too \\| weak | rate: 0.123 (0.100 to 0.200) | 1,234 |" in text
        )
        assert "| b-waits | waiting: needs an arm | nothing |" in text
    assert "0 held, 1 failed, 1 waiting" in own and "c-old" not in own
    assert "1 held, 1 failed, 1 waiting" in everything
    assert (
        "| c-old | held | rate: 1 (0.500 to 1.000) |" in everything
        and "| 7 (now 1) |" in everything
    )
    assert pages.measured("uce", 2) == pages.NOTHING


def test_benchmarks_show_ratios_and_the_machine_and_no_times(records: Path) -> None:
    (records / "benchmarks").mkdir(parents=True)
    (records / "benchmarks" / "b.json").write_text(
        '{"benchmark": "b", "setting": {"machine": "m1", "width": 8}, "speedup": 12.3456, '
        '"limit_bytes": 7, "within": {"ours": true}, "arms": {"ours": {"cpu_seconds": 1}}}'
    )
    row = pages.benchmarks().splitlines()[-1]
    assert row == "| b | speedup: 12.3<br>within, ours: yes | width 8 | m1 |"
    (records / "benchmarks" / "b.json").write_text("[1]")
    with pytest.raises(RunError, match=r"b\.json"):
        pages.benchmarks()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"), (0.00001234, "1.2e-05"), (-0.5, "-0.500"), (12.345, "12.3"), (1455.004, "1,455"),
        (3, "3"), (True, "yes"), (None, "none"), (float("nan"), "nan"), ("a|b", "a\\|b"),
    ],
)  # fmt: skip
def test_numbers_are_rounded(value: object, text: str) -> None:
    assert pages.number(value) == text


def test_only_the_part_between_markers_changes_and_a_missing_marker_is_named() -> None:
    text = "a\n<!-- x: begin (made by `make docs`) -->\nold\n<!-- x: end -->\nb\n"
    new = pages.filled(text, "x", "new")
    assert new == text.replace("old", "new") and pages.between(new, "x") == "new"
    with pytest.raises(RunError, match="some page"):
        pages.filled(text, "y", "new", "some page")


def test_a_battery_that_was_not_run_at_this_version_is_not_called_red(monkeypatch):
    from expunge import catalogue
    from expunge.run import status

    now = catalogue.version("uce")
    for before, mark in (
        ({"version": now, "battery": True}, "green"),
        ({"version": now, "battery": False}, "red"),
        ({"version": now - 1, "battery": True}, "not run"),
    ):
        made = status.derive(["uce"], run_battery=False, before={"uce": before})
        assert f"| {mark} |" in status.table(made)
