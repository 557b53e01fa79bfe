"""Tests need no network: whatever would ask a model hub must fail at once instead."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Several test workers share the cores: one torch thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a real, tiny, untrained StableDiffusionPipeline that draws 32 × 32 pixels."""
    from t2iprobe.testing import tiny_pipeline

    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline("sd").save_pretrained(folder)
    return folder
