"""`package`: programs compiled ahead of time, run without fxint4 and without Python."""

from __future__ import annotations

import ctypes.util
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import assert_within, dequantized, module, rounding_bound
from torch import Tensor, nn
from torch._inductor import aoti_load_package
from torch._subclasses import FakeTensor
from torch.export import Dim, export
from torch.utils import cpp_extension
from torch.utils._python_dispatch import TorchDispatchMode

import fxint4
from fxint4 import Report
from fxint4.__main__ import main
from fxint4.errors import OptionError, PackedFormatError, UnsupportedOpError
from fxint4.frontends.package import METADATA, read_metadata

pytestmark = pytest.mark.compiles

K, N = 64, 96
MEBI = 2**20


class Views(nn.Module):
    """Two weights that are small parts of one large storage: one is packed, and one is not."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        large = torch.randn(2 * MEBI, device=device, dtype=torch.bfloat16)
        self.w = nn.Parameter(large[: N * K].view(N, K))
        self.kept = nn.Parameter(large[-2 * K :].view(K, 2)[:, 0])  # every second element

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.w.t() * scale, x * self.kept


def views_expected(model: Views, x: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of `Views` for a scale of 2, and the bound on the error of the first one."""
    w = dequantized(model.w, group_size, torch.float64)
    return 2 * x.double() @ w.t(), 2 * rounding_bound(x, w), x * model.kept.detach()


class Clones(TorchDispatchMode):
    """Collects the shapes of all real tensors that are cloned."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default and not isinstance(result, FakeTensor):
            self.shapes.append(result.shape)
        return result


@dataclass(frozen=True)
class Packaged:
    path: str
    model: Views
    report: Report
    cloned: list[torch.Size]


def packaged(folder: Path, device: str) -> Packaged:
    torch.manual_seed(0)
    model = Views(device).eval()
    x = torch.randn(4, K, device=device, dtype=torch.bfloat16)
    scale = torch.tensor(2.0, device=device, dtype=torch.bfloat16)
    captured = export(
        model, (x,), {"scale": scale}, dynamic_shapes={"x": {0: Dim.DYNAMIC}, "scale": None}
    )
    with Clones() as clones:
        path = fxint4.package(captured, folder / "model.pt2")
    report = fxint4.last_report()
    return Packaged(path, model, report, clones.shapes)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """Compiled once for all tests, which only run it."""
    return packaged(tmp_path_factory.mktemp("package"), "cpu")


def check_every_m(made: Packaged, device: str, sizes: list[int]) -> None:
    loaded = aoti_load_package(made.path)
    [record] = made.report.records
    assert (record.name, record.action) == ("w", "packed")
    assert record.group_size is not None
    scale = torch.tensor(2.0, device=device, dtype=torch.bfloat16)
    for m in sizes:
        x = torch.randn(m, K, device=device, dtype=torch.bfloat16)
        y, other = loaded(x, scale=scale)
        expected, bound, expected_other = views_expected(made.model, x, record.group_size)
        assert_within(y, expected, bound)
        assert torch.equal(other, expected_other)


def test_a_package_takes_any_number_of_rows(on_cpu: Packaged) -> None:
    check_every_m(on_cpu, "cpu", [2, 3, 4, 17, 100])


def test_a_package_holds_no_storage_that_its_tensors_do_not_fill(on_cpu: Packaged) -> None:
    large = on_cpu.model.w.untyped_storage().nbytes()
    assert large == 4 * MEBI
    assert os.path.getsize(on_cpu.path) < large  # code and metadata are 2 MB at most


def test_compiling_copies_what_has_no_storage_of_its_own_and_no_more(on_cpu: Packaged) -> None:
    assert on_cpu.cloned == [on_cpu.model.kept.shape]


def test_a_package_says_what_its_inputs_are(on_cpu: Packaged) -> None:
    described = json.loads(aoti_load_package(on_cpu.path).get_metadata()[METADATA])
    x = {"shape": [None, K], "example": [4, K], "dtype": "bfloat16", "device": "cpu"}
    scale = {**x, "shape": [], "example": []}
    assert described == {"names": ["x"], "inputs": [x, scale]}


def without_fxint4(
    path: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a package of `Views` on ones, in a process that never imports fxint4."""
    source = f"""
import sys
import torch
run = torch._inductor.aoti_load_package({path!r})
device = run.get_metadata()["AOTI_DEVICE_KEY"]
x = torch.ones(3, {K}, device=device, dtype=torch.bfloat16)
y, _ = run(x, scale=torch.tensor(2.0, device=device, dtype=torch.bfloat16))
print(*y[0].tolist())
assert not any(name.startswith("fxint4") for name in sys.modules)
"""
    command = [sys.executable, "-W", "ignore", "-c", source]
    env = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def assert_on_ones(printed: str, made: Packaged) -> None:
    y = torch.tensor([float(number) for number in printed.split()]).to(made.model.w.device)
    x = torch.ones(1, K, dtype=torch.bfloat16, device=made.model.w.device)
    expected, bound, _ = views_expected(made.model, x, made.report.records[0].group_size or 0)
    assert_within(y, expected[0], bound[0])


