"""The rules of the house, checked on the syntax tree: who may import whom, and what may never be written.

Each rule is a function from one source file to complaints, and each is shown a file that breaks it, so
that a rule that has stopped working is noticed.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expunge import catalogue

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "expunge"

# A room may import itself and the rooms on lower floors.
FLOORS = [
    {"errors"},
    {"concept"},
    {"method"},
    {"edit", "catalogue"},
    {"models"},
    {"core"},
    {"erase", "attack", "measure", "discover", "compose", "reason"},
    {"evidence"},
    {"testing", "run", "world"},
    {"cli", "app", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
VERBS = FLOORS[6]
MAY_IMPORT_WORLD = {"world", "cli", "app", "__main__"}
QUICK = {"__init__", "__main__", "cli", "catalogue", "errors", "concept", "method"}
HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "matplotlib",
    "scipy",
    "sklearn",
    "peft",
    "accelerate",
}
MAX_LINES, MAX_FUNCTION = 400, 70


@dataclasses.dataclass(frozen=True)
class File:
    """One source file: its dotted place below ``expunge`` and its text."""

    parts: tuple[str, ...]
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        return self.parts[0]

    @property
    def is_method(self) -> bool:
        return self.room in VERBS and len(self.parts) > 1 and self.parts[-1] != "__init__"

    def __str__(self) -> str:
        return ".".join(self.parts)


def _read(path: Path) -> File:
    return File(path.relative_to(SRC).with_suffix("").parts, path.read_text(encoding="utf-8"))


FILES = [_read(path) for path in sorted(SRC.rglob("*.py"))]


def _dotted(node: ast.AST) -> str:
    """``a.b.c`` of a chain of attributes, empty for anything else."""
    if isinstance(node, ast.Attribute):
        head = _dotted(node.value)
        return f"{head}.{node.attr}" if head else ""
    return node.id if isinstance(node, ast.Name) else ""


def _for_type_checkers(tree: ast.AST) -> set[int]:
    """Identities of the nodes under ``if TYPE_CHECKING``; they are not executed."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and _dotted(node.test).endswith("TYPE_CHECKING"):
            found.update(id(inner) for line in node.body for inner in ast.walk(line))
    return found


def imports(file: File) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and place below ``expunge`` of everything of ours that a file imports."""
    skipped = _for_type_checkers(file.tree)
    for node in ast.walk(file.tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("expunge."):
                    yield node.lineno, tuple(alias.name.split(".")[1:])
        elif isinstance(node, ast.ImportFrom):
            inner = tuple((node.module or "").split(".")) if node.module else ()
            if node.level:
                base = file.parts[: len(file.parts) - node.level] + inner
            elif inner and inner[0] == "expunge":
                base = inner[1:]
            else:
                continue
            for alias in node.names:
                yield node.lineno, (*base, alias.name)


# -- rules -----------------------------------------------------------------------------------------


def known_room(file: File) -> Iterator[str]:
    if file.room != "__init__" and file.room not in FLOOR:
        yield f"1: {file.room!r} is no room of the house"


def downwards(file: File) -> Iterator[str]:
    here = FLOOR.get(file.room)
    for line, target in imports(file):
        room = target[0]
        if here is None or room not in FLOOR or room == file.room:
            continue
        if FLOOR[room] > here:
            yield f"{line}: {file.room} imports upwards from {room}"
        elif FLOOR[room] == here and (file.room in VERBS or room in VERBS):
            yield f"{line}: the verb {file.room} imports the verb {room}"
        if room == "world" and file.room not in MAY_IMPORT_WORLD:
            yield f"{line}: imports the world, which registers itself in the catalogue"


@functools.cache
def _systems() -> dict[str, str]:
    """Dotted path of a file -> id of the system it belongs to."""
    entries = tomllib.loads((SRC / "systems.toml").read_text(encoding="utf-8"))["system"]
    return {
        path.partition(":")[0]: entry["id"]
        for entry in entries
        for path in (*entry.get("files", ()), *([entry["class"]] if "class" in entry else ()))
    }


def _system_of(file: File) -> str:
    return _systems().get(f"expunge.{file}", str(file))


def methods_apart(file: File) -> Iterator[str]:
    """A method's file imports neither another method nor anything of another family."""
    if not file.is_method:
        return
    modules = {f.parts for f in FILES if f.is_method and _system_of(f) != _system_of(file)}
    for line, target in imports(file):
        if target[0] != file.room:
            continue
        if len(target) > 1 and len(file.parts) > 2 and target[1] != file.parts[1]:
            yield f"{line}: imports the family {target[1]}"
        for module in (target, target[:-1]):
            if module in modules and module != file.parts:
                yield f"{line}: imports the method {'.'.join(module)}; what they share belongs in core"


