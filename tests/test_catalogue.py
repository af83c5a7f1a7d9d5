"""The catalogue: complete, consistent with the source, and unharmed by other people's packages."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter

import pytest

from expunge import catalogue
from expunge.catalogue import CatalogueWarning, System
from expunge.errors import CatalogueError

EVERY = catalogue.systems()
WITH_CLASS = catalogue.implemented()


@pytest.fixture
def fresh():
    """The catalogue without what earlier tests cached or registered, and nothing kept after."""
    caches = (
        catalogue._catalogue,
        catalogue._registrars,
        catalogue._recorded,
        catalogue._version_in_source,
    )
    before = dict(catalogue._worlds)
    for cache in caches:
        cache.cache_clear()
    yield catalogue
    catalogue._worlds.clear()
    catalogue._worlds.update(before)
    for cache in caches:
        cache.cache_clear()


# -- ours ------------------------------------------------------------------------------------------


def test_all_64_systems_stand_exactly_once():
    numbers = Counter(s.number for s in EVERY if s.number is not None)
    assert set(numbers) == set(range(1, 65))
    assert max(numbers.values()) == 1


def test_ids_are_unique_and_plain():
    ids = [s.id for s in EVERY]
    assert len(set(ids)) == len(ids)
    assert all(catalogue._ID.fullmatch(id) for id in ids)


@pytest.mark.parametrize("entry", EVERY, ids=lambda s: s.id)
def test_entry_is_complete(entry):
    assert entry.verb in catalogue.VERBS and entry.family in catalogue.FAMILIES
    assert entry.title.strip() == entry.title and len(entry.title) >= 3
    assert entry.tags and len(set(entry.tags)) == len(entry.tags)
    if entry.number is not None:
        assert entry.paper.startswith("arXiv:") and entry.year
        assert "baseline" not in entry.tags and "control" not in entry.tags
    else:
        assert {"baseline", "control"} & set(entry.tags)


@pytest.mark.parametrize("entry", WITH_CLASS, ids=lambda s: s.id)
def test_class_agrees_with_its_entry(entry):
    """The file stands in the room the entry names; id, verb and version agree with the class."""
    from expunge.method import Attack, Eraser

    room = f"expunge.{entry.verb}."
    if entry.verb in ("erase", "attack"):
        room += f"{entry.family.replace('-', '_')}."
    assert entry.class_path.startswith(room)
    cls = catalogue.resolve(entry.id)
    assert cls.id == entry.id
    assert catalogue.version(entry.id) == cls.version
    assert entry.family in cls.families or entry.family == "any"
    if entry.verb in ("erase", "attack"):
        assert issubclass(cls, {"erase": Eraser, "attack": Attack}[entry.verb])
    if entry.paper:
        assert entry.paper.removeprefix("arXiv:") in cls.source
    if entry.verb == "attack":
        assert cls.teaches == ("teaches" in entry.tags)


def test_this_issue_is_implemented():
    assert {s.id for s in WITH_CLASS} >= {
        "uce", "rece", "esd", "graddiff", "closed-form", "unlearndiffatk", "ring-a-bell",
        "random-tokens", "relearning",
    }  # fmt: skip


# -- look-up ---------------------------------------------------------------------------------------


def test_filters_narrow_and_combine():
    assert catalogue.systems(number=12) == (catalogue.system("rece"),)
    found = catalogue.systems(verb="erase", family="diffusion", tag="closed-form")
    assert {"uce", "rece", "mace", "trce"} <= {s.id for s in found}
    assert all((s.verb, s.family) == ("erase", "diffusion") for s in found)
    assert catalogue.systems(number=65) == ()


def test_family_finds_systems_for_any_family(fresh, monkeypatch):
    entry = System("anything", "Anything", "measure", "any")
    monkeypatch.setattr(catalogue, "_catalogue", lambda: {"anything": entry})
    assert catalogue.systems(family="gan") == (entry,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"verb": "erse"}, "'erase'"),
        ({"family": "difusion"}, "'diffusion'"),
        ({"tag": "finetun"}, "'finetune'"),
    ],
)
def test_unknown_filter_names_the_nearest(options, said):
    with pytest.raises(CatalogueError, match=said):
        catalogue.systems(**options)


@pytest.mark.parametrize(
    ("id", "nearest"),
    [("recce", "'rece'"), ("unlearndifatk", "'unlearndiffatk'"), ("RECE", "'rece'")],
)
def test_unknown_id_names_the_nearest(id, nearest):
    with pytest.raises(CatalogueError, match=f"{id}.*{nearest}"):
        catalogue.system(id)


@pytest.mark.parametrize("id", [None, 12, ["rece"], ""])
def test_nonsense_id_is_our_error(id):
    with pytest.raises(CatalogueError, match="no system has the id"):
        catalogue.system(id)


def test_planned_system_cannot_be_resolved():
    planned = next(s for s in EVERY if not s.class_path)
    with pytest.raises(CatalogueError, match=f"{planned.id} is planned, not implemented yet"):
        catalogue.resolve(planned.id)


def test_resolve_says_what_is_missing(fresh, monkeypatch):
    entries = {
        "no-file": System(
            "no-file", "t", "erase", "any", class_path="expunge.erase.nowhere:Nobody"
        ),
        "no-class": System("no-class", "t", "erase", "any", class_path="expunge.errors:Nobody"),
        "other-id": System("other-id", "t", "erase", "any", class_path="expunge.method:Method"),
    }
    monkeypatch.setattr(catalogue, "_catalogue", lambda: entries)
    for id, said in (
        ("no-file", "cannot be imported"),
        ("no-class", "Nobody"),
        ("other-id", "'other-id'"),
    ):
        with pytest.raises(CatalogueError, match=said):
            catalogue.resolve(id)


# -- status ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"version": 0, "battery": True, "claims": 2}, "works"),
        ({"version": 1, "battery": True, "claims": 2}, "planned"),
        ({"version": 0, "battery": False, "claims": 2}, "planned"),
        ({"version": 0, "battery": True, "claims": 0}, "planned"),
        ({"version": 0, "battery": "yes", "claims": 2}, "planned"),
        ({"version": 0, "battery": True}, "planned"),
        ("works", "planned"),
        (None, "planned"),
    ],
    ids=[
        "all",
        "older version",
        "battery red",
        "no claim",
        "not a bool",
        "no claims key",
        "text",
        "none",
    ],
)
def test_status_needs_class_battery_and_claims_at_this_version(
    fresh, monkeypatch, record, expected
):
    now = catalogue.version("rece")
    if isinstance(record, dict):  # the record's version counts from the class's
        record = {**record, "version": now + record["version"]}
    planned = next(entry.id for entry in EVERY if entry not in WITH_CLASS)
    monkeypatch.setattr(catalogue, "_recorded", lambda: {"rece": record, planned: record})
    assert catalogue.status("rece") == expected
    assert catalogue.status(planned) == "planned"  # no class, whatever the record says


def test_damaged_status_file_is_a_warning(fresh, monkeypatch, tmp_path):
    (tmp_path / "status.json").write_text('{"rece": ')
    monkeypatch.setattr(catalogue, "HERE", tmp_path)
    with pytest.warns(CatalogueWarning, match=r"status\.json"):
        assert catalogue._recorded() == {}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("version = 3", 3),
        ("version: ClassVar[int] = 4", 4),
        ("id = 'x'", 1),
        ("version = 1 + 1", None),
        ("version = 'new'", None),
    ],
)
def test_version_is_read_from_source(fresh, monkeypatch, tmp_path, body, expected):
    package = tmp_path / "versioned_package"
    package.mkdir()
    (package / "method.py").write_text(f"raise RuntimeError('imported')\nclass Mine:\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert catalogue._version_in_source("versioned_package.method", "Mine") == expected
    assert catalogue._version_in_source("versioned_package.method", "Other") is None
    assert catalogue._version_in_source("no_such_package.method", "Mine") is None


def test_json_rows_are_plain_and_complete():
    rows = json.loads(json.dumps([s.to_dict() for s in EVERY]))
    assert len(rows) == len(EVERY)
    for row in rows:
        assert {"id", "title", "verb", "family", "paper", "number", "status", "tags"} <= set(row)
        assert row["status"] in ("works", "planned")


# -- other people's packages -----------------------------------------------------------------------

GOOD = """
[[system]]
id = "their-eraser"
title = "Theirs"
verb = "erase"
family = "diffusion"
tags = ["theirs"]
class = "{package}.method:Theirs"
"""


def _install(folder, package, toml, group="expunge.methods", value=None):
    """Lay out an installed distribution with an entry point, as pip would."""
    home = folder / package
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("")
    if toml is not None:
        (home / "systems.toml").write_text(toml.format(package=package))
    (home / "method.py").write_text("class Theirs:\n    id = 'their-eraser'\n    version = 2\n")
    (home / "world.py").write_text(
        "from expunge.catalogue import register_world\n"
        "def register(): register_world('their-world', lambda variant='': ('opened', variant))\n"
        "def forgets(): pass\n"
    )
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nthey = {value or package}\n")


@pytest.fixture
def installed(fresh, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def install(package, toml=GOOD, **options):
        _install(tmp_path, package, toml, **options)
        importlib.invalidate_caches()

    yield install
    for name in [n for n in sys.modules if n.startswith("stranger_")]:
        del sys.modules[name]


def test_foreign_system_joins_without_being_imported(installed):
    installed("stranger_good")
    found = catalogue.system("their-eraser")
    assert found.package == "stranger_good" and found in catalogue.systems(tag="theirs")
    assert catalogue.version("their-eraser") == 2
    assert "stranger_good" not in sys.modules
    assert catalogue.resolve("their-eraser").__name__ == "Theirs"


@pytest.mark.parametrize(
    ("name", "toml", "said"),
    [
        ("stranger_none", None, "cannot be read"),
        ("stranger_toml", "[[system", "cannot be read"),
        ("stranger_key", GOOD + 'famly = "x"\n', "unknown key 'famly'; did you mean 'family'"),
        ("stranger_verb", GOOD.replace('"erase"', '"erose"'), "did you mean 'erase'"),
        ("stranger_path", GOOD.replace(":Theirs", ""), "package.module:Class"),
        ("stranger_id", GOOD.replace("their-eraser", "../evil"), "lower-case"),
        ("stranger_type", GOOD.replace('"Theirs"', "7"), "'title' must be a text"),
        ("stranger_taken", GOOD.replace("their-eraser", "rece"), "id 'rece' is taken by expunge"),
        ("stranger_tags", GOOD.replace('["theirs"]', '"theirs"'), "'tags' must be a list of texts"),
        ("stranger_number", GOOD + "number = 12\n", "'number' counts the systems of expunge"),
        ("stranger_twice", GOOD + GOOD, "stands twice"),
    ],
    ids=lambda v: v if isinstance(v, str) and v.startswith("stranger") else "",
)
def test_foreign_fault_is_a_warning_that_names_it(installed, name, toml, said):
    installed(name, toml)
    with pytest.warns(CatalogueWarning, match=said) as caught:
        found = catalogue.systems()
    assert found == EVERY
    assert any(name in str(w.message) for w in caught)


def test_entry_point_without_package_is_a_warning(installed):
    installed("stranger_lost", value="no_such_package_anywhere")
    with pytest.warns(CatalogueWarning, match="no_such_package_anywhere"):
        assert catalogue.systems() == EVERY


# -- worlds ----------------------------------------------------------------------------------------


def test_builtin_world_is_listed_without_import():
    assert "world" in catalogue.worlds()


def test_builtin_world_has_a_factory():
    assert callable(catalogue.world("world"))


def test_registered_world_is_found(fresh):
    def factory(variant=""):
        return variant

    catalogue.register_world("mine", factory)
    catalogue.register_world("mine", factory)  # again by the same is harmless
    assert catalogue.world("mine") is factory and "mine" in catalogue.worlds()
    with pytest.raises(CatalogueError, match="registered already"):
        catalogue.register_world("mine", print)


@pytest.mark.parametrize("name", ["", "World", "a/b", "../x", "a b", None])
def test_world_names_are_plain(fresh, name):
    with pytest.raises(CatalogueError, match="a name is lower-case"):
        catalogue.register_world(name, print)


def test_unknown_world_names_the_nearest():
    with pytest.raises(CatalogueError, match="did you mean 'world'"):
        catalogue.world("wrold")


def test_foreign_world_registers_itself(installed):
    options = {"group": "expunge.worlds", "value": "stranger_world.world:register"}
    installed("stranger_world", **options)
    assert "they" in catalogue.worlds()
    with pytest.raises(CatalogueError, match="did not register that name"):
        catalogue.world("they")  # the entry point's name and what it registers must agree
    assert catalogue.world("their-world")("never") == ("opened", "never")


def test_foreign_world_of_the_wrong_form_is_a_warning(installed):
    installed("stranger_form", group="expunge.worlds", value="stranger_form")
    with pytest.warns(CatalogueWarning, match="module:function"):
        assert "they" not in catalogue.worlds()