def test_a_package_runs_in_a_process_without_fxint4(on_cpu: Packaged) -> None:
    done = without_fxint4(on_cpu.path)
    assert done.returncode == 0, done.stderr
    assert_on_ones(done.stdout, on_cpu)


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="needs a CPU with AVX2 or AVX-512, to run as one without",
)
def test_another_kind_of_cpu_is_refused(on_cpu: Packaged) -> None:
    done = without_fxint4(on_cpu.path, {"ATEN_CPU_CAPABILITY": "default"})
    assert done.returncode == 1
    assert "fxint4: the int4 weights of this program were packed for CPUs with" in done.stderr


CPP = """
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <ATen/ATen.h>
#include <iostream>

int main(int, char** argv) {
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  auto bf16 = at::TensorOptions(at::kBFloat16);
  auto outputs = model.run({at::ones({3, 64}, bf16), at::full({}, 2.0, bf16)});
  auto first = outputs[0].to(at::kFloat).contiguous();
  for (int64_t i = 0; i < first.size(1); ++i)
    std::cout << first.const_data_ptr<float>()[i] << ' ';
}
"""


def no_cpp() -> str:
    """Why C++ can't be built here; empty where it can."""
    header = "torch/csrc/inductor/aoti_package/model_package_loader.h"
    if shutil.which("g++") is None:
        return "needs g++"
    if not any((Path(folder) / header).is_file() for folder in cpp_extension.include_paths()):
        return f"needs {header}"
    return ""


@pytest.mark.skipif(bool(no_cpp()), reason=no_cpp())
def test_a_package_runs_in_cpp(on_cpu: Packaged, tmp_path: Path) -> None:
    (tmp_path / "main.cpp").write_text(CPP)
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    folders = cpp_extension.library_paths()
    libraries = [f"-L{folder}" for folder in folders]
    libraries += [f"-Wl,-rpath,{folder}" for folder in folders]
    libraries += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "-O0", "main.cpp", *includes, *libraries, "-o", "main"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        ["./main", on_cpu.path], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert_on_ones(done.stdout, on_cpu)


def program(**kwargs: Any) -> torch.export.ExportedProgram:
    model = module(lambda m, x: x @ m.w.t(), w=(N, K))
    return export(model, (torch.randn(4, K),), **kwargs)


def test_a_rewritten_program_is_taken_as_it_is(tmp_path: Path) -> None:
    rewritten = fxint4.rewrite(program(), {"group_size": 32})
    path = fxint4.package(rewritten, tmp_path / "model.pt2", {"max_autotune": False})
    x = torch.randn(4, K)
    torch.testing.assert_close(aoti_load_package(path)(x), rewritten.module()(x))
    with pytest.raises(OptionError, match="rewritten already, so 'group_size' comes too late"):
        fxint4.package(rewritten, tmp_path / "model.pt2", {"group_size": 64})


