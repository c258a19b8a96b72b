"""`import fxint4` makes transformers know "int4tile", without importing it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("transformers.core_model_loading")

pytestmark = pytest.mark.compiles  # starts programs

KNOWN = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZER_MAPPING["int4tile"].__name__ == "Int4TileQuantizer"
assert AUTO_QUANTIZATION_CONFIG_MAPPING["int4tile"] is fxint4.Int4TileConfig
finders = [finder for finder in sys.meta_path if "fxint4" in type(finder).__module__]
assert [finder._waiting for finder in finders] == [["diffusers.quantizers"]]
import transformers.quantizers
assert "fxint4" not in type(transformers.quantizers.__loader__).__module__
assert "fxint4" not in type(transformers.quantizers.__spec__.loader).__module__
"""


def run(program: str) -> str:
    program = "import sys\n" + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whatever_is_imported_first() -> None:
    for imports in (
        "import fxint4, transformers",
        "import transformers, fxint4",
        "import transformers.quantizers, fxint4",
        "import fxint4\nfrom transformers import PreTrainedModel",
        "import fxint4\nfxint4.Int4TileConfig",
    ):
        run(f"{imports}\n{KNOWN}")


def test_twice() -> None:
    run(f"""
import fxint4
from fxint4.integrations.registration import register_integrations
before = list(sys.meta_path)
register_integrations()
assert sys.meta_path == before
import transformers.quantizers
register_integrations()
{KNOWN}
from fxint4.frontends.in_place import followers
assert len(followers) == 1
""")


def test_what_importing_fxint4_imports() -> None:
    """Neither transformers nor what it needs, so that its time does not change."""
    out = run("""
        import fxint4
        heavy = ("transformers", "huggingface_hub", "tokenizers", "peft", "accelerate", "diffusers")
        print([name for name in heavy if name in sys.modules])
        print([name for name in sys.modules if name.startswith("fxint4.integrations.")])
    """)
    assert out.splitlines() == ["[]", "['fxint4.integrations.registration']"]


def test_an_older_transformers_works_without_it() -> None:
    run("""
        import logging, types
        import fxint4
        sys.modules["fxint4.integrations.transformers"] = None  # which imports what is new in 5.17
        said = []
        logging.getLogger("fxint4").addFilter(lambda record: said.append(record.getMessage()))
        import transformers.quantizers
        assert "int4tile" not in transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING
        assert len(said) == 1 and "integrations.transformers" in said[0], said
    """)


def test_no_transformers_at_all() -> None:
    run("""
        sys.modules["transformers"] = None
        import torch, fxint4
        model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        fxint4.pack_(model)
        try:
            fxint4.Int4TileConfig
        except ImportError as error:
            assert "transformers" in str(error)
        else:
            raise AssertionError("no error")
        try:
            fxint4.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        assert "Int4TileConfig" in dir(fxint4)
    """)
