"""Imports point one way, and private PyTorch API stays in few files.

The sources are read, not imported, so this runs in a moment and without torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The rooms, lowest first: a room imports only rooms that stand on a line above its own.
# Rooms on one line do not import each other. A package is one room; inside it anything goes.
# "__init__" is fxint4 itself, with the public names.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "version"),
    ("_pytorch", "atomic_files", "untrusted_files"),
    ("quant",),
    ("config",),
    ("kernels",),
    ("tensor", "report"),
    ("weights",),
    ("graph",),
    ("passes",),
    ("lowering", "runs"),
    ("frontends",),
    ("integrations",),
    ("__init__",),
    ("cli", "demo"),
    ("__main__",),
)
#: What the table may grow to: its lines, and the pairs (room, imported room).
MOST_LINES, MOST_PAIRS = 15, 100

# What a room must not touch although its place in the order would let it.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "quant": ("torch.fx", "torch._dynamo", "torch._inductor", "fxint4._pytorch"),
}

# The rooms that may use private PyTorch API, each with the reason.
# torch.ops is public: the leading underscore of an aten op is part of its name.
PRIVATE_TORCH: dict[str, str] = {
    "_pytorch": "the one place for it; each file says which versions were tried",
}

LAYER_OF = {room: index for index, rooms in enumerate(LAYERS) for room in rooms}


def sources() -> dict[str, Path]:
    """Full module name -> file, as installed: passes/ is fxint4.passes."""
    found = {}
    for folder, package in (("fxint4", "fxint4"), ("passes", "fxint4.passes")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            found[".".join((package, *parts))] = path
    return found


def room_of(module: str) -> str:
    """The room of a module of fxint4: "fxint4.passes.fold" is in "passes"."""
    return module.split(".")[1] if "." in module else "__init__"


class _Uses(ast.NodeVisitor):
    """Collects (line, dotted name) of every import and every attribute of an imported name."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.imports: list[tuple[int, str]] = []
        self.attributes: list[tuple[int, str]] = []
        self.names: dict[str, str] = {}

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.imports.append((node.lineno, alias.name))
            if alias.asname:
                self.names[alias.asname] = alias.name
            else:
                top = alias.name.partition(".")[0]
                self.names[top] = top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            above = self.package.split(".")
            above = above[: len(above) - node.level + 1]
            base = ".".join([*above, base] if base else above)
        for alias in node.names:
            self.imports.append((node.lineno, f"{base}.{alias.name}"))
            self.names[alias.asname or alias.name] = f"{base}.{alias.name}"

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts = [node.attr]
        value = node.value
        while isinstance(value, ast.Attribute):
            parts.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name) and value.id in self.names:
            parts.append(self.names[value.id])
            self.attributes.append((node.lineno, ".".join(reversed(parts))))
        else:
            self.visit(value)

    def visit_Constant(self, node: ast.Constant) -> None:
        # import_module("torch._x") and mock.patch("torch._x.y") reach private API by a string.
        if isinstance(node.value, str) and node.value.startswith("torch."):
            name = node.value
            if all(part.isidentifier() for part in name.split(".")):
                self.attributes.append((node.lineno, name))