@pytest.mark.parametrize("options", [{}, {"max_autotune": True}])
def test_every_constant_is_one_of_the_rewritten_program(
    options: dict[str, Any], tmp_path: Path
) -> None:
    """So a package can take the weights of another model of the same sizes."""
    x, programs = torch.randn(4, K), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(K, N), nn.GELU(), nn.Linear(N, K)).eval()
        programs.append(fxint4.rewrite(export(model, (x,))))
    first, second = programs
    loaded = aoti_load_package(fxint4.package(first, tmp_path / "model.pt2", options))
    constants = {**second.state_dict, **second.constants}
    names = loaded.get_constant_fqns()
    assert set(names) <= constants.keys()
    torch.testing.assert_close(loaded(x), first.module()(x))
    given = {name: constants[name].detach() for name in names}
    loaded.load_constants(given, check_full_update=True)
    torch.testing.assert_close(loaded(x), second.module()(x))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.export.ExportedProgram]:
    """The programs that would be compiled; packages are in an empty folder."""
    given: list[torch.export.ExportedProgram] = []

    def aoti_package(program: torch.export.ExportedProgram, path: str, _: Any) -> None:
        given.append(program)
        Path(path).write_text("a package")

    monkeypatch.setattr("fxint4.frontends.package.aoti_package", aoti_package)
    monkeypatch.chdir(tmp_path)
    return given


