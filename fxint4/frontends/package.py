"""`package`: compile a program ahead of time, to a file that needs neither fxint4 nor Python."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from fxint4._pytorch.export import aoti_package
from fxint4._pytorch.tensors import flat
from fxint4.atomic_files import draft_of
from fxint4.config.int4_config import Int4Config
from fxint4.config.options import split_options
from fxint4.errors import OptionError, PackedFormatError, UnsupportedOpError, WriteError, first_line
from fxint4.frontends.export import is_rewritten, placeholders, remade, rewrite_program
from fxint4.graph.build import copy_graph
from fxint4.kernels.policy import Policy
from fxint4.lowering.dense import our_compile
from fxint4.lowering.experts import package_fault
from fxint4.lowering.own_ops import use_own_ops
from fxint4.untrusted_files import MOST_METADATA, check_ordinary, parse_json

__all__ = ["METADATA", "package", "read_metadata"]

#: The key of a package's metadata that has a description of its inputs as JSON, see `_described`.
METADATA = "fxint4.inputs"


def package(
    exported_program: ExportedProgram,
    path: str | os.PathLike[str],
    options: Mapping[str, Any] | None = None,
) -> str:
    """Compile an exported program with AOTInductor, its matmuls by constant weights in int4.

    `torch._inductor.aoti_load_package(path)` loads the package, or in C++
    `torch::inductor::AOTIModelPackageLoader`; fxint4 need not be installed there. On a GPU all
    matmuls run the kernels of `torch.compile(..., backend="int4tile")`; on the CPU experts stay as
    they are. `fxint4.last_report()` tells what was done.

    Args:
        exported_program: From `torch.export.export` or `fxint4.rewrite`; not changed.
        path: The file to write, whose name ends in ".pt2". It is replaced as a whole, once the
            package is complete; until then a temporary folder takes as much room.
        options: Fields of `Int4Config` and options of Inductor. For a rewritten program `kernel` is
            the only field.

    Returns:
        The path.

    Raises:
        TypeError: Not an exported program.
        OptionError: An option that is not known, a path that can't be one, or a program without
            example inputs.
        FoldError: A weight could not be folded.
        UnsupportedOpError: The program has packed experts, and is not for a GPU, or there is no
            Triton to compile their kernel; or it has another op of fxint4.
        WriteError: The file can't be written; it is as it was.
    """
    path = os.fspath(path)
    _check_path(path)
    config, patches = split_options(None, options)
    if is_rewritten(exported_program):
        program = exported_program
        _check_options(options or {})
    else:
        program = rewrite_program(exported_program, config, only_aten=False)
    _check_ops(program)
    if program.example_inputs is None:
        raise OptionError(
            "the program has no example inputs, which AOTInductor needs: set its example_inputs to "
            "(args, kwargs)"
        )
    program = _for_aotinductor(program, Policy(config.kernel, package=True))
    known = patches.get("aot_inductor.metadata") or {}
    patches["aot_inductor.metadata"] = {**known, METADATA: json.dumps(_described(program))}
    # PyTorch's writer ends the process if the disk is full, so it writes to a temporary folder. The
    # file at `path` stays until it can be replaced.
    with tempfile.TemporaryDirectory() as folder:
        made = os.path.join(folder, os.path.basename(path))
        with our_compile():
            aoti_package(program, made, patches)
        with draft_of(Path(path)) as draft:
            shutil.copyfile(made, draft)
    return path


def read_metadata(
    path: str | os.PathLike[str],
) -> tuple[dict[str, str], dict[str, list[Any]] | None]:
    """Read the metadata of a package without running any of its code.

    Args:
        path: The package.

    Returns:
        All entries; and the description of its inputs, see `_described`, None if it has none.

    Raises:
        PackedFormatError: There is no such file, it is damaged or no package, or it has more
            metadata than is read.
    """
    check_ordinary(path, PackedFormatError)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inside = [name for name in names if "/data/aotinductor/" in name]
            texts = _texts(archive, inside)
            damaged = archive.testzip() if texts is not None else None  # the loader does not look
    except (
        *(zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError),
        *(RuntimeError, NotImplementedError),  # a password, or a compression that Python lacks
    ) as error:
        raise PackedFormatError(f"{path} is damaged, or no package: {first_line(error)}") from error
    if texts is None:
        raise PackedFormatError(
            f"{path} is damaged, or no package: its metadata has more than {MOST_METADATA} bytes"
        )
    if damaged is not None:
        raise PackedFormatError(
            f"{path} is damaged: its part {damaged} has changed since it was written"
        )
    if not inside:
        raise PackedFormatError(
            f"{path} holds no compiled model; fxint4.package(torch.export.load(...), ...) makes one"
            if any("/models/" in name for name in names)
            else f"{path} is no package of AOTInductor"
        )
    found: dict[str, str] = {}
    for text in texts:
        entries = parse_json(
            text, f"{path} is damaged, or no package; its metadata", PackedFormatError
        )
        if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
            raise PackedFormatError(f"{path} is damaged, or no package: its metadata is no text")
        found.update(entries)
    if METADATA not in found:
        return found, None
    described = parse_json(found[METADATA], f"{path}: the description of inputs", PackedFormatError)
    try:
        _check_described(described)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PackedFormatError(f"{path}: the description of its inputs is damaged") from error
    return found, described


def _texts(archive: zipfile.ZipFile, names: Sequence[str]) -> list[bytes] | None:
    """The parts of a package that hold metadata; None if they are too large to be some."""
    texts, left = [], MOST_METADATA
    for name in names:
        if name.endswith("_metadata.json"):
            with archive.open(name) as part:  # unpacked no further than it is read
                texts.append(part.read(left + 1))
            left -= len(texts[-1])
            if left < 0:
                return None
    return texts


def _check_described(described: Any) -> None:
    """Raise unless this can be what `_described` made."""
    names, inputs = described["names"], described["inputs"]
    if not isinstance(inputs, list) or not all(isinstance(name, str) for name in names):
        raise TypeError
    for entry in filter(None, inputs):
        shape, example = entry["shape"], entry["example"]
        known = isinstance(getattr(torch, entry["dtype"]), torch.dtype)
        sizes = [size for size in (*shape, *example) if size is not None]
        integers = [*sizes, *(entry[end] for end in ("low", "high") if end in entry)]
        if not (known and len(shape) == len(example) and isinstance(entry["device"], str)):
            raise ValueError
        if not all(type(number) is int and abs(number) < 2**63 for number in integers):
            raise ValueError
        if None in example or any(size < 0 for size in sizes):
            raise ValueError


def _check_path(path: str) -> None:
    if not path.endswith(".pt2"):
        raise OptionError(f"path is {path!r}; a package is a file whose name ends in .pt2")
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise OptionError(f"path is {path!r}, but there is no folder {str(folder)!r}")
    if Path(path).is_dir():
        raise OptionError(f"path is {path!r}, which is a folder; name a file")
    if not os.access(folder, os.W_OK):
        raise WriteError(f"{path} can't be written: files can't be made in its folder")


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise OptionError for options that come too late for a rewritten program."""
    ours = {field.name for field in dataclasses.fields(Int4Config)} - {"kernel"}
    late = [name for name in options if name.replace("-", "_") in ours]
    if late:
        raise OptionError(
            f"the program is rewritten already, so {late[0]!r} comes too late: give it to "
            "fxint4.rewrite, or give fxint4.package the program as it was captured"
        )


