from pathlib import Path

import pytest
from synthetic_run import params_of, write_run

from stages.params.load import load_params
from stages.params.whole import Params
from stages.reporting.inputs import Run, read_run
from stages.reporting.plots import Picture, draw_all
from stages.reporting.rows import assemble_groups, assemble_rows, choose


def _read(folder: Path, seeds: int) -> Run:
    write_run(folder, params_of(seeds), accuracy={"none": 0.8, "continued": 0.82, "oto50": 0.79, "l1": 0.6})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return read_run(load_params(Params))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One model, one seed, the study's pruners; nothing changes it, so all tests share it."""
    return _read(tmp_path_factory.mktemp("run"), seeds=1)


@pytest.fixture(scope="session")
def seeds_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same under three seeds."""
    return _read(tmp_path_factory.mktemp("seeds"), seeds=3)


@pytest.fixture(scope="session")
def pictures(run: Run) -> dict[str, Picture]:
    groups = assemble_groups(run)
    return draw_all(run, assemble_rows(run, groups), groups, choose(run))
