"""Starting is quick, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "matplotlib")

# Seconds of processor time, interpreter start included; the best of a few tries.  The clock on the wall
# would also measure what else the machine is doing.
IMPORT_S = 0.3
COMMAND_S = 0.7
TRIES = 5


def _python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def _best(code: str, limit: float) -> float:
    found = []
    for _ in range(TRIES):
        report = f"{code}\nimport time; print('CPU', time.process_time())"
        found.append(float(_python(report).stdout.rpartition("CPU ")[2]))
        if found[-1] <= limit:
            break
    return min(found)


def _loaded(code: str) -> list[str]:
    report = f"import sys\n{code}\nprint('LOADED', [m for m in {HEAVY!r} if m in sys.modules])"
    return json.loads(_python(report).stdout.rpartition("LOADED ")[2].replace("'", '"'))


RUN_HELP = """
from expunge.cli import main
sys.argv = ["expunge", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "code",
    [
        "import expunge",
        "import expunge; dir(expunge)",
        "from expunge import catalogue; catalogue.systems()",
    ],
    ids=["import", "dir", "catalogue"],
)
def test_import_loads_nothing_heavy(code):
    assert _loaded(code) == []


def test_import_loads_no_numpy_either():
    found = _python("import sys, expunge\nprint('numpy' in sys.modules)").stdout.strip()
    assert found == "False"


def test_import_is_quick():
    assert _best("import expunge", IMPORT_S) <= IMPORT_S


@pytest.mark.parametrize(
    "arguments", [["--help"], ["methods"], ["methods", "--json"]], ids=" ".join
)
def test_commands_load_nothing_heavy(arguments):
    assert _loaded(RUN_HELP.format(arguments=arguments)) == []


@pytest.mark.parametrize("arguments", [["--help"], ["methods"]], ids=" ".join)
def test_commands_are_quick(arguments):
    code = "import sys\n" + RUN_HELP.format(arguments=arguments)
    assert _best(code, COMMAND_S) <= COMMAND_S


def test_public_names_are_listed_once_in_order_and_resolve():
    import expunge

    names = [name for name in expunge.__all__ if not name.startswith("__")]
    assert names == sorted(names)
    assert len(set(expunge.__all__)) == len(expunge.__all__)
    assert set(expunge.__all__) <= set(dir(expunge))
    for name in expunge.__all__:
        assert getattr(expunge, name) is not None


def test_unknown_public_name_is_an_attribute_error():
    import expunge

    with pytest.raises(AttributeError, match="no attribute 'Concpt'"):
        expunge.Concpt  # noqa: B018 - reading it is the test


def test_version_is_the_installed_one():
    import importlib.metadata

    import expunge

    assert expunge.__version__ == importlib.metadata.version("expunge")


def test_module_runs_as_command():
    done = subprocess.run(
        [sys.executable, "-m", "expunge", "--help"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert done.returncode == 0
    assert "methods" in done.stdout
