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
waiting = [f._waiting for f in sys.meta_path if "fxint4" in type(f).__module__]
assert waiting in ([], [["diffusers.quantizers"]]), waiting
import transformers.quantizers
assert "fxint4" not in type(transformers.quantizers.__loader__).__module__
assert "fxint4" not in type(transformers.quantizers.__spec__.loader).__module__
"""


#: Runs each program in a process of its own, in which torch, which takes longest, is imported.
FORKS = """
import os, sys, traceback
import torch
for program in {programs!r}:
    child = os.fork()
    if not child:
        try:
            exec(program, {{"sys": sys}})
        except BaseException:
            traceback.print_exc()
            status = 1
        else:
            status = 0
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, program
"""


def run(*programs: str) -> str:
    programs = tuple(textwrap.dedent(program) for program in programs)
    script = FORKS.format(programs=programs)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whatever_is_imported_first() -> None:
    imports = (
        "import transformers, fxint4",
        "import transformers.quantizers, fxint4",
        "import fxint4\nfrom transformers import PreTrainedModel",
        "import fxint4\nfxint4.Int4TileConfig",
    )
    run(*(f"{each}\n{KNOWN}" for each in imports))


def test_diffusers() -> None:
    pytest.importorskip("diffusers")
    imports = (
        "import diffusers.quantizers, fxint4",
        "import fxint4\nfrom diffusers import ModelMixin",
        "import fxint4\nfxint4.Int4TileConfig\nimport diffusers.quantizers",
    )
    known = """
from diffusers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["int4tile"].__name__ == "Int4TileDiffusersQuantizer"
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["int4tile"] is fxint4.Int4TileConfig
"""
    run(*(f"{each}\n{known}\n{KNOWN}" for each in imports))


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
        import torch
        fxint4.pack_(torch.nn.Sequential(torch.nn.Linear(64, 64)))
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
