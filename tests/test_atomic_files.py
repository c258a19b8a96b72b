"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fxint4
from fxint4.atomic_files import draft_of, write_tensors, write_whole


def write_text(path: Path) -> None:
    write_whole(path, "new")


def write_state(path: Path) -> None:
    fxint4.save_file({"w": torch.ones(3)}, path)


WRITERS: dict[str, Callable[[Path], None]] = {
    "text": write_text,
    "tensors": write_state,
    "calibration": fxint4.Calibration({}).save,
}
writers = pytest.mark.parametrize("name", WRITERS)


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


@writers
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk(
    name: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")

    def full(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("safetensors.torch.save_file", lambda _, path, **__: full(path))
    if name == "text":
        path_class = type(tmp_path)
        write = path_class.write_bytes
        monkeypatch.setattr(path_class, "write_bytes", lambda path, _: (write(path, b"h"), full2()))

        def full2() -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    if there:
        path.write_text("old")
    with pytest.raises(fxint4.WriteError, match=rf"{path} can't be .*: No space left") as caught:
        WRITERS[name](path)
    assert caught.value.errno == errno.ENOSPC
    assert names_in(tmp_path) == ({"file"} if there else set())
    assert not there or path.read_text() == "old"


def test_what_safetensors_says_of_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors = pytest.importorskip("safetensors")

    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(fxint4.WriteError, match=r"w can't be written.*No space left"):
        fxint4.save_file({"w": torch.ones(3)}, tmp_path / "w")
    assert not names_in(tmp_path)


@writers
def test_a_symbolic_link_stays_and_what_it_leads_to_is_written(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "file", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    (tmp_path / "middle").symlink_to("real/file")
    link.symlink_to("middle")
    WRITERS[name](link)
    assert os.readlink(link) == "middle"
    assert os.readlink(tmp_path / "middle") == "real/file"
    assert target.read_bytes()[:3] != b"old"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names_in(tmp_path / "real") == {"file"}


def test_a_link_to_nothing_makes_the_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("later")
    write_text(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "later").read_text() == "new"


@writers
def test_a_new_file_has_the_permissions_that_new_files_have(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "usual").write_text("")
    WRITERS[name](tmp_path / "file")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


@writers
def test_a_name_as_long_as_names_may_be(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    path = tmp_path / ("n" * 255)
    WRITERS[name](path)
    WRITERS[name](path)
    assert names_in(tmp_path) == {path.name}
    with pytest.raises(fxint4.WriteError, match="File name too long"):
        WRITERS[name](tmp_path / ("n" * 256))


def test_names_on_the_way_can_not_be_guessed_or_taken(tmp_path: Path) -> None:
    path = tmp_path / "file"
    seen = set()
    for _ in range(20):
        with draft_of(path) as draft:
            assert draft.is_file()
            assert len(draft.name.encode()) < 64
            assert not {str(os.getpid()), str(threading.get_ident())} & set(draft.name.split("."))
            seen.add(draft.name)
    assert len(seen) == 20


def test_a_link_that_is_in_the_way_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".fxint4-{'0' * 32}").symlink_to(victim)
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    with pytest.raises(fxint4.WriteError, match=r"file can't be written.*File exists"):
        write_text(tmp_path / "file")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("kind", ["folder", "fifo", "loop"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "there"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("there")
    before = path.lstat().st_mode
    with pytest.raises(fxint4.WriteError, match="there can't be written"):
        write_text(path)
    assert path.lstat().st_mode == before
    assert names_in(tmp_path) == {"there"}


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(fxint4.WriteError, match="No such file or directory"):
        write_text(tmp_path / "no" / "file")
    with pytest.raises(fxint4.WriteError, match="can't be written"):
        write_text(Path("a\0b"))


def test_names_and_dtypes_that_a_file_can_not_hold(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    wide = torch.ones(2, dtype=torch.complex128)
    for tensors, message in (
        ({"__metadata__": torch.ones(1)}, "name '__metadata__'"),
        ({"a\ud800": torch.ones(1)}, r"the name 'a\\ud800'"),
        ({"x": torch.ones(1), "wide": wide}, "can't hold wide: .*no torch.complex128; convert"),
    ):
        with pytest.raises(fxint4.WriteError, match=message):
            write_tensors(tmp_path / "file", tensors, {})
    assert not names_in(tmp_path)
