import subprocess
import sys

import numpy as np
import pytest

from stages.common.errors import UserError
from stages.edge.fresh import measure_fresh
from stages.edge.memory import peak_rss_bytes
from stages.edge.runtimes import ONNXRUNTIME


def test_nothing_of_torch_is_imported_on_the_way_to_onnx_runtime():
    code = (
        "import sys, importlib, stages.edge.fresh, stages.edge.runtimes as r;"
        "[importlib.import_module(m) for m in r.ONNXRUNTIME.modules];"
        "import stages.export.session;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_peak_memory_grows_with_what_was_touched():
    before = peak_rss_bytes()
    block = np.ones(64 * 2**20, np.uint8)
    assert peak_rss_bytes() >= before
    code = "import numpy, stages.edge.fresh as f; a = numpy.ones({} * 2**20, numpy.uint8); print(f.peak_rss_bytes())"
    small, large = (
        int(subprocess.run([sys.executable, "-c", code.format(size)], capture_output=True, check=True).stdout)
        for size in (1, 101)
    )
    assert large - small == pytest.approx(100 * 2**20, rel=0.1)
    assert block[0] == 1


def test_the_memory_of_a_fresh_process_is_not_that_of_its_parent():
    block = np.ones(300 * 2**20, np.uint8)
    code = "import stages.edge.fresh as f; print(f.peak_rss_bytes())"
    child = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert child < 200 * 2**20 < block.nbytes


def test_a_model_that_does_not_run_is_named_with_the_reason(tmp_path):
    (tmp_path / "model.json").write_text('{"image_size": 24}')
    with pytest.raises(UserError, match=r"does not run in a new process under onnxruntime: .*model\.onnx is missing"):
        measure_fresh(ONNXRUNTIME, tmp_path, 1, 1)
