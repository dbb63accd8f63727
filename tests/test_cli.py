import os
import subprocess
import sys
from pathlib import Path

import pytest
from toy_bundle import VARIANT
from toy_project import compressed_project

from stages.cli import COMMANDS

TOP = Path(__file__).parents[1]
COMMAND = "import sys; sys.argv[0] = 'edgewise'; from stages.cli import main; {}"


def edgewise(folder, *arguments, code="main()"):
    """Run the command in a process of its own, in `folder`."""
    command = [sys.executable, "-c", COMMAND.format(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(TOP), "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)], ids=lambda a: a[0] if a else "edgewise")
def test_help_imports_no_slow_package(tmp_path, arguments):
    code = "import atexit; atexit.register(lambda: print('MODULES', *sys.modules)); main()"
    done = edgewise(tmp_path, *arguments, "--help", code=code)
    assert (done.returncode, done.stderr) == (0, "")
    text, modules = done.stdout.split("MODULES")
    assert text.startswith("usage: edgewise")
    if not arguments:
        assert all(f"    {name} " in text for name in COMMANDS)
    slow = {"torch", "torchvision", "timm", "scipy.stats", "sklearn", "matplotlib.pyplot", "cv2", "openvino", "dvc"}
    assert not slow & set(modules.split())


@pytest.mark.parametrize("arguments", [["nothing"], [], ["bundle"], ["bundle", VARIANT, "--accuracy", "2"]], ids=str)
def test_wrong_arguments_exit_with_code_2(tmp_path, arguments):
    done = edgewise(tmp_path, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: edgewise" in done.stderr
    assert "error:" in done.stderr


@pytest.mark.parametrize("arguments", [["check"], ["bundle", VARIANT], ["printed", VARIANT]], ids=str)
def test_a_user_error_is_one_line_and_exits_with_code_2(tmp_path, arguments):
    done = edgewise(tmp_path, *arguments)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert "params.yaml is missing" in done.stderr


def test_bundle_writes_relative_to_the_folder_of_the_profile(tmp_path):
    project = compressed_project(tmp_path)
    code = "import atexit; atexit.register(lambda: print('torch' in sys.modules)); main()"
    done = edgewise(project, "bundle", VARIANT, "--accuracy", "0.1", code=code)
    assert done.returncode == 0, done.stderr
    assert "60 validation images" in done.stdout
    assert done.stdout.endswith("False\n")
    assert (project / "dist" / VARIANT / "bundle.json").is_file()
