import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.common.errors import UserError, run_stage

TOP = Path(__file__).parents[2]


def ended(error: BaseException, capsys) -> tuple[int, str]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as exit:
        run_stage(main)
    return exit.value.code, capsys.readouterr().err


def test_a_user_error_is_its_message_and_exit_code_2(capsys):
    assert ended(UserError("a.json is broken"), capsys) == (2, "error: a.json is broken\n")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "data/.images.17.partial"),
            "data/images: Permission denied: give this user access to it, then run again",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "models/dense"),
            "models/dense: Read-only file system: give this user access to it, then run again",
        ),
    ],
)
def test_a_disk_that_refuses_is_one_line_with_path_and_remedy(error, line, capsys):
    assert ended(error, capsys) == (2, f"error: {line}\n")


def test_errors_of_the_program_keep_their_traceback():
    def main() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "forgotten")

    with pytest.raises(FileNotFoundError):
        run_stage(main)


def test_an_interruption_is_one_line_and_exit_code_130(capsys):
    code, line = ended(KeyboardInterrupt(), capsys)
    assert code == 130
    assert line == "interrupted: nothing half-done is kept; the same command goes on from there\n"


def test_an_interruption_while_a_stage_is_still_importing_ends_it_without_a_word(tmp_path):
    (tmp_path / "torch.py").write_text("import signal\n\nsignal.raise_signal(signal.SIGINT)\n")
    paths = f"{tmp_path}{os.pathsep}{TOP}"
    command = [sys.executable, "-m", "stages.finetune", "toy"]
    ended = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_a_stage_that_has_been_started_tells_of_an_interruption():
    script = "import signal; from stages.common.errors import run_stage; run_stage(lambda: signal.raise_signal(2))"
    start = f"import sys; sys.argv[0] = '-m'; {script}"
    ended = subprocess.run([sys.executable, "-c", start], cwd=TOP, capture_output=True, text=True)
    assert ended.returncode == 130
    assert ended.stderr.startswith("interrupted: nothing half-done is kept")


@pytest.mark.parametrize("lines", [1, 100_000])  # fewer and more than the buffer holds
def test_a_reader_who_has_left_ends_the_program_without_a_word(lines):
    script = f"from stages.common.errors import run_stage; run_stage(lambda: print({lines} * 'the plan\\n'))"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == 141
