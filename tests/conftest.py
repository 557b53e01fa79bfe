"""Tests need no network: whatever would ask a model hub must fail at once instead."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Several test workers share the cores: one torch thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
