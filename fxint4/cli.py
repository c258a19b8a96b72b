"""`python -m fxint4 export`, `run` and `diff`: make packages, run them, compare reports."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import os
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fxint4
from fxint4._pytorch.export import aoti_inputs, aoti_leaves, aoti_load
from fxint4._pytorch.tensors import flat, map_tensors
from fxint4.config.int4_config import METHODS
from fxint4.errors import CommandError, PackedFormatError, ReportError, first_line, printable
from fxint4.frontends.package import read_metadata
from fxint4.quant.tile_layout import GROUP_SIZES, INNER_K_TILES
from fxint4.report import Report, changes, compare, save_diff_page, stdout_has_colour

__all__ = ["diff", "export", "run"]

#: Calls that `run --bench` times, and calls before them that it does not.
_CALLS, _WARM_UP = 50, 5


def export(argv: Sequence[str]) -> int:
    """Call a factory, capture its model, rewrite it, and write a package.

    Args:
        argv: The arguments after the command's name.

    Returns:
        0.

    Raises:
        CommandError: Something on the command line can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fxint4 export",
        description="Compile a model ahead of time, its matmuls by constant weights in int4. The "
        "package is run by `python -m fxint4 run`, torch._inductor.aoti_load_package or C++.",
    )
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="MODULE:FACTORY or FILE.py:FACTORY; the factory takes nothing and returns a model in "
        "eval mode and its example inputs: a tensor, a tuple of arguments or a dict of keyword "
        "arguments",
    )
    parser.add_argument("-o", "--output", required=True, help="the package to write, a .pt2 file")
    parser.add_argument(
        "--dynamic",
        metavar="INPUT:DIM",
        action="append",
        default=[],
        help="a dimension that varies, such as 0:0 for the rows of the first input or mask:1 for "
        "the columns of a keyword argument; may be repeated",
    )
    parser.add_argument("--device", help="where to move the model and its inputs first")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        help="weights that share a scale and a zero; 128 unless given",
    )
    parser.add_argument("--method", choices=METHODS, help="how to choose codes; rtn unless given")
    parser.add_argument(
        "--calibration",
        metavar="STATS.safetensors",
        help="of Calibration.save, for the methods that look at activations",
    )
    parser.add_argument(
        "--inner-k-tiles", type=int, choices=INNER_K_TILES, help="of the layout; 8 unless given"
    )
    for name, what in (("include", "pack these only"), ("skip", "leave these alone")):
        parser.add_argument(
            f"--{name}",
            metavar="LAYERS",
            action="append",
            help=f"{what}: names, globs, or regular expressions after 're:'; may be repeated",
        )
    parser.add_argument(
        "--min-sqnr-db", type=float, metavar="DB", help="leave alone whose weight would be noisier"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        default=None,
        help="run the model on the example inputs with both kinds of weights; report the errors",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in the place of text")
    args = parser.parse_args(argv)

    on_terminal = sys.stderr.isatty()
    names = [
        *("group_size", "method", "inner_k_tiles"),
        *("include", "skip", "min_sqnr_db", "measure"),
    ]
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.calibration is not None:
        options["calibration"] = fxint4.Calibration.load(args.calibration)
    with tqdm(
        total=3, disable=not on_terminal, leave=False, bar_format="{desc}: step {n} of {total}"
    ) as bar:
        _next_stage(bar, "making the model")
        model, inputs, keywords = _made(args.target, args.device)
        dynamic = _dynamic_shapes(args.dynamic, inputs, keywords)
        _next_stage(bar, "capturing")
        with torch.no_grad(), warnings.catch_warnings():
            # torch 2.13 says it of its own code
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            program = torch.export.export(model, inputs, keywords, dynamic_shapes=dynamic)
            _next_stage(bar, "folding and compiling")
            fxint4.package(program, args.output, {**options, "progress": on_terminal})
    report, size = fxint4.last_report(), os.path.getsize(args.output)
    if args.json:
        print(_json({"package": args.output, "bytes": size, "report": report.to_dict()}))
        return 0
    print(report)
    print(f"\nwrote {printable(args.output)}, {size / 1e6:.1f} MB")
    return 0


def _json(values: Any) -> str:
    return json.dumps(values, indent=1, allow_nan=False)


def _next_stage(bar: tqdm[Any], what: str) -> None:
    bar.set_description_str(f"fxint4: {what}", refresh=False)
    bar.n += 1
    bar.refresh()


def _made(target: str, device: str | None) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Call the factory; return its model and the example inputs by position and by name."""
    made = _factory(target)()
    needed = f"{target} must return (model, example inputs) or (model, args, kwargs)"
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise CommandError(f"{needed}; it returned {_kind(made)}")
    model, inputs, *rest = made
    if not isinstance(model, nn.Module):
        raise CommandError(f"{needed}; its model is {_kind(model)}, not a torch.nn.Module")
    keywords = rest[0] if rest else {}
    if isinstance(inputs, dict) and not rest:
        inputs, keywords = (), inputs
    elif isinstance(inputs, Tensor):
        inputs = (inputs,)
    if not isinstance(inputs, (tuple, list)) or not isinstance(keywords, dict):
        raise CommandError(f"{needed}; its inputs are {_kind(inputs)}")
    if any(module.training for module in model.modules()):
        raise CommandError(f"the model of {target} is in training mode; call model.eval() in it")
    if device is not None:
        where = _device(device)
        model = model.to(where)
        move = map_tensors
        inputs, keywords = move(lambda value: value.to(where), (tuple(inputs), keywords))
    return model, tuple(inputs), keywords


def _factory(target: str) -> Any:
    place, colon, name = target.rpartition(":")
    if not colon or not place or not name:
        raise CommandError(f"TARGET is {target!r}; it takes MODULE:FACTORY or FILE.py:FACTORY")
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise CommandError(f"there is no file {place!r}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)  # for classes that are looked up by name
        sys.path.insert(0, str(path.absolute().parent))  # as if the file were run
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            raise CommandError(f"module {place!r} can't be imported: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        what = "has no" if factory is None else f"has {_kind(factory)} for"
        raise CommandError(f"{place} {what} {name!r}; it takes a function that returns a model")
    return factory


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except Exception as error:  # an unknown name, or a device that this torch or machine lacks
        raise CommandError(f"device {name!r} can't be used: {first_line(error)}") from error


def _dynamic_shapes(asked: Sequence[str], inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Return the dimensions of `--dynamic` as torch.export takes them."""
    by_name = {**{str(index): value for index, value in enumerate(inputs)}, **keywords}
    dims: dict[str, dict[int, Any]] = {}
    for entry in asked:
        name, _, dim = entry.rpartition(":")
        if not name or not dim.isdecimal():
            raise CommandError(f"--dynamic is {entry!r}; it takes INPUT:DIM, such as 0:0")
        value = by_name.get(name)
        if not isinstance(value, Tensor):
            have = ", ".join(key for key, one in by_name.items() if isinstance(one, Tensor))
            raise CommandError(f"--dynamic {entry}: the tensors among the inputs are {have}")
        if int(dim) >= value.ndim:
            raise CommandError(
                f"--dynamic {entry}: input {name} has shape {list(value.shape)}, "
                f"and no dimension {dim}"
            )
        if value.shape[int(dim)] < 2:
            raise CommandError(
                f"--dynamic {entry}: that dimension is {value.shape[int(dim)]} in the example, "
                "which torch.export takes for fixed; let the factory make it 2 or more"
            )
        dims.setdefault(name, {})[int(dim)] = torch.export.Dim.DYNAMIC
    if not dims:
        return None
    shapes = torch.export.ShapesCollection()  # type: ignore[no-untyped-call]
    for name, sizes in dims.items():
        shapes[by_name[name]] = sizes
    return shapes


def run(argv: Sequence[str]) -> int:
    """Load a package, call it once, print its outputs, and time it with `--bench`.

    Args:
        argv: The arguments after the command's name.

    Returns:
        0.

    Raises:
        CommandError: The package or its inputs can't be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fxint4 run",
        description="Run a package once. Like any program it runs code of whoever made it: run "
        "only packages that you trust.",
    )
    parser.add_argument("package", metavar="MODEL.pt2", help="of fxint4 export or fxint4.package")
    parser.add_argument(
        "--inputs",
        metavar="X.pt",
        help="a file of torch.save with a tensor, a tuple or list of arguments, or a dict of "
        "arguments by name; random ones, shaped like the example, unless given",
    )
    parser.add_argument("--output", metavar="Y.pt", help="where to torch.save what comes out")
    parser.add_argument("--bench", action="store_true", help=f"time {_CALLS} calls")
    parser.add_argument("--json", action="store_true", help="print JSON in the place of text")
    args = parser.parse_args(argv)

    try:
        metadata, described = read_metadata(args.package)
    except PackedFormatError as error:
        raise CommandError(str(error)) from error
    device = _device(metadata.get("AOTI_DEVICE_KEY", "cpu"))
    _check_cpu(args.package, metadata.get("AOTI_CPU_ISA", ""))
    try:
        model = aoti_load(args.package)
    except Exception as error:
        raise CommandError(f"{args.package} can't be loaded: {first_line(error)}") from error
    if args.inputs is not None:
        leaves = _loaded(args.inputs, described["names"] if described else [], model)
    elif described is not None:
        leaves = [_random(entry) for entry in described["inputs"]]
    else:
        raise CommandError(
            f"{args.package} does not say what its inputs are like (fxint4.package writes it): "
            "give some with --inputs"
        )
    if described is not None:
        _check_inputs(leaves, described["inputs"])
    entries = described["inputs"] if described else [{}] * len(leaves)
    inputs, keywords = aoti_inputs(
        model,
        [
            value.to(entry.get("device", device)) if isinstance(value, Tensor) else value
            for value, entry in zip(leaves, entries, strict=True)
        ],
    )
    with torch.no_grad():
        outputs = model(*inputs, **keywords)
        leaves = flat(outputs)
        found: dict[str, Any] = {"outputs": list(map(_json_of, leaves))}
        if not args.json:
            for index, value in enumerate(leaves):
                print(f"output {index}: {_summary(value)}")
        if args.output is not None:
            torch.save(outputs, args.output)
        if args.bench:
            times = _times(lambda: model(*inputs, **keywords), device)
            low, middle, high = (1e3 * time for time in statistics.quantiles(times, n=4))
            if not args.json:
                half = f"half within {low:.3f} to {high:.3f} ms"
                print(f"{_CALLS} calls: median {middle:.3f} ms, {half}")
            found["bench"] = {
                **{"calls": _CALLS, "median_ms": middle},
                **{"lower_quartile_ms": low, "upper_quartile_ms": high},
            }
    if args.json:
        print(_json(found))
    return 0


def diff(argv: Sequence[str]) -> int:
    """Print what changed in the graphs of one report, or how two reports differ.

    Args:
        argv: The arguments after the command's name.

    Returns:
        0 if nothing differs, 1 if something does.

    Raises:
        CommandError: A file can't be read, or is no report; its status is 2.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fxint4 diff",
        description="With one report, the graphs before and after as a unified diff. With two, "
        "the layers that differ: packed or not, error, bytes, kernels. The exit status is 0 where "
        "nothing differs, 1 where something does, 2 where a report can't be read.",
    )
    help_of_first = "a report in JSON: options={'report': 'a.json'}, or Report.save"
    parser.add_argument("before", metavar="A.json", help=help_of_first)
    parser.add_argument("after", metavar="B.json", nargs="?", help="another")
    parser.add_argument(
        "-o",
        "--output",
        metavar="DIFF.html",
        help="write what two reports differ in to this file, too, as a page",
    )
    parser.add_argument("--json", action="store_true", help="print JSON in the place of text")
    args = parser.parse_args(argv)
    if args.output is not None and (args.after is None or not args.output.endswith(".html")):
        raise CommandError(
            f"-o is {args.output!r}; it takes a .html file for what two reports differ in", status=2
        )
    try:
        before = Report.load(args.before)
        after = Report.load(args.after) if args.after is not None else None
    except ReportError as error:
        raise CommandError(str(error), status=2) from error
    if after is None:
        if args.json:
            print(_json({"differs": bool(before.graph_diff), "graph_diff": before.graph_diff}))
            return int(bool(before.graph_diff))
        text = before.diff()
        print(text or f"{printable(args.before)}: no graph changed")
        return int(bool(text))
    columns = shutil.get_terminal_size((120, 24)).columns
    names = args.before, args.after
    if args.output is not None:
        try:
            save_diff_page(before, after, names, args.output)
        except ReportError as error:
            raise CommandError(str(error), status=2) from error
    if args.json:
        found = compare(before, after)
        print(_json(found.to_dict()))
        return int(found.differs)
    differs, text = changes(before, after, names, columns, colour=stdout_has_colour())
    print(text)
    if args.output is not None:
        print(f"\nwrote {printable(args.output)}")
    return int(differs)