def _check_ops(program: ExportedProgram) -> None:
    ours = torch.ops.fxint4
    of_experts = (ours.bmm.default, ours.grouped_mm.default, ours.indexed_mm.default)
    for node in program.graph.nodes:
        known = node.target is ours.linears.default  # to our lowering
        if getattr(node.target, "namespace", None) != "fxint4" or known:
            continue
        fault: str | None = "a package runs without fxint4"
        if node.target in of_experts:
            fault = package_fault(node.args[0].meta["val"].device)
        if fault is not None:
            raise UnsupportedOpError(
                f"the program calls {node.target}, an op of fxint4, because fxint4.rewrite or "
                f"fxint4.pack_ packed a weight of it, but {fault}. Package a program where that "
                "weight is not packed: it may stay as it is"
            )


def _for_aotinductor(program: ExportedProgram, policy: Policy) -> ExportedProgram:
    """The program with ops that we lower, and with tensors that AOTInductor handles well.

    AOTInductor writes whole storages, so each tensor gets a storage of its own size. It copies
    buffers while it compiles, but not parameters, so buffers that are only read become parameters.
    """
    signature = program.graph_signature
    written = set(signature.buffers_to_mutate.values())
    read = {
        spec.target
        for spec in signature.input_specs
        if spec.kind is InputKind.BUFFER and spec.persistent and spec.target not in written
    }
    specs = [
        dataclasses.replace(spec, kind=InputKind.PARAMETER, persistent=None)
        if spec.target in read
        else spec
        for spec in signature.input_specs
    ]
    copies: dict[Any, Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}

    def alone(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        storage = value.untyped_storage()
        if storage.nbytes() <= value.numel() * value.element_size():
            return value
        # Tied tensors stay tied.
        place = (storage.data_ptr(), value.storage_offset())
        key = (*place, value.shape, value.stride(), value.dtype)
        if key not in copies:
            copy = value.detach().clone()
            parameter = isinstance(value, nn.Parameter)
            copies[key] = nn.Parameter(copy, False) if parameter else copy
        return copies[key]

    def of_state(name: str, value: Any) -> Any:
        value = alone(value)
        if name not in read:
            return value
        return parameters.setdefault(id(value), nn.Parameter(value, False))

    graph_module = _copied(program.graph_module)
    use_own_ops(graph_module, policy)
    return remade(
        program,
        graph_module,
        dataclasses.replace(signature, input_specs=specs),
        state_dict={name: of_state(name, value) for name, value in program.state_dict.items()},
        constants={name: alone(value) for name, value in program.constants.items()},
    )


def _copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph and of the graphs it calls, which shares all tensors."""
    copied, _ = copy_graph(gm)
    for name, child in copied.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(copied, name, _copied(child))
    return copied


def _described(program: ExportedProgram) -> dict[str, list[Any]]:
    """Describe the inputs of a program.

    Returns:
        "names": The names of the positional arguments. "inputs": A dict for each flattened input,
        empty unless it is a tensor. Its keys are "shape", with None for dynamic sizes; "example",
        the shape of the example input; "dtype"; "device"; and for integers "low" and "high", the
        least and greatest value of the example input.
    """
    specs = program.graph_signature.input_specs
    nodes = [
        node
        for node, spec in zip(placeholders(program.graph), specs, strict=True)
        if spec.kind is InputKind.USER_INPUT
    ]
    examples = flat(program.example_inputs)
    assert program.example_inputs is not None
    args, _ = program.example_inputs
    signature = program.module_call_graph[0].signature
    names = (signature.forward_arg_names if signature is not None else None) or []
    return {
        "names": names[: len(args)],
        "inputs": [_description(node, value) for node, value in zip(nodes, examples, strict=True)],
    }


def _description(node: fx.Node, example: Any) -> dict[str, Any]:
    if not isinstance(example, Tensor):
        return {}
    sizes = node.meta["val"].shape
    entry: dict[str, Any] = {
        "shape": [size if isinstance(size, int) else None for size in sizes],
        "example": list(example.shape),
        "dtype": str(example.dtype).removeprefix("torch."),
        "device": example.device.type,
    }
    if not (example.is_floating_point() or example.is_complex()) and example.numel():
        entry |= {"low": int(example.min()), "high": int(example.max())}
    return entry
