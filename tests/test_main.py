"""The command line: wrong ones get one line, and the demo really runs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from report_support import llama
from torch._inductor import aoti_load_package

import fxint4
from fxint4 import cli, demo
from fxint4.__main__ import COMMANDS, main
from fxint4.errors import CommandError

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


@pytest.mark.compiles
def test_the_exit_status_reaches_the_shell() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fxint4", "frobnicate"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        f"{USAGE}: unknown command 'frobnicate'; `{USAGE} --help` lists the commands"
    ]


@pytest.mark.compiles
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    fxint4.Report().save(tmp_path / "a.json")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "fxint4", "diff", str(tmp_path / "a.json")],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert (done.returncode, done.stderr) == (141, "")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out.partition("commands:\n")[2]
    assert [line.split(maxsplit=1) for line in listed.splitlines()] == [
        [name, what] for name, (*_, what) in COMMANDS.items()
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_can_print_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert "--json" in capsys.readouterr().out


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
@pytest.mark.compiles
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


@needs(demo.MODEL_PACKAGE, "transformers")
def test_the_demo_prints_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is compiled or timed: that is another test's."""
    run = demo.Run(torch.nn.functional.normalize(torch.randn(len(demo.SENTENCES), 8)), 1.5, 0.25)
    report = llama(layers=1)
    monkeypatch.setattr(demo, "measure", lambda *_: run)
    monkeypatch.setattr(demo, "warm_up", lambda *_: None)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    monkeypatch.setattr(fxint4, "last_report", lambda: report)
    assert main(["demo", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == report.to_dict()
    assert list(found["runs"]) == ["eager", "torch.compile", "int4tile"]
    figures = found["runs"]["int4tile"]
    assert figures["cosine_mean"] == pytest.approx(1.0)
    del figures["cosine_min"], figures["cosine_mean"]
    assert figures == {"nearest_unchanged": 48, "extra_seconds": 1.5, "pass_seconds": 0.25}


# --- export and run ------------------------------------------------------------------------------

TARGETS = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 64)
        self.fc = nn.Linear(64, 96)

    def forward(self, ids, *, shift):
        return self.fc(self.embedding(ids)) + shift


def model():
    return Model().bfloat16().eval(), (torch.randint(0, 50, (2, 3)),), {"shift": torch.ones(96)}


def by_name():
    return Model().eval(), {"ids": torch.zeros(1, 3, dtype=torch.long), "shift": torch.ones(96)}


def training():
    return Model(), torch.zeros(2, 3, dtype=torch.long)


def nothing():
    pass


def three():
    return 3, 4


def sentence():
    return Model().eval(), "hello"


def broken():
    raise RuntimeError("two\\nlines")


number = 3
"""


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("targets") / "targets.py"
    path.write_text(TARGETS)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, in which the test runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def package(targets: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Made once, by the command, for all tests that run it."""
    path = str(tmp_path_factory.mktemp("package") / "model.pt2")
    argv = ["export", f"{targets}:model", "-o", path, "--dynamic", "0:1", "--group-size", "32"]
    assert main(argv) == 0
    return path


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a command which fails has to say."""
    assert main(list(argv)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    start = f"{USAGE} {argv[0]}: "
    assert line.startswith(start)
    return line.removeprefix(start)


def test_a_package_of_the_command_runs(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_CALLS", 4)
    assert main(["run", package, "--bench"]) == 0
    out, err = capsys.readouterr()
    first, second = out.splitlines()
    assert first.startswith("output 0: float32 [2, 3, 96], mean ")
    assert re.fullmatch(r"4 calls: median [\d.]+ ms, half within [\d.]+ to [\d.]+ ms", second)
    assert err == ""  # no bar in a pipe
    assert main(["run", package, "--bench", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    [output] = found["outputs"]
    assert (output["dtype"], output["shape"]) == ("float32", [2, 3, 96])
    assert output["min"] < output["mean"] < output["max"]
    bench = found["bench"]
    assert bench["calls"] == 4
    assert 0 < bench["lower_quartile_ms"] <= bench["median_ms"] <= bench["upper_quartile_ms"]


def test_json_has_no_infinity() -> None:
    found = cli._json_of(torch.tensor([1.0, math.inf]))
    assert found == {"dtype": "float32", "shape": [2], "mean": None, "min": 1.0, "max": None}
    assert cli._json_of(torch.zeros(0)) == {"dtype": "float32", "shape": [0]}
    assert cli._json_of((1, 2)) == {"value": "(1, 2)"}


def test_the_export_command_reports(
    targets: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.pt2"
    monkeypatch.setattr(
        "fxint4.frontends.package.aoti_package",
        lambda _, made, __: Path(made).write_bytes(bytes(1234567)),
    )
    argv = ["export", f"{targets}:model", "-o", str(path), "--skip", "embedding", "--device", "cpu"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    report = fxint4.last_report()
    assert out == f"{report}\n\nwrote {path}, 1.2 MB\n"
    assert err == ""
    assert report is not None
    assert report.output_error is None
    assert {record.method for record in report.records} <= {"rtn", ""}
    stats = tmp_path / "stats.safetensors"
    fxint4.Calibration({}).save(stats)
    assert main([*argv, "--method", "gptq", "--calibration", str(stats)]) == 0
    assert "mse: not in the calibration" in capsys.readouterr().out
    assert main([*argv, "--measure"]) == 0
    assert re.search(r"^output of the model: [\d.]+% off", capsys.readouterr().out, re.MULTILINE)
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["package"], found["bytes"]) == (str(path), 1234567)
    assert found["report"] == fxint4.last_report().to_dict()
    assert found["report"]["model"] == "Model"


def test_inputs_come_from_a_file_and_outputs_go_to_one(
    package: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = {"shift": torch.zeros(96), "ids": torch.arange(10).view(2, 5)}
    torch.save(inputs, "x.pt")
    assert main(["run", package, "--inputs", "x.pt", "--output", "y.pt"]) == 0
    assert capsys.readouterr().out.startswith("output 0: float32 [2, 5, 96]")
    saved = torch.load("y.pt")
    shift, ids = inputs.values()
    assert torch.equal(saved, aoti_load_package(package)(ids, shift=shift))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([torch.zeros(2, 3)], "got 1 inputs, the package takes 2"),
        (
            [torch.zeros(2, 3), torch.zeros(96)],
            "input 0 is float32 [2, 3], the package takes int64 [2, *]",
        ),
        (
            {"ids": torch.zeros(3, 3, dtype=torch.long), "shift": torch.zeros(96)},
            "input 0 is int64 [3, 3], the package takes int64 [2, *]",
        ),
        (
            {"ids": torch.zeros(2, 3, dtype=torch.long), "shift": "x"},
            "input 1 is a str, the package takes float32 [96]",
        ),
        (
            {"ids": torch.zeros(2, 3, dtype=torch.long), "other": torch.zeros(96)},
            "inputs 'x.pt' do not fit: Ran into a kwarg keyword mismatch: Got the following "
            "keywords ['other'] but expected ['shift']",
        ),
        ({"shift": torch.zeros(96)}, "inputs 'x.pt' have no 'ids', which the package takes"),
        (3, "inputs 'x.pt' are an int; need a tensor, tuple, list or dict"),
    ],
)
def test_inputs_that_do_not_fit_are_named(
    inputs: object, message: str, package: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(inputs, "x.pt")
    assert failure(capsys, "run", package, "--inputs", "x.pt") == message


def test_inputs_are_never_unpickled_code(
    package: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(subprocess.run, "x.pt")
    said = failure(capsys, "run", package, "--inputs", "x.pt")
    assert said.startswith("inputs 'x.pt' can't be loaded: Weights only load failed")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nocolon"], "TARGET is 'nocolon'; it takes MODULE:FACTORY or FILE.py:FACTORY"),
        (["missing.py:model"], "there is no file 'missing.py'"),
        (["no_such_module:x"], "module 'no_such_module' can't be imported: No module named "),
        (["TARGETS:other"], "TARGETS has no 'other'; it takes a function that returns a model"),
        (["TARGETS:number"], "TARGETS has an int for 'number'; it takes a function that "),
        (
            ["TARGETS:nothing"],
            "TARGETS:nothing must return (model, example inputs) or (model, args, kwargs); it "
            "returned None",
        ),
        (["TARGETS:three"], "TARGETS:three must return (model, example inputs) or (model, args, "),
        (["TARGETS:sentence"], "TARGETS:sentence must return (model, example inputs) or (model, "),
        (
            ["TARGETS:training"],
            "the model of TARGETS:training is in training mode; call model.eval() in it",
        ),
        (["TARGETS:broken"], "RuntimeError: two (--traceback shows where)"),
        (["TARGETS:model", "--device", "toaster"], "device 'toaster' can't be used: "),
        (["TARGETS:model", "--dynamic", "0"], "--dynamic is '0'; it takes INPUT:DIM, such as 0:0"),
        (
            ["TARGETS:model", "--dynamic", "2:0"],
            "--dynamic 2:0: the tensors among the inputs are 0, shift",
        ),
        (
            ["TARGETS:model", "--dynamic", "shift:1"],
            "--dynamic shift:1: input shift has shape [96], and no dimension 1",
        ),
        (
            ["TARGETS:by_name", "--dynamic", "ids:0"],
            "--dynamic ids:0: that dimension is 1 in the example, which torch.export takes for "
            "fixed; let the factory make it 2 or more",
        ),
        (["TARGETS:model", "-o", "model.so"], "path is 'model.so'; a package is a file whose "),
    ],
)
def test_what_can_not_be_exported_is_named(
    argv: list[str], message: str, targets: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [argument.replace("TARGETS", targets) for argument in argv]
    said = failure(capsys, "export", "-o", "model.pt2", *argv)
    assert said.startswith(message.replace("TARGETS", targets))


def test_a_traceback_is_shown_where_it_is_asked_for(targets: str) -> None:
    argv = ["export", "-o", "model.pt2", f"{targets}:broken"]
    for asked in (["--traceback", *argv], [*argv, "--traceback"]):
        with pytest.raises(RuntimeError, match="two"):
            main(asked)


def test_what_is_no_package_is_named(
    package: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "x.pt2 can't be read: No such file or directory"
    assert failure(capsys, "run", "x.pt2") == missing

    whole = Path(package).read_bytes()
    Path("x.pt2").write_bytes(whole[: len(whole) // 2])
    damaged = "x.pt2 is damaged, or no package: File is not a zip file"
    assert failure(capsys, "run", "x.pt2") == damaged

    with zipfile.ZipFile("x.pt2", "w") as archive:
        archive.writestr("x/readme", "hello")
    assert failure(capsys, "run", "x.pt2") == "x.pt2 is no package of AOTInductor"

    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(2, 2),)), "x.pt2")
    assert failure(capsys, "run", "x.pt2").startswith("x.pt2 holds no compiled model; ")


def test_a_flipped_bit_is_found(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the compiled code, which the loader unpacks."""
    data = bytearray(Path(package).read_bytes())
    with zipfile.ZipFile(package) as archive:
        [code] = [entry for entry in archive.infolist() if entry.filename.endswith(".so")]
    data[code.header_offset + code.compress_size // 2] ^= 16
    path = tmp_path / "x.pt2"
    path.write_bytes(data)
    assert failure(capsys, "run", str(path)).startswith(f"{path} is damaged: its part ")


@pytest.mark.parametrize(
    ("have", "message"),
    [
        ("AVX512", ""),
        ("AVX2", "was compiled for CPUs with AVX512 instructions, and this one has AVX2: export"),
        ("DEFAULT", "was compiled for CPUs with AVX512 instructions, and this one has none of"),
    ],
)
def test_a_package_for_a_newer_cpu_is_refused(
    have: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: have)
    with pytest.raises(CommandError, match=message) if message else contextlib.nullcontext():
        cli._check_cpu("x.pt2", "AVX512 AVX512_VNNI")
    cli._check_cpu("x.pt2", "ASIMD")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_package_for_another_device_is_refused(
    package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "x.pt2")
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            if name.endswith("_metadata.json"):
                text = json.dumps({**json.loads(text), "AOTI_DEVICE_KEY": "cuda"}).encode()
            new.writestr(name, text)
    assert failure(capsys, "run", path).startswith("device 'cuda' can't be used: ")


def test_bars_are_shown_on_a_terminal_alone(
    targets: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "model.pt2"
    monkeypatch.setattr(
        "fxint4.frontends.package.aoti_package", lambda _, made, __: Path(made).touch()
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["export", f"{targets}:model", "-o", str(path)]) == 0
    bars = capsys.readouterr().err
    assert "fxint4: capturing: step 2 of 3" in bars
    assert "fxint4: folding weights" in bars
