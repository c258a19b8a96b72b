"""Makes other libraries know fxint4 once they are imported, without importing them.

The one global state that `import fxint4` changes: a library that reads "int4tile" in a folder's
config must know the name before it loads the weights, or it would load none of them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from torch import nn

from fxint4.config.int4_config import Int4Config
from fxint4.frontends.in_place import followers

__all__ = ["register_integrations"]

logger = logging.getLogger("fxint4")

#: A module of another library, and the module of ours that registers with it when it is imported,
#: and whose `follow_packing` is one of `fxint4.frontends.in_place.followers`.
_INTEGRATIONS = {
    "transformers.quantizers": "fxint4.integrations.transformers",
    "diffusers.quantizers": "fxint4.integrations.diffusers",
}


def register_integrations() -> None:
    """Register with the libraries that are imported, and with the others once they are.

    Harmless when called again.
    """
    waiting = []
    for module, integration in _INTEGRATIONS.items():
        if module in sys.modules:
            _register(integration)
        else:
            waiting.append(module)
    known = [finder for finder in sys.meta_path if isinstance(finder, _Finder)]
    if waiting and not known:
        sys.meta_path.insert(0, _Finder(waiting))
    if _follow_packing not in followers:
        followers.append(_follow_packing)


def _follow_packing(model: nn.Module, config: Int4Config | None) -> None:
    """Tell the integrations with the libraries that are imported; the model is of no other."""
    for module, integration in _INTEGRATIONS.items():
        if module in sys.modules:
            import_module(integration).follow_packing(model, config)


def _register(integration: str) -> None:
    try:
        import_module(integration)
    except ImportError as error:  # an older version of the library, which goes on without us
        logger.warning("%s does not work with what is installed: %s", integration, error)


class _Finder(MetaPathFinder):
    """Waits for modules of other libraries, and takes itself out once they all were imported.

    Args:
        waiting: The full names of the modules.
    """

    def __init__(self, waiting: Sequence[str]) -> None:
        self._waiting = list(waiting)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module that is waited for as the other finders do, with a loader that registers.

        Args:
            fullname: The full name of the module.
            path: Where its package looks for modules.
            target: The module that is reloaded, if it is.
        """
        if fullname not in self._waiting:
            return None
        self._waiting.remove(fullname)
        if not self._waiting and self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader, _INTEGRATIONS[fullname])
        return spec


class _Registering(Loader):
    """Loads a module as its own loader does, then registers an integration.

    Args:
        loader: The module's own loader.
        integration: The module of ours to import then.
    """

    def __init__(self, loader: Loader, integration: str) -> None:
        self._loader = loader
        self._integration = integration

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, which afterwards shows its own loader, and register."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _register(self._integration)
