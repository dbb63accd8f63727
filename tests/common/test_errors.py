import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from stages.common.errors import UserError, run_stage


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
def test_a_disk_error_is_one_line_with_path_and_remedy(error, line, capsys):
    assert ended(error, capsys) == (2, f"error: {line}\n")


def test_errors_of_the_program_keep_their_traceback():
    def main() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "forgotten")

    with pytest.raises(FileNotFoundError):
        run_stage(main)


def test_an_interruption_is_one_line_and_exit_code_130(capsys):
    code, line = ended(KeyboardInterrupt(), capsys)
    assert code == 130
    assert line == "interrupted: no partial work is kept: run the same command again\n"


def test_an_interruption_that_a_library_turns_into_its_own_error_is_one_too(capsys):
    def main() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("a callback failed") from None

    with pytest.raises(SystemExit) as exit:
        run_stage(main)
    assert exit.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: ")


@pytest.mark.parametrize("lines", [1, 100_000])  # fewer and more than the buffer holds
def test_a_closed_pipe_ends_the_program_without_a_message(lines):
    script = f"from stages.common.errors import run_stage; run_stage(lambda: print({lines} * 'the plan\\n'))"
    command = [sys.executable, "-c", script]
    top = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=top, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        program.stdout.close()
        assert program.stderr.read() == ""
    assert program.returncode == 141