def is_private_torch(name: str) -> bool:
    """True of "torch._dynamo.reset", not of "torch.ops.aten._int_mm" or "torch.__version__"."""
    top, *rest = name.split(".")
    if top != "torch" or not rest or rest[0] == "ops":
        return False
    return any(part.startswith("_") and not part.endswith("__") for part in rest)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def module_of(name: str, modules: Iterable[str]) -> str:
    """The module that an imported name is, or is in."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def problems(module: str, text: str, *, is_package: bool, modules: set[str]) -> Iterator[str]:
    """What is wrong with one module, as "line: message".

    Args:
        module: Its full name.
        text: Its source.
        is_package: Whether it is an ``__init__.py``.
        modules: Every module of fxint4, to tell ``from fxint4 import tiles`` from a name.
    """
    room = room_of(module)
    if room not in LAYER_OF:
        yield f"1: {module} is in no layer; give it a line in LAYERS of tests/test_imports.py"
        return
    uses = _Uses(module if is_package else module.rpartition(".")[0])
    uses.visit(ast.parse(text))

    for line, name in uses.imports:
        if not is_within(name, "fxint4"):
            continue
        other = room_of(module_of(name, modules))
        if other == room:
            continue
        if other not in LAYER_OF:
            yield f"{line}: imports {name}, which is in no layer"
        elif LAYER_OF[other] >= LAYER_OF[room]:
            yield f"{line}: {room} imports {name}, but {other} does not stand below {room}"

    for line, name in (*uses.imports, *uses.attributes):
        for package in FORBIDDEN.get(room, ()):
            if is_within(name, package):
                yield f"{line}: {room} uses {name}, but must know nothing of {package}"
        if room not in PRIVATE_TORCH and is_private_torch(name):
            yield f"{line}: private PyTorch API {name}; reach it through fxint4/_pytorch/"


def test_imports_point_one_way_and_private_torch_api_stays_in_its_place() -> None:
    modules = sources()
    assert modules, f"no sources below {ROOT}"
    found = [
        f"{path.relative_to(ROOT)}:{problem}"
        for module, path in modules.items()
        for problem in problems(
            module,
            path.read_text(encoding="utf-8"),
            is_package=path.name == "__init__.py",
            modules=set(modules),
        )
    ]
    assert not found, "\n" + "\n".join(found)


def pairs() -> set[tuple[str, str]]:
    """(room, imported room) of every import between two rooms."""
    modules = sources()
    found = set()
    for module, path in modules.items():
        is_package = path.name == "__init__.py"
        uses = _Uses(module if is_package else module.rpartition(".")[0])
        uses.visit(ast.parse(path.read_text(encoding="utf-8")))
        for _, name in uses.imports:
            if is_within(name, "fxint4"):
                found.add((room_of(module), room_of(module_of(name, modules))))
    return {(room, other) for room, other in found if room != other}


def test_the_table_stays_small() -> None:
    count = len(pairs())
    print(f"{len(LAYERS)} lines, {count} pairs of rooms")  # noqa: T201  (pytest -s shows it)
    assert len(LAYERS) <= MOST_LINES
    assert count <= MOST_PAIRS


def test_no_package_exports_under_the_name_of_one_of_its_modules() -> None:
    """Then `fxint4.x.y` would be the module or what hides it, by what was imported first."""
    modules = sources()
    for module, path in modules.items():
        if path.name == "__init__.py":
            uses = _Uses(module)
            uses.visit(ast.parse(path.read_text(encoding="utf-8")))
            hidden = [
                name
                for name, full in uses.names.items()
                if full != f"{module}.{name}" and f"{module}.{name}" in modules
            ]
            assert not hidden, f"{path.relative_to(ROOT)}: {hidden}"


def test_exceptions_name_rooms_that_exist_in_the_table() -> None:
    assert set(FORBIDDEN) | set(PRIVATE_TORCH) <= set(LAYER_OF)


MODULES = {
    "fxint4",
    "fxint4.quant",
    "fxint4.report",
    "fxint4.frontends",
    "fxint4.frontends.backend",
    "fxint4.passes",
}


@pytest.mark.parametrize(
    ("module", "text", "message"),
    [
        ("fxint4.novel", "", "is in no layer"),
        ("fxint4.quant.a", "from fxint4.report import Record", "report does not stand below quant"),
        ("fxint4.quant.a", "from ..report import Record", "report does not stand below quant"),
        ("fxint4.quant.a", "from fxint4 import __version__", "__init__ does not stand below quant"),
        ("fxint4.quant.a", "from .. import report", "report does not stand below quant"),
        ("fxint4.quant.a", "def f():\n    import torch.fx", "2: quant uses torch.fx"),
        ("fxint4.quant.a", "import torch\nx: torch.fx.Node", "2: quant uses torch.fx.Node"),
        (
            "fxint4.passes.fold",
            "from ..frontends.backend import int4tile",
            "frontends does not stand below",
        ),
        ("fxint4.passes.fold", "import fxint4.frontends", "frontends does not stand below passes"),
        ("fxint4.tensor", "import fxint4.report", "does not stand below tensor"),
        ("fxint4.runs.x", "import torch._dynamo", "private PyTorch API torch._dynamo"),
        ("fxint4.runs.x", "from torch import _inductor", "private PyTorch API torch._inductor"),
        ("fxint4.runs.x", "import torch\ntorch._C.x()", "2: private PyTorch API torch._C.x"),
        ("fxint4.runs.x", "import torch.fx as g\ng._x", "private PyTorch API torch.fx._x"),
        ("fxint4.runs.x", "f('torch._inductor.config')", "torch._inductor.config"),
    ],
)
def test_problem_is_found(module: str, text: str, message: str) -> None:
    found = list(problems(module, text, is_package=False, modules=MODULES))
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("fxint4.frontends.backend", "from fxint4 import quant"),
        ("fxint4.frontends.backend", "from ..passes.fold import fold"),
        ("fxint4.passes.fold", "from . import find\nfrom .find import match"),
        ("fxint4.quant.a", "import torch\ntorch.ops.aten._weight_int4pack_mm(torch.__version__)"),
        ("fxint4.quant.a", '"""Nothing like torch._inductor here."""'),
        ("fxint4._pytorch.dynamo", "import torch._dynamo"),
    ],
)
def test_nothing_is_wrong(module: str, text: str) -> None:
    assert not list(problems(module, text, is_package=False, modules=MODULES))