def _check_cpu(path: str, instructions: str) -> None:
    """Refuse code with instructions that this CPU lacks: the first one would end the process.

    Args:
        path: The package.
        instructions: What its code was compiled for, such as "AVX512 AVX512_VNNI".

    Raises:
        CommandError: The CPU lacks some of them.
    """
    ranks = ("DEFAULT", "AVX2", "AVX512")
    needed = instructions.partition(" ")[0]
    have = torch.backends.cpu.get_cpu_capability()
    if needed in ranks and have in ranks and ranks.index(have) < ranks.index(needed):
        raise CommandError(
            f"{path} was compiled for CPUs with {needed} instructions, and this one has "
            f"{'none of them' if have == 'DEFAULT' else have}: export it on a CPU like this one"
        )


def _loaded(path: str, names: Sequence[str], model: Any) -> list[Any]:
    """Read the inputs from a file, and flatten them.

    Args:
        path: A file of torch.save.
        names: Names of the inputs that the package takes by position.
        model: The loaded package.

    Raises:
        CommandError: The file can't be loaded, or holds no inputs that fit.
    """
    try:
        loaded = torch.load(path, weights_only=True)
    except Exception as error:
        raise CommandError(f"inputs {path!r} can't be loaded: {first_line(error)}") from error
    if isinstance(loaded, dict):
        missing = [name for name in names if name not in loaded]
        if missing:
            raise CommandError(f"inputs {path!r} have no {missing[0]!r}, which the package takes")
        args = tuple(loaded.pop(name) for name in names)
        try:
            return aoti_leaves(model, args, loaded)
        except ValueError as error:
            raise CommandError(f"inputs {path!r} do not fit: {first_line(error)}") from error
    if isinstance(loaded, (Tensor, tuple, list)):
        return flat(loaded)
    raise CommandError(f"inputs {path!r} are {_kind(loaded)}; need a tensor, tuple, list or dict")


