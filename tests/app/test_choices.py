"""What can be chosen, and that a form means what `configured` reads."""

import pytest

from expunge import catalogue
from expunge.app import choices, inputs
from expunge.app.requests import Erasure, Wanted, folder_name, unfinished
from expunge.errors import InputError, NameRefused, RunError, SettingError

ERASERS = [system.id for system in catalogue.implemented("erase")]


@pytest.mark.parametrize("id", ERASERS)
def test_a_form_left_alone_is_the_preset_and_typed_again_gives_the_same(id):
    cls = catalogue.resolve(id)
    for preset in ("paper", *cls.presets):
        fields = choices.form(id, preset)
        values = [field.value for field in fields]
        assert choices.changes(fields, values) == {}
        # Every text in the form reads back as the value it stands for.
        typed = {f.name: str(f.value).lower() if f.control == "switch" else f.value for f in fields}
        assert cls.configured(None, **typed).settings() == cls.configured(preset).settings()


def test_only_what_was_changed_is_passed_on():
    fields = choices.form("uce", "paper")
    values = [field.value for field in fields]
    place = [field.name for field in fields].index("erase_phrases")
    values[place] = not values[place]
    assert choices.changes(fields, values) == {"erase_phrases": str(values[place]).lower()}


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(SettingError, match="world"):
        choices.form("uce", "wrold")


def test_methods_fit_the_family_and_those_with_evidence_come_first():
    pictures, texts = choices.methods("diffusion"), choices.methods("language")
    assert {"uce", "esd"} <= {m.id for m in pictures} and "graddiff" not in {m.id for m in pictures}
    assert "graddiff" in {m.id for m in texts} and "uce" not in {m.id for m in texts}
    works = [catalogue.status(m.id) == "works" for m in pictures]
    assert works == sorted(works, reverse=True)
    assert all(len(m.label) < 80 for m in pictures)


def test_attacks_say_whether_they_can_teach():
    assert any(
        a.id == "unlearndiffatk" and "searches" in a.label for a in choices.attacks("diffusion")
    )
    assert any(a.id == "relearning" and "can teach" in a.label for a in choices.attacks("language"))


def test_the_usual_preset_is_the_worlds_then_the_kinds_then_the_papers():
    assert choices.presets("uce", "style", True)[1] == "world"
    assert choices.presets("uce", "style", False)[1] == "paper:style"
    assert choices.presets("uce", None, False)[1] == "paper"


@pytest.mark.parametrize("typed", ["1.5", "x", "-1", "9" * 30, "1e3", "65"])
def test_numbers_are_checked_with_the_name_of_their_field(typed):
    with pytest.raises(InputError, match="seeds"):
        inputs.whole(typed, "seeds", 0, 64)


def test_empty_fields_are_nothing_and_numbers_are_numbers():
    assert inputs.whole(" ", "seeds") is None and inputs.whole("12", "seeds") == 12
    assert inputs.number("", "guidance") is None and inputs.number("7.5", "guidance") == 7.5
    for typed in ("nan", "inf", "seven"):
        with pytest.raises(InputError, match="guidance"):
            inputs.number(typed, "guidance")


def test_details_belong_to_a_single_concept():
    one = inputs.wanted(["star"], "object", " circle ", "pentagram, asterisk,")
    assert one == Wanted(("star",), "object", "circle", ("pentagram", "asterisk"))
    assert inputs.wanted(["star", "hazard"], "object", "circle", "x") == Wanted(("star", "hazard"))


def test_a_folder_is_named_after_everything_that_changes_the_result():
    name = folder_name("uce", ["Mira Solen / ../x"], {"seed": 0})
    assert name == folder_name("uce", ["Mira Solen / ../x"], {"seed": 0})
    assert name != folder_name("uce", ["Mira Solen / ../x"], {"seed": 1})
    assert name.startswith("uce-mira-solen-x-") and "/" not in name and ".." not in name
    assert folder_name("uce", ["\u661f"], 1).startswith("uce-")
    with pytest.raises(NameRefused):
        folder_name("../uce", ["star"], 1)


def test_requests_survive_their_file_and_bad_files_are_passed_over(tmp_path):
    request = Erasure(
        "world",
        Wanted(("star",), None, "circle", ("a",)),
        "esd",
        "world",
        {"steps": "3"},
        ("moon",),
        7,
    )
    for name, text in (
        ("good", None),
        ("bad", "{"),
        ("old", '{"wanted": {"name": 1}, "keep": []}'),
    ):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "request.json"
        file.write_text(text if text is not None else __import__("json").dumps(request.to_dict()))
    assert unfinished(tmp_path) == [("good", request)]
    with pytest.raises(RunError, match="bad"):
        Erasure.read(tmp_path / "bad" / "request.json")
    (tmp_path / "good" / "edit.safetensors").write_bytes(b"")
    assert unfinished(tmp_path) == [], "what has an edit is finished"


def test_the_command_is_quoted_for_a_shell():
    request = Erasure(
        "my model", Wanted(("red; rm -rf /",)), "uce", "paper", {"templates": "a {}"}, ("x y",)
    )
    said = request.command(out="out")
    assert "'my model'" in said and "'red; rm -rf /'" in said and "'templates=a {}'" in said