def quick_start(file: File) -> Iterator[str]:
    if file.room not in QUICK:
        return
    skipped = _for_type_checkers(file.tree)
    for node in file.tree.body:
        if id(node) in skipped or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in _dotted(node.test)
        ):
            continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        for name in names:
            if name.split(".")[0] in HEAVY:
                yield f"{node.lineno}: imports {name} at start-up"


PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLERS = {"torch.load", "torch.jit.load", "pandas.read_pickle", "pd.read_pickle"}


def no_code_from_data(file: File) -> Iterator[str]:
    """Nothing that is read may become code: no pickles, no eval, no remote code."""
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = (getattr(node, "module", None) or "").split(".")[0]
            for name in {
                a.name.split(".")[0] for a in node.names if isinstance(node, ast.Import)
            } | {module}:
                if name in PICKLES:
                    yield f"{node.lineno}: imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        options = {k.arg: getattr(k.value, "value", ...) for k in node.keywords}
        if called in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            yield f"{node.lineno}: calls {called}"
        if called in UNPICKLERS and options.get("weights_only") is not True:
            yield f"{node.lineno}: calls {called} without weights_only=True"
        if called in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            yield f"{node.lineno}: calls {called}; use yaml.safe_load"
        for option in ("allow_pickle", "trust_remote_code", "shell"):
            if options.get(option) is True:
                yield f"{node.lineno}: {option}=True"
        if options.get("weights_only") is False or options.get("use_safetensors") is False:
            yield f"{node.lineno}: asks for a pickle by name"
        if options.get("safe_serialization") is False:
            yield f"{node.lineno}: writes a pickle"


GLOBAL_STATE = re.compile(
    r"torch\.(manual_seed|seed|random\.\w*seed|cuda\.(manual_seed|manual_seed_all|seed)"
    r"|set_grad_enabled|set_default_\w+|use_deterministic_algorithms|set_float32_matmul_precision"
    r"|set_num_threads|set_num_interop_threads|autograd\.set_detect_anomaly)"
    r"|random\.(seed|random|randint|choice|choices|shuffle|sample|uniform|gauss)"
    r"|(np|numpy)\.random\.(?!default_rng|Generator|SeedSequence|PCG64|Philox|get_state)\w+"
)
# Programs own their process; libraries do not.
OWNS_PROCESS = re.compile(r"^(cli|app|__main__)$|^run(\.|$)|^world\.(train|quality|__main__)")


def no_global_state(file: File) -> Iterator[str]:
    """Randomness is an argument, and process-wide switches belong to programs."""
    if OWNS_PROCESS.search(str(file)):
        return
    fine: set[int] = set()  # switches of a `with`, and all that happens inside fork_rng
    for block in ast.walk(file.tree):
        if isinstance(block, ast.With):
            fine.update(id(item.context_expr) for item in block.items)
            if any(
                _dotted(getattr(i.context_expr, "func", i)).endswith("fork_rng")
                for i in block.items
            ):
                fine.update(id(node) for node in ast.walk(block))
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Call) and id(node) not in fine:
            called = _dotted(node.func)
            if GLOBAL_STATE.fullmatch(called):
                yield f"{node.lineno}: {called} changes or reads the state of the whole process"


