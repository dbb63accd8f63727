"""The bundle of the toy project, made once per process, and its scripts as a device runs them."""

import contextlib
import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from toy_project import compressed_project

from stages import cli

VARIANT = "toy-none-int8"
WRAPPER = """\
import runpy, sys
for module in {blocked}:
    sys.modules[module] = None
sys.path.insert(0, {folder!r})
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_bundle(project: Path, *arguments: str) -> Path:
    """The bundle of `VARIANT`, made by the command line."""
    with contextlib.chdir(project):
        edgewise("bundle", VARIANT, *arguments)
    return project / "dist" / VARIANT


def edgewise(*arguments: str) -> None:
    """Run the command in this process, without its handling of errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["edgewise", *arguments])
        cli.command()


@functools.cache
def toy_bundle() -> Path:
    """Do not change it: tests that need another one copy it."""
    _KEPT.append(tempfile.TemporaryDirectory(prefix="toy-bundle-"))
    return make_bundle(compressed_project(Path(_KEPT[-1].name)), "--accuracy", "0.25")


def device_command(folder: Path, script: str, *arguments: object, blocked: tuple[str, ...] = ()) -> list[str]:
    """The command that runs a script of the bundle without torch and this package, and leaves no bytecode."""
    argv = [str(folder / script), *map(str, arguments)]
    code = WRAPPER.format(blocked=("torch", "stages", *blocked), folder=str(folder), argv=argv)
    return [sys.executable, "-I", "-B", "-c", code]


def on_device(folder: Path, script: str, *arguments: object, blocked: tuple[str, ...] = ()):
    command = device_command(folder, script, *arguments, blocked=blocked)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def write_video(path: Path, frames: int, rate: float = 25.0) -> Path:
    """Frames 96 by 64, each of one grey."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), rate, (96, 64))
    for number in range(frames):
        writer.write(np.full((64, 96, 3), 20 + number * 200 // max(frames, 1), np.uint8))
    writer.release()
    return path


_KEPT: list[tempfile.TemporaryDirectory] = []  # removed when the interpreter ends
