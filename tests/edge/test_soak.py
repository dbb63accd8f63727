import time

import numpy as np
import pytest

from stages.edge.soak import SoakPlan, soak

IMAGES = [np.full((1, 2, 2, 3), value, np.uint8) for value in (0, 1, 2)]


def classify(pixels):
    time.sleep(0.0005)
    return np.eye(3, dtype=np.float32)[pixels[:, 0, 0, 0]]


def test_windows_follow_each_other_to_the_end_and_hold_all_calls():
    states = iter(range(100))
    rows = soak(classify, IMAGES, SoakPlan(0.25, 0, 0.05), lambda: {"rss_bytes": next(states)})
    assert len(rows) == 5
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert 0.25 <= seconds[-1] < 0.35
    assert [row["rss_bytes"] for row in rows] == list(range(5))
    for row in rows:
        assert row["runs"] > 10
        assert 0.5 <= row["latency_ms_p50"] <= row["latency_ms_p95"] <= row["latency_ms_p99"] <= row["latency_ms_max"]
        assert (row["late"], row["wrong"]) == (0, 0)


@pytest.mark.parametrize(("seconds", "runs", "late"), [(0.0, 40, 0), (0.03, 14, 4)])
def test_a_set_rate_is_kept_and_late_images_are_counted(seconds, runs, late):
    def slow(pixels):
        time.sleep(seconds)
        return classify(pixels)

    rows = soak(slow, IMAGES, SoakPlan(0.4, 100, 0.1), dict)
    assert sum(row["runs"] for row in rows) == pytest.approx(runs, abs=5)
    assert sum(row["late"] for row in rows) >= late


def test_every_answer_is_compared_with_the_first_one_on_its_image():
    calls = []

    def changes(pixels):
        calls.append(None)
        return classify(pixels if len(calls) != 20 else (pixels + 1) % 3)

    rows = soak(changes, IMAGES, SoakPlan(0.2, 0, 0.05), dict)
    assert sum(row["wrong"] for row in rows) == 1
    assert rows[0]["wrong"] == 1
