"""The command line: wrong ones get one line, and the demo really runs."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from typing import Any

import pytest
import torch

import fxint4
from fxint4 import demo
from fxint4.__main__ import COMMANDS, main

USAGE = "python -m fxint4"


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What a wrong command line gets; nothing else may be printed."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "a command is missing"),
        (["frobnicate"], "unknown command 'frobnicate'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_a_wrong_command_line_gets_one_line(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, *argv)
    assert said == f"{USAGE}: {message}; `{USAGE} --help` lists the commands\n"


def test_the_exit_status_reaches_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxint4", "frobnicate"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{USAGE}: unknown command 'frobnicate'; `{USAGE} --help` lists the commands"
    ]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out.partition("commands:\n")[2]
    assert [line.split(maxsplit=1) for line in listed.splitlines()] == [
        [name, what] for name, (*_, what) in COMMANDS.items()
    ]


def test_the_status_of_a_command_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def command(argv: list[str]) -> int:
        given.extend(argv)
        return 7

    monkeypatch.setattr(demo, "main", command)
    assert main(["demo", "--device", "cpu", "-h"]) == 7
    assert given == ["--device", "cpu", "-h"]


# --- demo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--group-size", "48"], "argument --group-size: invalid choice: 48"),
        (["--group-size", "x"], "argument --group-size: invalid int value: 'x'"),
        (["--device", "toaster"], "device 'toaster' can't be used: "),
        (["--device", "cpu:1:2"], "device 'cpu:1:2' can't be used: "),
    ],
)
def test_a_wrong_argument_of_the_demo_is_named(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    *_, last = refusal(capsys, "demo", *argv).splitlines()
    assert last.startswith(f"{USAGE} demo: error: {message}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    *_, last = refusal(capsys, "demo", "--device", "cuda").splitlines()
    assert last.startswith(f"{USAGE} demo: error: device 'cuda' can't be used: ")


@pytest.mark.parametrize("missing", [demo.MODEL_PACKAGE, "transformers"])
def test_the_demo_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.machinery.ModuleSpec("any", None, is_package=True)
    found.submodule_search_locations = ["/nowhere"]
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else found)
        status = main(["demo"])
    assert status == 2
    assert capsys.readouterr() == (
        'the demo needs a trained model and transformers: pip install "fxint4[demo]"\n',
        "",
    )


def needs(*packages: str) -> Any:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


@needs(demo.MODEL_PACKAGE, "transformers")
def test_the_demo_packs_a_trained_model_and_keeps_its_embeddings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two batches of the shortest sentences, timed once, and only int4 compiled.

    How similar the embeddings should stay follows from the SQNR of the weights. A weight whose
    noise is a share s = 10^(-SQNR/10) of its power gives a product whose noise is the same share
    of the product's power, as the rounding of one weight knows nothing of the others. Layer norms
    and the residual stream pass noise on with a gain of about 1 at most, so the shares add up. An
    output with noise of share S, perpendicular to it, has cosine 1/sqrt(1 + S) with the original.
    """
    shortest = sorted(demo.SENTENCES, key=len)[: 2 * demo.BATCH]
    monkeypatch.setattr(demo, "SENTENCES", tuple(shortest))
    monkeypatch.setattr(demo, "REPEATS", 1)
    monkeypatch.setattr(demo, "warm_up", lambda *_: None)  # it makes the times comparable
    compile_to_int4 = torch.compile

    def spare_the_other_compile(model: Any, backend: str, **kwargs: Any) -> Any:
        return model if backend == "inductor" else compile_to_int4(model, backend=backend, **kwargs)

    monkeypatch.setattr(torch, "compile", spare_the_other_compile)
    assert main(["demo", "--device", "cpu"]) == 0

    out = capsys.readouterr().out
    table = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert f"{len(shortest)} sentences" in out
    report = fxint4.last_report()
    assert report is not None
    assert str(report) in out

    pooler = [record for record in report.records if record.name == "pooler.dense"]
    used = [
        record for record in report.records if record not in pooler
    ]  # embeddings read no pooler
    assert [record.action for record in used] == ["packed"] * 6 * 6
    share = sum(10 ** (-(record.sqnr_db or 0.0) / 10) for record in used)
    least, mean = map(float, table["int4tile"][:2])
    assert mean >= 1 / math.sqrt(1 + share)
    assert 0 < least <= mean < 1  # int4 is not the original
    assert table["eager"][:2] == ["1.0000", "1.0000"]
