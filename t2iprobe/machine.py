"""What this machine can do: devices, versions, what came with the package."""

import importlib.metadata
import platform
from typing import Any

import t2iprobe
from t2iprobe.config import list_presets
from t2iprobe.errors import UserError
from t2iprobe.wordnet import WORDNET_HASH

LIBRARIES = ("torch", "torchvision", "diffusers", "transformers", "timm", "numpy", "nltk", "pillow")


def list_versions() -> dict[str, str]:
    """Return the versions that a picture or a number may depend on, without importing anything."""
    versions = {"t2iprobe": t2iprobe.__version__, "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in LIBRARIES}


def describe_machine() -> dict[str, Any]:
    """Return devices, the dtype chosen for each, versions, presets and what came with the package."""
    import torch

    from t2iprobe.devices import best_dtype
    from t2iprobe.pipelines import locate_model

    devices = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    try:
        embedded = str(locate_model("embedded").folder)
    except UserError as error:
        embedded = f"none ({error})"
    return {
        "versions": list_versions(),
        "devices": {
            name: (torch.cuda.get_device_name(name) if name.startswith("cuda") else platform.machine())
            for name in devices
        },
        "dtypes": {name: best_dtype(name) for name in devices},
        "threads": torch.get_num_threads(),
        "presets": sorted(list_presets()),
        "model": embedded,
        "wordnet": WORDNET_HASH,
    }