def test_the_program_is_not_changed(tmp_path: Path) -> None:
    """Nor are the graphs that it calls, which have ATen's int4 op, too."""
    tiles = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    scale_and_zero = (torch.rand(K // 32, N, 2) / K).bfloat16()

    def times(x: Tensor, *packed: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[0], 32, packed[1])

    def forward(m: Any, x: Tensor) -> Tensor:
        packed = (x, m.tiles, m.scale_and_zero)
        return torch.cond(x.sum() > 0, times, lambda *given: times(*given) + 1, packed)

    model = module(forward)
    model.register_buffer("tiles", tiles)
    model.register_buffer("scale_and_zero", scale_and_zero)
    x = torch.ones(4, K, dtype=torch.bfloat16)
    captured = export(model, (x,))
    before = captured.graph_module.print_readable(print_output=False)
    assert before.count("aten._weight_int4pack_mm_for_cpu.default(") == 2
    loaded = aoti_load_package(fxint4.package(captured, tmp_path / "model.pt2"))
    assert captured.graph_module.print_readable(print_output=False) == before
    for sign in (1, -1):
        assert torch.equal(loaded(sign * x), model(sign * x))


def experts() -> nn.Module:
    return module(lambda m, x: torch.bmm(x, m.w), w=(4, K, N))


def test_experts_stay_as_they_are_in_a_package_for_the_cpu(
    compiled: list[torch.export.ExportedProgram],
) -> None:
    captured = export(experts(), (torch.randn(4, 3, K),))
    fxint4.package(captured, "model.pt2")
    report = fxint4.last_report()
    assert [(record.action, record.reason) for record in report.records] == [
        ("kept", "a package for cpu has no kernel for packed experts")
    ]
    assert "fxint4" not in str(compiled[0].graph)


def test_packed_experts_are_refused_in_a_package_for_the_cpu() -> None:
    model, x = experts(), torch.randn(4, 3, K)
    message = r"calls fxint4\.bmm\.default, an op of fxint4, .* but a package for cpu has no kernel"
    with pytest.raises(UnsupportedOpError, match=message):
        fxint4.package(fxint4.rewrite(export(model, (x,))), "model.pt2")
    fxint4.pack_(model, (x,))
    with pytest.raises(UnsupportedOpError, match=message):
        fxint4.package(export(model, (x,)), "model.pt2")


def test_experts_are_packed_where_a_package_has_their_kernel(
    compiled: list[torch.export.ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    for way in ("export", "package"):
        monkeypatch.setattr(f"fxint4.frontends.{way}.package_fault", lambda _: None)
    model, x = experts(), torch.randn(4, 3, K)
    captured = export(model, (x,))
    fxint4.package(captured, "model.pt2")
    report = fxint4.last_report()
    [record] = report.records
    assert (record.action, record.batch) == ("packed", 4)
    assert "needs fxint4" not in record.reason
    fxint4.package(fxint4.rewrite(captured), "model.pt2")
    fxint4.pack_(model, (x,))
    fxint4.package(export(model, (x,)), "model.pt2")
    for program in compiled:
        assert str(program.graph).count("torch.ops.fxint4.bmm.packaged") == 1


def test_weights_packed_in_place_before_are_in_a_package(
    compiled: list[torch.export.ExportedProgram],
) -> None:
    model = nn.Sequential(nn.Linear(K, N), nn.Linear(N, K)).eval()
    fxint4.pack_(model)
    fxint4.package(export(model, (torch.randn(4, K),)), "model.pt2")
    graph = str(compiled[0].graph)
    assert graph.count("torch.ops.fxint4.linear.for_cpu") == 2 + 1
    assert graph.count("torch.ops.fxint4") == 2 + 1


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_package_is_written_whole_or_not_at_all(
    error: BaseException,
    compiled: list[torch.export.ExportedProgram],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Path("model.pt2").write_text("another")

    def disk_is_full(_: str, path: Path) -> None:
        path.write_text("half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", disk_is_full)
        with pytest.raises(type(error)):
            fxint4.package(program(), "model.pt2")
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [
        ("model.pt2", "another")
    ]
    fxint4.package(program(), "model.pt2")
    assert [(path.name, path.read_text()) for path in Path().iterdir()] == [
        ("model.pt2", "a package")
    ]


# --- metadata ------------------------------------------------------------------------------------

DESCRIBED: dict[str, Any] = {
    "names": ["x"],
    "inputs": [
        {"shape": [None, 4], "example": [3, 4], "dtype": "float32", "device": "cpu"},
        {"shape": [2], "example": [2], "dtype": "int64", "device": "cpu", "low": 0, "high": 9},
        {},
    ],
}
FOLDER = "model/data/aotinductor/model"


def archive(path: Path, *metadata: Any, compressed: bool = False) -> Path:
    """A file that has the parts of a package that are read before any code of it is run."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as made:
        made.writestr(f"{FOLDER}/code.so", b"code")
        for number, text in enumerate(metadata):
            text = text if isinstance(text, (str, bytes)) else json.dumps(text)
            made.writestr(f"{FOLDER}/{number}_metadata.json", text)
    return path


def described(**changes: Any) -> dict[str, Any]:
    """A description of inputs, the first of them changed."""
    first = {**DESCRIBED["inputs"][0], **changes}
    inputs = [{key: value for key, value in first.items() if value != "missing"}]
    return {**DESCRIBED, "inputs": inputs}


def test_metadata_is_read_from_all_parts(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt2", {"a": "1"}, {METADATA: json.dumps(DESCRIBED)})
    entries, inputs = read_metadata(path)
    assert (entries.keys(), inputs) == ({"a", METADATA}, DESCRIBED)
    assert read_metadata(archive(path, {"a": "1"}, compressed=True)) == ({"a": "1"}, None)


@pytest.mark.parametrize("parts", [1, 2])
def test_metadata_that_unpacks_to_hundreds_of_megabytes(parts: int, tmp_path: Path) -> None:
    text = b"[" + b"[]," * (300 * MEBI // 3 // parts) + b"[]]"
    path = archive(tmp_path / "a.pt2", *[text] * parts, compressed=True)
    assert path.stat().st_size < MEBI
    del text
    tracemalloc.start()
    try:
        with pytest.raises(PackedFormatError, match="metadata has more than"):
            read_metadata(path)
        assert tracemalloc.get_traced_memory()[1] < 100 * MEBI
    finally:
        tracemalloc.stop()


DAMAGED_METADATA: dict[str, tuple[Any, str]] = {
    "nested too deep": ("[" * 100_000, "nested too deep"),
    "no JSON": ("{", "is no JSON"),
    "no text": (b"\xff", "is no JSON"),
    "a list": (["a"], "its metadata is no text"),
    "numbers": ({"a": 1}, "its metadata is no text"),
    "inputs nested too deep": ({METADATA: "[" * 100_000}, "description of inputs .*too deep"),
    **{
        f"inputs {value!r}": ({METADATA: json.dumps(value)}, "description of its inputs is dam")
        for value in (
            *([], {}, "text", 3, None),
            {**DESCRIBED, "names": None},
            {**DESCRIBED, "names": [1]},
            {**DESCRIBED, "inputs": {"a": 1}},
            {**DESCRIBED, "inputs": [3]},
            described(dtype="missing"),
            described(dtype="nn"),
            described(dtype=["float32"]),
            described(device=3),
            described(shape=[None]),
            described(shape=3),
            described(shape=[None, "4"]),
            described(shape=[None, -4]),
            described(shape=[None, 10**30]),
            described(example=[3, None]),
            described(example=[3, 4.0]),
            described(low=0, high="9"),
            described(low=-(10**30), high=9),
        )
    },
}


@pytest.mark.parametrize("name", DAMAGED_METADATA)
def test_metadata_that_is_damaged(name: str, tmp_path: Path) -> None:
    metadata, message = DAMAGED_METADATA[name]
    path = archive(tmp_path / "a.pt2", metadata)
    with pytest.raises(PackedFormatError, match=rf"a\.pt2.*{message}"):
        read_metadata(path)
    assert main(["run", str(path)]) == 1


@pytest.mark.parametrize("kind", ["fifo", "folder", "missing", "no zip", "a password"])
def test_what_is_no_package(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt2"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "no zip":
        path.write_bytes(b"PK")
    elif kind == "a password":
        data = bytearray(archive(path, {"a": "1"}).read_bytes())
        central = data.index(b"PK\1\2", data.index(b"PK\1\2") + 1)
        data[central + 8] |= 1  # the flag of the entry that holds the metadata
        data[data.rindex(b"PK\3\4") + 6] |= 1
        path.write_bytes(data)
    with pytest.raises(PackedFormatError, match=r"a\.pt2 (can't be read|is damaged, or no pack)"):
        read_metadata(path)


def test_what_no_package_is_made_of(tmp_path: Path) -> None:
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(OptionError, match="which is a folder; name a file"):
        fxint4.package(program(), tmp_path / "folder.pt2")
    with pytest.raises(OptionError, match=r"a package is a file whose name ends in \.pt2"):
        fxint4.package(program(), "model.so")
    with pytest.raises(OptionError, match="there is no folder '/nowhere'"):
        fxint4.package(program(), "/nowhere/model.pt2")
    with pytest.raises(OptionError, match="did you mean 'group_size'"):
        fxint4.package(program(), "model.pt2", {"groupsize": 32})
    with pytest.raises(TypeError, match="got a Linear"):
        fxint4.package(nn.Linear(K, N), "model.pt2")  # type: ignore[arg-type]
    bare = program()
    bare.example_inputs = None
    with pytest.raises(OptionError, match="the program has no example inputs"):
        fxint4.package(bare, "model.pt2")


# --- on a GPU ------------------------------------------------------------------------------------

#: A package is built against the system's libstdc++, and the one next to Python may be older.
PRELOAD = {"LD_PRELOAD": ctypes.util.find_library("stdc++") or ""}


@pytest.mark.gpu
def test_a_package_on_the_gpu_has_our_kernels(tmp_path: Path) -> None:
    made = packaged(tmp_path, "cuda")
    assert os.path.getsize(made.path) < 4 * MEBI + 16 * MEBI  # kernels for every M come along
    done = without_fxint4(made.path, PRELOAD)
    assert done.returncode == 0, done.stderr
    assert_on_ones(done.stdout, made)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float32, pytest.param(torch.float16, marks=pytest.mark.full)],
)
def test_fused_projections_and_dtypes_in_a_package(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = module(lambda m, x: (x @ m.q.t(), x @ m.k.t()), q=(96, 128), k=(64, 128))
    model = model.to("cuda", dtype)
    x = torch.randn(40, 128, device="cuda", dtype=dtype)
    captured = export(model, (x,), dynamic_shapes=(({0: Dim.DYNAMIC},),))
    path = fxint4.package(captured, tmp_path / "model.pt2")
    report = fxint4.last_report()
    assert [record.fused_with for record in report.records] == [("k",), ("q",)]
    weights = [dequantized(w.detach(), 128, torch.float64) for w in (model.q, model.k)]
    data = tmp_path / "data.pt"
    torch.save([torch.randn(m, 128, device="cuda", dtype=dtype) for m in (2, 40, 300)], data)
    results = tmp_path / "results.pt"
    source = f"""
import torch, sys
run = torch._inductor.aoti_load_package({path!r})
torch.save([run(x) for x in torch.load({str(data)!r})], {str(results)!r})
assert not any(name.startswith("fxint4") for name in sys.modules)
"""
    command = [sys.executable, "-W", "ignore", "-c", source]
    subprocess.run(command, env={**os.environ, **PRELOAD}, check=True)
    for inputs, outputs in zip(torch.load(data), torch.load(results), strict=True):
        for y, w in zip(outputs, weights, strict=True):
            assert_within(y, inputs.double() @ w.t(), rounding_bound(inputs, w))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [None, 16, 2048])
def test_a_package_multiplies_many_rows_in_fp8(rows: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 4096), nn.GELU(), nn.Linear(4096, 4096))
    model = model.to("cuda", torch.bfloat16).eval()
    example = torch.randn(rows or 64, 4096, device="cuda", dtype=torch.bfloat16)
    shapes = ({0: Dim.DYNAMIC},) if rows is None else None
    captured = export(model, (example,), dynamic_shapes=shapes)
    path = fxint4.package(captured, tmp_path / "model.pt2", {"activations": "fp8"})
    kernels = fxint4.last_report().records[0].kernels
    assert any("fp8" in each for each in kernels) == (rows != 16)
    run, plain = aoti_load_package(path), fxint4.rewrite(captured).module()
    for count in (2, 16, 1023, 1024, 2048, 5000) if rows is None else (rows,):
        x = torch.randn(count, 4096, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            wanted, y = plain(x).double(), run(x).double()
        off = float((y - wanted).norm() / wanted.norm())
        assert (off < 0.01) if count < 1024 else 0.01 < off < 0.08, count


@pytest.mark.gpu
def test_compiling_holds_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    size = 4096
    layers = [nn.Linear(size, size, bias=False) for _ in range(4)]
    model = nn.Sequential(*layers).to("cuda", torch.bfloat16).eval()
    x = torch.randn(4, size, device="cuda", dtype=torch.bfloat16)
    captured = export(model, (x,))
    rewritten = fxint4.rewrite(captured)
    original = sum(p.numel() * p.element_size() for p in model.parameters())
    packed = sum(value.nbytes for value in rewritten.state_dict.values())
    del model, captured, layers
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fxint4.package(rewritten, tmp_path / "model.pt2")
    peak = torch.cuda.max_memory_allocated() - before
    peak -= torch.cuda.get_device_properties().L2_cache_size  # Inductor empties it to time kernels
    assert packed < 0.3 * original
    assert peak < packed / 2, f"{peak} bytes beside {packed} of packed weights"
