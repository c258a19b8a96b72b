"""Options: ranges, unknown names, modes, and which layers a pattern matches."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import list_mode_options

import fxint4
from fxint4 import Int4Config, OptionError, calibrate
from fxint4.config.layer_patterns import first_match
from fxint4.config.options import split_options
from fxint4.quant.statistics import Calibration, Choice, Trade

# --- fields --------------------------------------------------------------------------------------

BAD_VALUES = [
    ("group_size", 48, "group_size is 48; it takes one of 32, 64, 128, 256"),
    ("group_size", "64", "group_size is '64'; it takes one of 32, 64, 128, 256"),
    ("group_size", None, "group_size is None; it takes one of 32, 64, 128, 256"),
    ("group_size", [64], "group_size is [64]; it takes one of 32, 64, 128, 256"),
    ("group_size", 64.0, "group_size is 64.0; it takes one of 32, 64, 128, 256"),
    ("inner_k_tiles", 1, "inner_k_tiles is 1; it takes one of 2, 4, 8"),
    ("inner_k_tiles", True, "inner_k_tiles is True; it takes one of 2, 4, 8"),
    (
        "method",
        "best",
        "method is 'best'; it takes one of 'rtn', 'mse', 'hqq', 'gptq', 'awq', 'gptq+awq'",
    ),
    (
        "method",
        "gptq",
        "method='gptq' looks at activations: give it calibration=fxint4.calibrate(model, batches)",
    ),
    (
        "calibration",
        "stats.safetensors",
        "calibration is 'stats.safetensors'; it takes what fxint4.calibrate returns, or None",
    ),
    ("overrides", 3, "overrides is 3; it takes a dict of options by pattern"),
    ("overrides", {"a": 32}, "overrides is {'a': 32}; it takes a dict of options by pattern"),
    ("overrides", {"a": (1, 2)}, "overrides for 'a' are (1, 2); it takes a dict of options"),
    (
        "overrides",
        {"re:(": {"group_size": 32}},
        "overrides holds 're:(', which is no regular expression: "
        "missing ), unterminated subpattern at position 0",
    ),
    (
        "overrides",
        {"a": {"skip": True}},
        "overrides for 'a' hold 'skip'; a layer can have its own "
        "group_size, inner_k_tiles, method, min_sqnr_db, activations",
    ),
    (
        "overrides",
        {"a": {"group_size": 33}},
        "overrides for 'a': group_size is 33; it takes one of 32, 64, 128, 256",
    ),
    (
        "overrides",
        {"a": {"method": "awq"}},
        "overrides for 'a': method='awq' looks at activations: give it "
        "calibration=fxint4.calibrate(model, batches)",
    ),
    ("include", 3, "include is 3; it takes module names, globs or 're:' patterns"),
    ("skip", None, "skip is None; it takes module names, globs or 're:' patterns"),
    ("skip", ["a", 3], "skip is ['a', 3]; it takes module names, globs or 're:' patterns"),
    (
        "skip",
        ["lm_head", "re:layers.(1"],
        "skip holds 're:layers.(1', which is no regular expression: "
        "missing ), unterminated subpattern at position 7",
    ),
    ("target_error", 0.0, "target_error is 0.0; it takes a number above 0, or None"),
    ("max_bytes", "2 GB", "max_bytes is '2 GB'; it takes a number above 0, or None"),
    ("min_sqnr_db", "20", "min_sqnr_db is '20'; it takes a number of dB, or None"),
    ("min_sqnr_db", True, "min_sqnr_db is True; it takes a number of dB, or None"),
    ("min_sqnr_db", float("nan"), "min_sqnr_db is nan; it takes a number of dB, or None"),
    ("min_features", 1.5, "min_features is 1.5; it takes a whole number"),
    ("min_features", None, "min_features is None; it takes a whole number"),
    ("min_features", False, "min_features is False; it takes a whole number"),
    ("min_features", float("inf"), "min_features is inf; it takes a whole number"),
    ("progress", 1, "progress is 1; it takes True or False"),
    ("fuse_projections", None, "fuse_projections is None; it takes True or False"),
    ("one_shot_all_reduce", 1, "one_shot_all_reduce is 1; it takes True or False"),
    ("measured_rows", None, "measured_rows is None; it takes True or False"),
    ("activations", "int8", "activations is 'int8'; it takes one of None, 'fp8'"),
    ("measure", 1, "measure is 1; it takes True, False, None or 'fp8'"),
    ("report", "run", "report is 'run'; it takes the name of a .json, .txt, .html file"),
    ("report", True, "report is True; it takes the name of a .json, .txt, .html file"),
    (
        "kernel",
        "cublas",
        "kernel is 'cublas'; it takes one of None, 'triton', 'cuda', 'dequantize', 'aten'",
    ),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_VALUES)
def test_a_value_outside_its_range_is_an_error(field: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Int4Config(**{field: value})
    assert str(caught.value) == message


def test_every_field_has_a_range_that_is_tested() -> None:
    tested = {field for field, _, _ in BAD_VALUES}
    assert tested == {field.name for field in dataclasses.fields(Int4Config)}


GOOD_VALUES = [
    *(("group_size", value) for value in (32, 64, 128, 256)),
    *(("inner_k_tiles", value) for value in (2, 4, 8)),
    ("method", "rtn"),
    ("min_sqnr_db", None),
    ("min_sqnr_db", 17),
    ("min_sqnr_db", float("inf")),
    ("min_features", 0),
    ("progress", True),
    ("fuse_projections", False),
    ("one_shot_all_reduce", True),
    ("measured_rows", False),
    ("activations", "fp8"),
    ("kernel", "aten"),
    ("report", "out/run.HTML"),
    ("report", Path("run.txt")),
]


@pytest.mark.parametrize(("field", "value"), GOOD_VALUES)
def test_a_value_in_its_range_is_kept(field: str, value: Any) -> None:
    assert getattr(Int4Config(**{field: value}), field) == value


def test_a_config_is_frozen() -> None:
    config = Int4Config()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


@pytest.mark.parametrize("field", ["include", "skip"])
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("lm_head", ("lm_head",)),
        (["b", "a"], ("b", "a")),
        (("b", "a"), ("b", "a")),
        ({"b", "a"}, ("a", "b")),
        ([], ()),
    ],
)
def test_patterns_become_a_tuple(field: str, given: Any, kept: tuple[str, ...]) -> None:
    assert getattr(Int4Config(**{field: given}), field) == kept


def test_equal_configs_are_one_key_and_each_field_makes_another() -> None:
    assert hash(Int4Config(skip=["a"])) == hash(Int4Config(skip=("a",)))
    assert Int4Config(skip=["a"]) == Int4Config(skip=("a",))
    changed = {
        "group_size": 64,
        "inner_k_tiles": 4,
        "include": "a",
        "skip": "a",
        "min_sqnr_db": 20.0,
        "min_features": 8,
        "progress": True,
        "fuse_projections": False,
        "one_shot_all_reduce": True,
        "activations": "fp8",
        "kernel": "triton",
        "measured_rows": False,
        "method": "mse",
        "calibration": Calibration({}),
        "target_error": 0.1,
        "max_bytes": 1000,
        "overrides": {"a": {"group_size": 32}},
    }
    # Where the report goes, and whether it measures, changes nothing that is packed.
    assert Int4Config(report="run.json", measure=True) == Int4Config()
    assert {*changed, "report", "measure"} == {
        field.name for field in dataclasses.fields(Int4Config)
    }
    configs = {Int4Config(), *(Int4Config(**{field: value}) for field, value in changed.items())}
    assert len(configs) == 1 + len(changed)


# --- options as torch.compile takes them ---------------------------------------------------------


@pytest.mark.parametrize("options", [None, {}])
def test_no_options_give_the_defaults(options: dict[str, Any] | None) -> None:
    assert split_options(None, options) == (Int4Config(), {})


def test_options_are_split_between_us_and_inductor() -> None:
    options = {"group_size": 64, "max_autotune": True, "triton.cudagraphs": False}
    config, patches = split_options(None, options)
    assert config == Int4Config(group_size=64)
    assert patches == {"max_autotune": True, "triton.cudagraphs": False}
    assert options == {"group_size": 64, "max_autotune": True, "triton.cudagraphs": False}


def test_names_may_be_written_with_dashes() -> None:
    options = {"group-size": 32, "min-sqnr-db": 3.0, "max-autotune": True}
    config, patches = split_options(None, options)
    assert config == Int4Config(group_size=32, min_sqnr_db=3.0)
    assert patches == {"max_autotune": True}


@pytest.mark.parametrize("mode", sorted(list_mode_options()))
def test_a_mode_is_expanded_as_inductor_expands_it(mode: str) -> None:
    assert split_options(mode, None) == (Int4Config(), list_mode_options(mode))


def test_an_option_is_stronger_than_the_mode() -> None:
    assert list_mode_options("max-autotune")["max_autotune"] is True
    _, patches = split_options("max-autotune", {"max_autotune": False})
    assert patches == {**list_mode_options("max-autotune"), "max_autotune": False}


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        split_options("fast", None)
    known = ", ".join(map(repr, list_mode_options()))
    assert str(caught.value) == f"unknown mode 'fast' for backend 'int4tile': it takes {known}"
    assert "'reduce-overhead'" in known


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("gruop_size", "did you mean 'group_size'?"),
        ("group-sise", "did you mean 'group_size'?"),
        ("skips", "did you mean 'skip'?"),
        ("min_sqnr", "did you mean 'min_sqnr_db'?"),
        ("max_autotun", "did you mean 'max_autotune'?"),
        ("triton.cudagraph", "did you mean 'triton.cudagraphs'?"),
        (
            "qqqqqqqqqq",
            "fxint4 knows group_size, inner_k_tiles, method, calibration, overrides, "
            "target_error, max_bytes, include, skip, min_sqnr_db, min_features, progress, "
            "fuse_projections, one_shot_all_reduce, activations, kernel, measured_rows, measure, "
            "report",
        ),
    ],
)
def test_an_unknown_option_names_the_nearest_known_one(key: str, hint: str) -> None:
    with pytest.raises(OptionError) as caught:
        split_options(None, {key: 1})
    assert str(caught.value) == (
        f"unknown option {key!r} for backend 'int4tile': {hint} (Inductor options work too)"
    )


def compiled(model: nn.Module, options: dict[str, Any]) -> None:
    torch.compile(model, backend="int4tile", options=options)(torch.randn(2, 64))


WAYS: dict[str, Any] = {
    "torch.compile": compiled,
    "explain": lambda model, options: fxint4.explain(model, torch.randn(2, 64), options=options),
    "pack_": lambda model, options: fxint4.pack_(model, options=options),
    "pack_ with arguments": lambda model, options: fxint4.pack_(
        model, (torch.randn(2, 64),), options
    ),
    "calibrate": lambda model, options: calibrate(model, [torch.randn(2, 64)], options=options),
    "rewrite": lambda model, options: fxint4.rewrite(
        torch.export.export(model, (torch.randn(2, 64),)), options
    ),
}


@pytest.mark.compiles
@pytest.mark.parametrize("key", ["free_weights", "free-weights"])
@pytest.mark.parametrize("way", WAYS)
def test_a_key_that_is_gone_names_what_to_call(way: str, key: str) -> None:
    model = nn.Linear(64, 64).eval()
    message = r"free_weights is no option: fxint4\.pack_\(model\)"
    with pytest.raises(Exception, match=message) as caught:
        WAYS[way](model, {key: True})
    # torch.compile wraps it.
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), OptionError)
    assert type(model.weight) is nn.Parameter


@pytest.mark.parametrize("options", [Int4Config(), "skip", ["skip"], {64: "group_size"}])
@pytest.mark.parametrize("take", [partial(split_options, None), partial(calibrate, torch.relu, [])])
def test_options_that_are_no_dict_by_name(take: Any, options: Any) -> None:
    with pytest.raises(OptionError) as caught:
        take(options)
    assert str(caught.value).startswith(f"options is {options!r}; it takes a dict")


def test_an_option_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=re.escape("group_size is 7")):
        split_options(None, {"group_size": 7})


# --- which layers a pattern matches --------------------------------------------------------------

LAYER = "model.layers.1.mlp.up"
PARAMETERS = ("model.layers.1.mlp.up.weight", "model.layers.1.mlp.up.scale")


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.1.mlp.up",  # itself
        "model.layers.1.mlp",  # what holds it
        "model.layers.1",
        "model",
        "model.layers.1.mlp.up.weight",  # its parameters
        "model.layers.1.mlp.up.scale",
        "*.up",
        "model.layers.?.mlp",
        "model.layers.[0-3].mlp",
        "*.mlp.*",
        "*",
        r"re:model\.layers\.\d+",
        r"re:.*\.(up|down)",
        r"re:(?i).*\.UP\.WEIGHT",
    ],
)
def test_a_pattern_that_matches(pattern: str) -> None:
    assert first_match(LAYER, PARAMETERS, ["lm_head", pattern]) == pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "up",  # the full name is matched
        "mlp.up",
        "layers.1",
        "model.layers.1.mlp.u",  # whole parts of it are
        "model.layer",
        "model.layers.1.",
        "model.layers.11",
        "MODEL",  # with its case
        r"model\.layers\.\d",  # a regular expression without its prefix
        "re:up",
        r"re:layers\.1",
        r"re:model\.layers\.1\.mlp\.u",
        "re:Model",
        "",
    ],
)
def test_a_pattern_that_does_not_match(pattern: str) -> None:
    assert first_match(LAYER, PARAMETERS, [pattern]) is None


@pytest.mark.parametrize("pattern", ["layers.1", "layers.1.*", "layers.?", r"re:layers\.1"])
def test_layer_1_is_not_layer_10(pattern: str) -> None:
    assert first_match("layers.1.fc", ("layers.1.fc.weight",), [pattern]) == pattern
    assert first_match("layers.10.fc", ("layers.10.fc.weight",), [pattern]) is None


def test_a_parameter_of_no_layer_is_matched_by_its_name() -> None:
    assert first_match("w", ("w",), ["w"]) == "w"
    assert first_match("fc", ("fc.weight", "lora.a", "lora.b"), ["lora"]) == "lora"


def test_the_first_matching_pattern_is_named_and_none_matches_nothing() -> None:
    assert first_match("a.b", (), ["c", "*.b", "a"]) == "*.b"
    assert first_match("a.b", (), []) is None


def test_overrides_change_the_layers_that_they_match() -> None:
    config = Int4Config(
        group_size=128,
        overrides={
            "lm_head": {"group_size": 32},
            "re:.*experts.*": {"method": "hqq", "group_size": 64},
            "*.experts.0": {"group_size": 256},
        },
    )
    assert config.for_weight("layers.0.q_proj", ["layers.0.q_proj.weight"]) is config
    head = config.for_weight("lm_head", ["lm_head.weight"])
    assert (head.group_size, head.method, head.overrides) == (32, "rtn", ())
    later_wins = config.for_weight("mlp.experts.0", ["mlp.experts.0.weight"])
    assert (later_wins.group_size, later_wins.method) == (256, "hqq")
    assert config.for_weight("mlp.experts.1", ["mlp.experts.1.weight"]).group_size == 64
    assert hash(config) == hash(dataclasses.replace(config))


def test_one_budget_at_a_time() -> None:
    with pytest.raises(OptionError, match="exclude each other"):
        Int4Config(target_error=0.1, max_bytes=1000)


def test_only_a_calibration_by_the_same_budget_has_its_choices() -> None:
    trade = Trade("target_error=0.1", 0.09, 100)
    chosen = Calibration({}, {"a.weight": Choice(64, "mse"), "b.weight": Choice(None)}, trade)
    assert not Int4Config().needs_choices
    assert Int4Config(target_error=0.1).needs_choices
    assert Int4Config(target_error=0.2, calibration=chosen).needs_choices
    config = Int4Config(target_error=0.1, calibration=chosen)
    assert not config.needs_choices
    of_a = config.for_weight("a", ["a.weight"], "a.weight")
    assert (of_a.group_size, of_a.method, of_a.budget) == (64, "mse", None)
    assert config.kept_by_budget("a.weight") is None
    assert config.kept_by_budget("b.weight") == "kept by target_error=0.1"
    assert config.for_weight("c", ["c.weight"], "c.weight") is config
    assert config.asked()["trade"] == "target_error=0.1: error 0.09 in 100 bytes"