def errors_are_heard(file: File) -> Iterator[str]:
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        broad = node.type is None or _dotted(node.type) in ("Exception", "BaseException")
        if broad and all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body):
            yield f"{node.lineno}: swallows every error"


def small(file: File) -> Iterator[str]:
    lines = file.text.count("\n")
    if lines > MAX_LINES:
        yield f"1: {lines} lines; at most {MAX_LINES}"
    for node in ast.walk(file.tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or node.lineno) - node.lineno
            if length > MAX_FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines; at most {MAX_FUNCTION}"


def explained(file: File) -> Iterator[str]:
    if file.text.count("\n") > 5 and not ast.get_docstring(file.tree):
        yield "1: no module docstring"
    nested = {
        id(inner)
        for outer in ast.walk(file.tree)
        if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.walk(outer)
        if inner is not outer
    }
    for node in ast.walk(file.tree):
        if id(node) in nested:
            continue
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            length = (node.end_lineno or node.lineno) - node.lineno
            if length > 12 and not ast.get_docstring(node):
                yield f"{node.lineno}: {node.name} is public and has no docstring"


RULES: list[Callable[[File], Iterator[str]]] = [
    known_room,
    downwards,
    methods_apart,
    quick_start,
    no_code_from_data,
    no_global_state,
    errors_are_heard,
    small,
    explained,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_keeps_its_rules(rule):
    complaints = [f"{'/'.join(file.parts)}.py:{said}" for file in FILES for said in rule(file)]
    assert not complaints, "\n" + "\n".join(complaints)


BROKEN = [
    (known_room, "cellar.wine", "x = 1"),
    (downwards, "core.sampling", "from ..erase import diffusion"),
    (downwards, "core.sampling", "def f():\n    from expunge.evidence import audit"),
    (downwards, "erase.diffusion.rece", "from ...attack.diffusion import closed_form"),
    (downwards, "evidence.audit", "from ..world import scenes"),
    (downwards, "models.diffusion", "import expunge.core.sampling"),
    (methods_apart, "erase.diffusion.ours", "from .rece import RECE"),
    (methods_apart, "erase.diffusion.ours", "from . import rece"),
    (methods_apart, "erase.diffusion.ours", "from ...erase.diffusion.rece import RECE"),
    (methods_apart, "erase.diffusion.ours", "from ..language import anything"),
    (quick_start, "catalogue", "import torch.nn"),
    (quick_start, "cli.options", "import matplotlib.pyplot as plt"),
    (quick_start, "cli", "from transformers import CLIPModel"),
    (no_code_from_data, "core.x", "import pickle"),
    (no_code_from_data, "core.x", "from pickle import loads"),
    (no_code_from_data, "core.x", "import os, cloudpickle"),
    (no_code_from_data, "core.x", "import torch\ntorch.load(p)"),
    (no_code_from_data, "core.x", "import torch\ntorch.load(p, weights_only=False)"),
    (no_code_from_data, "core.x", "np.load(p, allow_pickle=True)"),
    (no_code_from_data, "core.x", "eval(text)"),
    (no_code_from_data, "core.x", "exec(text)"),
    (no_code_from_data, "core.x", "yaml.load(text)"),
    (no_code_from_data, "core.x", "AutoModel.from_pretrained(p, trust_remote_code=True)"),
    (no_code_from_data, "core.x", "model.save_pretrained(p, safe_serialization=False)"),
    (no_global_state, "core.x", "torch.set_grad_enabled(False)"),
    (no_global_state, "core.x", "torch.manual_seed(0)"),
    (no_global_state, "erase.diffusion.x", "np.random.randn(3)"),
    (no_global_state, "models.x", "random.shuffle(names)"),
    (errors_are_heard, "core.x", "try:\n    f()\nexcept Exception:\n    pass"),
    (
        errors_are_heard,
        "core.x",
        "for a in b:\n    try:\n        f()\n    except:\n        continue",
    ),
    (small, "core.x", "x = 1\n" * 401),
    (small, "core.x", "def f():\n" + "    x = 1\n" * 72),
    (explained, "core.x", "x = 1\n" * 10),
    (explained, "core.x", "'''Room.'''\ndef f():\n" + "    x = 1\n" * 14),
]

SOUND = [
    (downwards, "core.sampling", "from ..models import base\nfrom .other import x"),
    (downwards, "edit.stack", "if TYPE_CHECKING:\n    from ..models.base import Model"),
    (
        methods_apart,
        "erase.diffusion.ours",
        "from ...core import closed_form\nfrom ...method import Eraser",
    ),
    (quick_start, "cli", "def f():\n    import torch"),
    (quick_start, "models", "import torch"),
    (
        no_code_from_data,
        "core.x",
        "model.eval()\nre.compile('x')\ntorch.load(p, weights_only=True)",
    ),
    (no_code_from_data, "core.x", "yaml.safe_load(text)\nnp.load(p)"),
    (no_global_state, "core.x", "with torch.set_grad_enabled(on):\n    generator.manual_seed(1)"),
    (no_global_state, "testing.x", "with torch.random.fork_rng():\n    torch.manual_seed(0)"),
    (no_global_state, "core.x", "np.random.default_rng(3)\nrandom.Random(3)"),
    (no_global_state, "world.train.diffusion", "torch.manual_seed(0)"),
    (errors_are_heard, "core.x", "try:\n    f()\nexcept KeyError:\n    pass"),
]


@pytest.mark.parametrize(
    ("rule", "place", "text"), BROKEN, ids=lambda v: getattr(v, "__name__", None)
)
def test_rule_notices_a_broken_file(rule, place, text):
    assert list(rule(File(tuple(place.split(".")), text)))


@pytest.mark.parametrize(
    ("rule", "place", "text"), SOUND, ids=lambda v: getattr(v, "__name__", None)
)
def test_rule_accepts_a_sound_file(rule, place, text):
    assert list(rule(File(tuple(place.split(".")), text))) == []


# -- the catalogue and the files -------------------------------------------------------------------


def test_every_method_file_has_an_entry():
    missing = {f"expunge.{file}" for file in FILES if file.is_method} - set(_systems())
    assert not missing, "files without an entry in systems.toml"


def test_every_entry_has_its_file_and_class():
    places = {f"expunge.{file}": file for file in FILES}
    assert not set(_systems()) - set(places), "entries without their file"
    for system in catalogue.implemented():
        module, _, name = system.class_path.partition(":")
        classes = {node.name for node in places[module].tree.body if isinstance(node, ast.ClassDef)}
        assert name in classes, f"{system.id}: {module} has no class {name}"


# -- all text of the repository --------------------------------------------------------------------

# Written in pieces, so that this file does not break the rule it checks.
PRIVATE = [
    re.compile(r"\.\./" + "shared"),
    re.compile(r"(?<![\w./-])/(work|root|home|opt)/" + r"\w"),
    re.compile(
        "("
        + "py"
        + r"pi\.org|python"
        + r"hosted\.org|download\."
        + r"pytorch\.org|anaconda\."
        + "org)"
    ),
]
TEXT = {
    ".py",
    ".md",
    ".toml",
    ".txt",
    ".yaml",
    ".yml",
    ".json",
    ".cfg",
    ".j2",
    ".css",
    ".js",
    ".html",
    "",
}


def _repository() -> list[Path]:
    """What git tracks or would track; all files of the tree where there is no git."""
    git = shutil.which("git")
    if git and (ROOT / ".git").exists():
        listed = subprocess.run(
            [git, "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=ROOT, capture_output=True, check=True,
        ).stdout  # fmt: skip
        return [ROOT / name for name in listed.decode().split("\0") if name]
    return [
        p for folder in ("src", "tests", "docs") for p in (ROOT / folder).rglob("*") if p.is_file()
    ]


def test_nothing_names_this_machine_or_a_registry():
    found = []
    for path in _repository():
        if path.suffix not in TEXT or not path.is_file() or path.stat().st_size > 2_000_000:
            continue
        for number, line in enumerate(
            path.read_text(encoding="utf-8", errors="replace").splitlines(), 1
        ):
            if any(pattern.search(line) for pattern in PRIVATE):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:90]}")
    assert not found, "\n" + "\n".join(found)


