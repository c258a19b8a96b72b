"""The pattern that CONTRIBUTING.md walks through works as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxint4
from fxint4.passes.patterns import PATTERNS

pytestmark = [pytest.mark.compiles, pytest.mark.by_aten]

PAGE = Path(__file__).parent.parent / "CONTRIBUTING.md"


def test_the_walked_through_pattern_matches_rewrites_and_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [source] = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(source, "CONTRIBUTING.md", "exec"), namespace)
    monkeypatch.setattr("fxint4.passes.pipeline.PATTERNS", (*PATTERNS, namespace["MatrixVector"]()))

    tall, flat = nn.Parameter(torch.randn(128, 64)), nn.Parameter(torch.randn(48, 64))
    vector = torch.randn(64)
    report = fxint4.explain(lambda v: (tall @ v, flat @ v), vector)
    assert [(record.n, record.action, record.reason) for record in report.records] == [
        (128, "packed", "activations cast from float32 to bfloat16"),
        (48, "kept", "a matrix of 48 rows times a vector"),
    ]
    assert report.graph_diff.count("= aten._weight_int4pack_mm_for_cpu(") == 1
