import subprocess
import sys

import pytest

from stages.common.errors import UserError
from stages.edge.fresh import measure_fresh
from stages.edge.runtimes import ONNXRUNTIME


def test_the_process_for_onnx_runtime_imports_no_torch():
    code = (
        "import sys, importlib, stages.edge.fresh, stages.edge.runtimes as r, stages.export.session;"
        "[importlib.import_module(m) for m in r.ONNXRUNTIME.modules];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_does_not_run_is_named_with_the_reason(tmp_path):
    (tmp_path / "model.json").write_text('{"image_size": 24}')
    with pytest.raises(UserError, match=r"under onnxruntime .* new process: .*model\.onnx is missing"):
        measure_fresh(ONNXRUNTIME, tmp_path, 1, 1, 1)
