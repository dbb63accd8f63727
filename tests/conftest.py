"""The suite runs in two processes (`addopts` in pyproject.toml): each keeps to one core, the longest file first."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two cores, two processes


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")  # stable: all else keeps its order
