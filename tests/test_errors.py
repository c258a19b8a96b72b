"""Texts of errors, and names of others in them."""

from __future__ import annotations

import errno

import pytest

import fxint4
from fxint4.errors import CommandError, first_line, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("layers.0.größe", "layers.0.größe"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\x9b2Jb", r"a\x9b2Jb"),  # the one character that begins an escape sequence alone
        ("a\rb\nc\td\0e\x7f", r"a\rb\nc\td\x00e\x7f"),
        ("a\ud800b", r"a\ud800b"),
        ("a\u202eb\u200bc\u2028d\U000e0041", r"a\u202eb\u200bc\u2028d\U000e0041"),
    ],
)
def test_a_terminal_obeys_no_name(name: str, shown: str) -> None:
    assert printable(name) == shown
    assert printable(shown) == shown
    shown.encode()  # a file can hold it


def test_ends_of_lines_may_stay() -> None:
    assert printable("one\ntwo\x1b", keep="\n") == "one\ntwo\\x1b"


def test_errors_show_names_so() -> None:
    for kind in (fxint4.CheckpointError, fxint4.PackedFormatError, CommandError, fxint4.WriteError):
        assert str(kind("a\x1b[2J\nb")) == "a\\x1b[2J\nb"
    assert first_line(KeyError("a\x1b")) == r"'a\x1b'"
    assert first_line(ValueError("a\x1bb\nc")) == r"a\x1bb"


def test_a_file_that_is_not_written_is_an_os_error_too() -> None:
    error = fxint4.WriteError("x can't be written")
    error.errno = errno.ENOSPC
    assert isinstance(error, (fxint4.Int4Error, OSError))
    assert str(error) == "x can't be written"
