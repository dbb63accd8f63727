import importlib.metadata
import subprocess
import sys

import numpy as np
import pytest
from toy_project import compressed_project

from stages.common import paths
from stages.common.errors import UserError
from stages.edge import runtimes
from stages.edge.runtimes import (
    ONNXRUNTIME,
    OPENVINO,
    RUNTIMES,
    TORCH_COMPILE,
    TORCH_EAGER,
    measure_fresh,
    not_installed,
)
from stages.export.session import int8_overflows

FP32, INT8 = "toy-none-fp32", "toy-none-int8"
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 24, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return compressed_project(tmp_path_factory.mktemp("runtimes"))


@pytest.mark.parametrize("variant", [FP32, INT8])
@pytest.mark.parametrize("runtime", [ONNXRUNTIME, OPENVINO], ids=lambda runtime: runtime.name)
def test_a_runtime_gives_the_logits_of_pytorch(project, runtime, variant):
    if reason := not_installed(runtime):
        pytest.skip(reason)
    if variant == INT8 and runtime is ONNXRUNTIME and int8_overflows():
        pytest.skip("products of 8 bits overflow here")
    folder = project / paths.compressed(variant)
    expected = TORCH_EAGER.open(folder, 1, 1)(PIXELS)
    assert expected.std() > 0.1
    found = runtime.open(folder, 1, 1)(PIXELS)
    assert (found.shape, found.dtype) == ((1, 5), np.float32)
    np.testing.assert_allclose(found, expected, atol=1e-4 if variant == FP32 else 0.2 * expected.std())


def test_compiled_pytorch_gives_the_logits_of_eager_and_a_missing_compiler_is_an_error(project, monkeypatch):
    import torch

    folder = project / paths.compressed(FP32)
    monkeypatch.setattr(torch, "compile", lambda module, dynamic: torch._dynamo.optimize("eager")(module))
    np.testing.assert_allclose(
        TORCH_COMPILE.open(folder, 1, 1)(PIXELS), TORCH_EAGER.open(folder, 1, 1)(PIXELS), atol=1e-4
    )

    def without_compiler(module, dynamic):
        def run(pixels):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand so on")

        return run

    monkeypatch.setattr(torch, "compile", without_compiler)
    with pytest.raises(UserError, match=r"No working C\+\+ compiler found\): install a C\+\+"):
        TORCH_COMPILE.open(folder, 1, 1)


def test_a_missing_runtime_is_named_with_the_remedy(monkeypatch):
    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(runtimes.importlib.metadata, "version", missing)
    lines = {name: not_installed(runtime) for name, runtime in RUNTIMES.items()}
    assert lines["openvino"] == "openvino is not installed: uv sync --extra openvino"
    assert all(lines.values())


def test_the_list_of_runtimes_imports_none_of_them():
    code = "import sys, stages.edge.runtimes; sys.exit(bool({'torch', 'onnxruntime', 'openvino'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("runtime", [ONNXRUNTIME, OPENVINO], ids=lambda runtime: runtime.name)
def test_a_broken_file_is_an_error_in_one_line(runtime, tmp_path):
    if reason := not_installed(runtime):
        pytest.skip(reason)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match=r"^.*model\.onnx.*$") as caught:
        runtime.open(tmp_path, 1, 1)
    assert "\n" not in str(caught.value)


def test_the_new_process_for_onnx_runtime_imports_no_torch():
    code = (
        "import sys, importlib, stages.edge.runtimes as r, stages.export.session;"
        "[importlib.import_module(m) for m in r.ONNXRUNTIME.modules];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_model_that_does_not_run_in_a_new_process_is_named_with_the_reason(tmp_path):
    (tmp_path / "model.json").write_text('{"image_size": 24, "network": {"channels": 3}}')
    with pytest.raises(UserError, match=r"under onnxruntime .* new process: .*model\.onnx is missing"):
        measure_fresh(ONNXRUNTIME, tmp_path, 1, 1, 1)
