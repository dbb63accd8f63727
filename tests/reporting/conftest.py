from pathlib import Path

import pytest
from synthetic_run import ACCURACY, EDGE, params_of, read, write_run

from stages.reporting.inputs import CompletedRun
from stages.reporting.plots import draw_all
from stages.reporting.rows import Row, assemble_rows, choose


def _read(folder: Path, seeds: int) -> CompletedRun:
    write_run(folder, params_of(seeds), accuracy=ACCURACY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return read()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> CompletedRun:
    """One model and one seed; no test changes it, so all tests share it."""
    return _read(tmp_path_factory.mktemp("run"), seeds=1)


@pytest.fixture(scope="session")
def seeds_run(tmp_path_factory: pytest.TempPathFactory) -> CompletedRun:
    """The same with three seeds."""
    return _read(tmp_path_factory.mktemp("seeds"), seeds=3)


@pytest.fixture(scope="session")
def rows(run: CompletedRun) -> list[Row]:
    return assemble_rows(run)


@pytest.fixture(scope="session")
def pictures(run: CompletedRun, rows: list[Row]) -> dict:
    return draw_all(run, rows, choose(run, rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run in the working folder that a test may change."""
    write_run(tmp_path, params_of(), accuracy=ACCURACY)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def edge_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with everything that the edge benchmark can measure."""
    write_run(tmp_path, params_of() | {"edge_benchmark": EDGE})
    monkeypatch.chdir(tmp_path)
    return tmp_path
