"""What a report is about, in words: the model, and the device that it is on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["device_text", "model_name"]


def model_name(model: Any) -> str:
    """Return the class of a module or the name of a function.

    A model that the Hugging Face Hub has also gets its name there: "BertModel (org/name)".
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile returned
    name = str(getattr(model, "__name__", type(model).__name__))
    hub = getattr(getattr(model, "config", None), "name_or_path", "")
    # A path would tell where somebody keeps files: "org/name" alone is a name of the Hub.
    parts = hub.split("/") if isinstance(hub, str) else []
    on_hub = len(parts) == 2 and all(parts) and not parts[0].startswith((".", "~"))
    return f"{name} ({hub})" if on_hub else name


def device_text(devices: Iterable[torch.device]) -> str:
    """Return what devices are, such as "NVIDIA H200", "2 x NVIDIA H200, CPU (AVX512)"."""
    counts: dict[str, int] = {}
    for device in dict.fromkeys(devices):
        if device.type == "cuda" and torch.cuda.is_available():  # there are programs without one
            name = torch.cuda.get_device_name(device)
        elif device.type == "cpu":
            name = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
        else:
            name = device.type
        counts[name] = counts.get(name, 0) + 1
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())
