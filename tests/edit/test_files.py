"""Edit files: a round trip, and every damaged or hostile file refused by one of our own errors."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import stat
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import torch as safetensors

from expunge.edit import Edit, Manifest, Target, files
from expunge.errors import ExpungeError, MissingPart, NonFiniteError, WrongBase
from expunge.testing import tiny_diffusion, tiny_layout

from .edits import make, same, values


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def edit(model):
    return make(model, names=model.text_projections()[:2])


@pytest.fixture(scope="module")
def content(edit, tmp_path_factory):
    path = tmp_path_factory.mktemp("edit") / "good.safetensors"
    edit.save(path)
    return path.read_bytes()


def refused(path: Path, data: bytes | None = None, match: str = "") -> bool:
    """Whether reading the file is refused in our words, ``match`` (or the file's name) among them."""
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ExpungeError, match=match or path.name):
        Edit.load(path)
    return True


def split(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_round_trip(edit, content, tmp_path):
    path = tmp_path / "a folder" / "edit.safetensors"
    edit.save(path)
    again = Edit.load(path)
    assert again == edit and again.manifest == edit.manifest and hash(again) == hash(edit)
    assert all(torch.equal(t, edit.tensors[n]) for n, t in again.tensors.items())
    assert path.read_bytes() == content and [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_preset_is_told_but_makes_no_other_edit(edit, tmp_path):
    named = Edit(edit.manifest.model_copy(update={"preset": "paper"}), edit.tensors)
    named.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert again.manifest.preset == "paper" and again == edit and again.digest == named.digest


def test_truncated_anywhere(content, tmp_path):
    draw = random.Random(0)
    for length in {
        0,
        1,
        7,
        8,
        9,
        len(content) - 1,
        *(draw.randrange(len(content)) for _ in range(60)),
    }:
        assert refused(tmp_path / "short.safetensors", content[:length])
    assert refused(tmp_path / "short.safetensors", content[:100], "cut short: it has 100 bytes")
    assert refused(tmp_path / "long.safetensors", content + b"\0")


def test_any_flipped_bit_is_noticed(model, content, tmp_path):
    path, before, draw = tmp_path / "flipped.safetensors", values(model), random.Random(0)
    for _ in range(250):
        data, place = bytearray(content), draw.randrange(len(content))
        data[place] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        with pytest.raises(ExpungeError):
            Edit.load(path)
    assert same(model, before)
    path.write_bytes(content)  # control
    Edit.load(path)


@pytest.mark.parametrize("length", [0, 1, 7, 2**63, 2**64 - 1, 100_000_001])
def test_header_lengths(content, tmp_path, length):
    assert refused(tmp_path / "head.safetensors", length.to_bytes(8, "little") + content[8:])


def test_headers_that_are_not_ours(content, tmp_path):
    path = tmp_path / "head.safetensors"
    header, data = split(content)
    text = json.dumps(header)
    assert refused(path, joined(b"\xff\xfe" * 20, data), "not valid JSON")
    assert refused(path, joined(b"{" * 5000, data), "not valid JSON")
    assert refused(path, joined(b"[" * 90_000, data), "not valid JSON")
    assert refused(path, joined(b"[1, 2]", data))
    assert refused(path, joined((text[:-1] + ', "shared.left": {}}').encode(), data), "twice")
    for metadata in (None, [], "text", {}, {"expunge": 3}, {"expunge": None}, {"expunge": {}}):
        assert refused(path, joined({**header, "__metadata__": metadata}, data))
    entry = dict(header["shared.left"])
    for change in (
        {"data_offsets": [0, 10**12]}, {"data_offsets": [8, 4]}, {"shape": [2**40, 2**40]},
        {"dtype": "X9"}, {"dtype": "F64"}, {"shape": [1]}, {"shape": "x"},
    ):  # fmt: skip
        assert refused(path, joined({**header, "shared.left": {**entry, **change}}, data))


def sealed(content: bytes, **changes) -> bytes:
    """The file with a changed manifest and a digest that agrees with it."""
    header, data = split(content)
    manifest = {**json.loads(header["__metadata__"]["expunge"]), **changes}
    text = json.dumps({k: v for k, v in manifest.items() if v is not ...}, sort_keys=True)
    header["__metadata__"] = {"expunge": text, "expunge_sha256": files._seal(text), "format": "pt"}
    return joined(header, data)


def test_manifests_are_validated(content, tmp_path):
    path = tmp_path / "manifest.safetensors"
    path.write_bytes(sealed(content))
    Edit.load(path)  # control
    assert refused(path, sealed(content, nonsense=1), "nonsense")
    assert refused(path, sealed(content, kind="odd"), "kind")
    assert refused(path, sealed(content, method=...), "method")
    assert refused(path, sealed(content, base={}), "base")
    assert refused(
        path, sealed(content, format=1), "format 1; this version of expunge reads format 2"
    )
    assert refused(path, sealed(content, format=3), "format 3")
    assert refused(path, sealed(content, format="2"), "format")
    assert refused(path, sealed(content, version=0), "version")
    assert refused(path, sealed(content, tensors_digest="0" * 64), "digest")
    assert refused(path, sealed(content, kind="dense"), "lacks the tensor")
    header, data = split(content)
    for text in ("{", "1" * 5000, "[" * 90_000, "null", '"x"'):
        metadata = {"expunge": text, "expunge_sha256": files._seal(text), "format": "pt"}
        assert refused(path, joined({**header, "__metadata__": metadata}, data))
    header["__metadata__"]["expunge"] = header["__metadata__"]["expunge"].replace("maker", "baker")
    assert refused(path, joined(header, data), "does not agree with its digest")


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


def test_other_files_in_disguise(tmp_path):
    path, canary = tmp_path / "edit.safetensors", tmp_path / "canary"
    for protocol in (0, 2, 4):
        assert refused(path, pickle.dumps(Payload(canary), protocol))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(canary)))
    assert refused(path)
    torch.save({"w": torch.zeros(3)}, path)
    assert refused(path)
    assert refused(path, safetensors.save({"w": torch.zeros(3)}), "no expunge manifest")
    assert not canary.exists()
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    assert refused(folder, match="not a regular file")
    assert refused(tmp_path / "missing.safetensors", match="there is no such file")
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert refused(pipe, match="not a regular file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_tensors(edit, tmp_path, value):
    tensors = {n: t.clone() for n, t in edit.tensors.items()}
    tensors["shared.right"][1, 3] = value
    digest = files.tensors_digest(tensors)
    path = tmp_path / "nan.safetensors"
    files.write(path, edit.manifest.model_copy(update={"tensors_digest": digest}), tensors)
    with pytest.raises(NonFiniteError, match=r"shared\.right"):
        Edit.load(path)


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    files.atomic_write(path, b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space"):
            files.atomic_write(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]
    files.atomic_write(path, b"new")  # control
    assert path.read_bytes() == b"new"


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        files.atomic_write(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_a_file_of_another_model_is_a_sentence(content, tmp_path):
    path, other = tmp_path / "edit.safetensors", tiny_diffusion(seed=4)
    path.write_bytes(content)
    before = values(other)
    with pytest.raises(WrongBase, match="other weights"):
        Edit.load(path).apply(other)
    assert same(other, before)
    with pytest.raises(MissingPart, match="fitted on another kind of model"):
        Edit.load(path).apply(tiny_layout("flux"))


@pytest.mark.parametrize(
    "base",
    [
        {"id": "x", "components": [], "exact": {}},
        {
            "id": "x",
            "components": {"unet": {"structure": "s", "dtype": "load", "sample": []}},
            "exact": {},
        },
        {
            "id": "x",
            "components": {"unet": {"structure": "s", "dtype": "float32", "sample": ["a"]}},
            "exact": {},
        },
        {"id": "x", "components": {"unet": 3}, "exact": {}},
        {"id": "x", "components": {}, "exact": []},
    ],
)
def test_a_malformed_base_is_refused_before_it_is_compared(base):
    from pydantic import ValidationError

    from expunge.edit import Manifest

    with pytest.raises(ValidationError):
        Manifest(kind="dense", method="uce", version=1, concepts=[], base=base)


def test_a_file_from_before_acts_and_tokens_is_the_same_file(tmp_path):
    tensors = {"delta.unet.a": torch.arange(6.0).reshape(2, 3)}
    manifest = Manifest(
        kind="dense", method="maker", version=1, settings={"strength": 0.5}, concepts=[{"name": "star"}],
        keep=["moon"], base={"id": "0", "components": {}, "exact": {}}, seed=4,
        targets=[Target(name="unet.a", shape=(2, 3))], tensors_digest=files.tensors_digest(tensors),
    )  # fmt: skip
    edit, path = Edit(manifest, tensors), tmp_path / "old.safetensors"
    edit.save(path)
    # Both digests were printed by the code that knew neither key.
    assert edit.digest == "a78e01126312fd70ce27aa4a1eea0bba78b130102292d83bc334a98d486b9094"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == (
        "3eb30e8071fd137b7ed743277cc8a6b493ee8059fcbde7f5ec7b82633108afcf"
    )
    again = Edit.load(path)
    assert again == edit and not again.manifest.acts and not again.manifest.tokens