def _random(entry: dict[str, Any]) -> Any:
    """Return a random input of the dtype and shape in the package's metadata."""
    if not entry:
        return None
    dtype = getattr(torch, entry["dtype"])
    if "low" in entry:
        return torch.randint(entry["low"], entry["high"] + 1, entry["example"]).to(dtype)
    return torch.randn(entry["example"]).to(dtype)


def _check_inputs(values: Sequence[Any], described: Sequence[dict[str, Any]]) -> None:
    """Refuse wrong inputs: a package checks nothing, and would return nonsense or crash."""
    if len(values) != len(described):
        raise CommandError(f"got {len(values)} inputs, the package takes {len(described)}")
    for index, (value, entry) in enumerate(zip(values, described, strict=True)):
        if not entry:
            continue
        shape = ", ".join("*" if size is None else str(size) for size in entry["shape"])
        fits = (
            isinstance(value, Tensor)
            and str(value.dtype) == f"torch.{entry['dtype']}"
            and value.ndim == len(entry["shape"])
            and all(
                want in (None, have) for have, want in zip(value.shape, entry["shape"], strict=True)
            )
        )
        if not fits:
            have = _described(value) if isinstance(value, Tensor) else _kind(value)
            raise CommandError(
                f"input {index} is {have}, the package takes {entry['dtype']} [{shape}]"
            )


def _times(call: Any, device: torch.device) -> list[float]:
    """Return the seconds of each call, with its work on the device."""
    times = []
    for _ in tqdm(
        range(_WARM_UP + _CALLS),
        desc="fxint4: timing",
        disable=not sys.stderr.isatty(),
        leave=False,
    ):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[_WARM_UP:]


def _summary(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if not value.numel():
        return _described(value)
    found = _statistics(value)
    return (
        f"{_described(value)}, mean {found['mean']:.4g}, "
        f"from {found['min']:.4g} to {found['max']:.4g}"
    )


def _statistics(value: Tensor) -> dict[str, float]:
    numbers = value.double()
    return {name: getattr(numbers, name)().item() for name in ("mean", "min", "max")}


def _json_of(value: Any) -> dict[str, Any]:
    """Return what there is to say of an output, as values that JSON can hold."""
    if not isinstance(value, Tensor):
        return {"value": repr(value)}
    found = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    figures = _statistics(value) if value.numel() else {}
    finite = {name: each if math.isfinite(each) else None for name, each in figures.items()}
    return {**found, **finite}


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _kind(value: object) -> str:
    kind = type(value).__name__
    return "None" if value is None else f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
