"""The suite runs in two processes (`addopts` in pyproject.toml), each on one core; the longest file starts first."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two cores, two processes
# `nohup pytest &` starts this process with SIGINT ignored, and its children inherit that: tests of interruptions would
# wait for ever. A process that handles the signal gives its children the default.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")  # stable: the other files keep their order
