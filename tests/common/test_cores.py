import pytest

from stages.common.cores import threads_for, usable_cores


@pytest.mark.parametrize(
    ("wanted", "environment", "threads"),
    [
        (0, {}, 6),
        (4, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 4),
        (0, {"OMP_NUM_THREADS": "2"}, 2),
        (0, {"OMP_NUM_THREADS": "3,1"}, 3),
        (0, {"OMP_NUM_THREADS": ""}, 6),
        (0, {"OMP_NUM_THREADS": "many"}, 6),
        (0, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 3),  # torchrun sets OMP_NUM_THREADS itself
        (0, {"LOCAL_WORLD_SIZE": "8"}, 1),
    ],
)
def test_zero_takes_the_cores_of_this_process(wanted, environment, threads, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert usable_cores() == 6
    assert threads_for(wanted) == threads