LEFT = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|raise NotImplemented" + "Error")


def test_nothing_is_left_for_later():
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in _repository()
        if path.suffix == ".py" and path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if LEFT.search(line)
    ]
    assert not found


def test_every_test_checks_something_and_every_skip_says_why():
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        helpers = _helpers(tree, frozenset({"record"} if "claims" in path.parts else ()))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.FunctionDef)
                and node.name.startswith("test")
                and not _checks(node, helpers)
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} asserts nothing")
        for line in _without_reason(tree):
            found.append(f"{path.relative_to(ROOT)}:{line}: a skip without a reason")
    assert not found, "\n" + "\n".join(found)


SAYS_CHECK = re.compile(r"raises|warns|assert|check|expect")


def _checks(test: ast.FunctionDef, helpers: frozenset[str]) -> bool:
    """Whether a function asserts, by itself or through a helper of its file.

    A claim that waits for its other arm asserts nothing by design: it is recorded.
    """
    names = {str(getattr(n, "attr", getattr(n, "id", ""))) for n in ast.walk(test)}
    return (
        any(isinstance(n, ast.Assert) for n in ast.walk(test))
        or any(SAYS_CHECK.search(name) for name in names)
        or bool(names & helpers)
    )


def _helpers(tree: ast.Module, known: frozenset[str]) -> frozenset[str]:
    functions = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    asserting = {f.name for f in functions if not f.name.startswith("test") and _checks(f, known)}
    return known | asserting


