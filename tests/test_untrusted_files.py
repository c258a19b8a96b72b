"""Files of others: none hangs, exhausts or misleads the process."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxint4
from fxint4.errors import CheckpointError, PackedFormatError
from fxint4.untrusted_files import MOST_METADATA, open_tensors, parse_json, read_json

READERS: dict[str, Callable[[Path], Any]] = {
    "json": lambda path: read_json(path, CheckpointError),
    "tensors": fxint4.load_file,
    "calibration": fxint4.Calibration.load,
    "checkpoint": lambda path: fxint4.load_(torch.nn.Linear(2, 2), path),
    "report": fxint4.Report.load,
}
KINDS = {
    "folder": "Is a directory|a folder|is no .* file|must hold one",
    "fifo": "a FIFO",
    "socket": "a socket",
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_ordinary_files_are_read(kind: str, reader: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        here = Path.cwd()
        os.chdir(tmp_path)  # the path of a socket may have some hundred characters at most
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    with pytest.raises(fxint4.Int4Error, match=KINDS[kind]) as caught:
        READERS[reader](path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("reader", READERS)
def test_what_can_not_be_read_is_named_with_the_reason(
    reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    missing, long = tmp_path / "none.safetensors", tmp_path / ("n" * 300 + ".safetensors")
    for path, reason in ((missing, "No such file|there is no file"), (long, "File name too long")):
        with pytest.raises(fxint4.Int4Error, match=reason) as caught:
            READERS[reader](path)
        assert str(path) in str(caught.value)
    with pytest.raises(fxint4.Int4Error):
        READERS[reader](Path("a\0b.safetensors"))


@pytest.mark.parametrize("reader", ["json", "tensors", "calibration", "checkpoint", "report"])
def test_no_permission(reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    fxint4.save_file({"a": torch.ones(2)}, path)
    denied = PermissionError(13, "Permission denied", str(path))

    def deny(*_: Any, **__: Any) -> Any:
        raise denied

    monkeypatch.setattr("builtins.open", deny)
    monkeypatch.setattr("safetensors.safe_open", deny)
    with pytest.raises(fxint4.Int4Error, match=r"a\.safetensors.*Permission denied"):
        READERS[reader](path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "1" * 5000, "{", "", b"\xff"])
def test_json_that_can_not_be_parsed(text: str | bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^the header can't be read: it is "):
        parse_json(text, "the header", CheckpointError)


def test_json_files_of_any_size_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxint4.untrusted_files._MOST_JSON", 10)
    (tmp_path / "a.json").write_text("[1, 2, 3]")
    assert read_json(tmp_path / "a.json", CheckpointError) == [1, 2, 3]
    (tmp_path / "a.json").write_text("[1, 2, 30]" + " ")
    with pytest.raises(CheckpointError, match=r"a\.json can't be read: it has more than 10 bytes"):
        read_json(tmp_path / "a.json", CheckpointError)


@pytest.mark.parametrize("key", ["fxint4", "fxint4.quant.statistics", "tensor_names", "other"])
def test_metadata_that_would_take_gigabytes(key: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "a.safetensors"
    text = "[" + "[]," * (MOST_METADATA // 3) + "[]]"
    save_file({"a": torch.ones(2)}, path, metadata={key: text})
    for reader in ("tensors", "calibration", "checkpoint"):
        with pytest.raises(fxint4.Int4Error, match=r"a\.safetensors: metadata of 16\d* characters"):
            READERS[reader](path)


def test_what_could_not_be_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setattr("fxint4.untrusted_files.MOST_METADATA", 20)
    for save in (lambda path: fxint4.save_file({}, path), fxint4.Calibration({}).save):
        with pytest.raises(fxint4.WriteError, match="metadata of "):
            save(tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("left", [0, 4, 30, 100])
def test_a_file_that_was_cut_short(left: int, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / "a.safetensors"
    fxint4.save_file({"a": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:left])
    expected = pytest.raises(PackedFormatError, match=r"a\.safetensors can't be read")
    with expected, open_tensors(path, PackedFormatError):
        pass