MARKS = {"pytest.mark.skip", "pytest.mark.skipif", "pytest.mark.xfail"}
CALLS = {"pytest.skip", "pytest.xfail", "pytest.importorskip"}


def _without_reason(tree: ast.AST) -> Iterator[int]:
    """Lines of skips and expected failures that do not say why."""
    called: set[int] = set()
    for node in ast.walk(tree):  # a call comes before the attribute it calls
        if isinstance(node, ast.Call):
            called.add(id(node.func))
            said = any(k.arg == "reason" for k in node.keywords)
            name = _dotted(node.func)
            if (name in MARKS and not said) or (name in CALLS and not said and not node.args):
                yield node.lineno
        elif isinstance(node, ast.Attribute) and id(node) not in called and _dotted(node) in MARKS:
            yield node.lineno


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("def test_a():\n    assert x", True),
        ("def test_a():\n    with pytest.raises(KeyError):\n        f()", True),
        ("def same(a):\n    assert a\ndef test_a():\n    same(1)", True),
        ("def same(a):\n    return a\ndef test_a():\n    same(1)", False),
        ("def test_a():\n    f()", False),
    ],
)
def test_empty_tests_are_noticed(text, fine):
    tree = ast.parse(text)
    tests = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test")]
    assert all(_checks(test, _helpers(tree, frozenset())) for test in tests) is fine


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("@pytest.mark.skip\ndef test_a(): ...", [1]),
        ("@pytest.mark.xfail()\ndef test_a(): ...", [1]),
        ("pytest.skip()", [1]),
        ("@pytest.mark.skipif(x, reason='no such system')\ndef test_a(): ...", []),
        ("pytest.importorskip('ray', reason='extra cluster')", []),
    ],
)
def test_skips_without_reason_are_noticed(text, lines):
    assert list(_without_reason(ast.parse(text))) == lines
