import threading
import time

import numpy as np
import pytest
from toy_bundle import write_video

from stages.edge.device.edgewise_frames import NewestFrames, NoFrames, center, frames_of, open_video


class Camera:
    """Frames whose pixels are their number; calls `wait` before each."""

    def __init__(self, frames, wait=lambda number: None):
        self.frames, self.wait, self.number = frames, wait, -1

    def grab(self):
        self.number += 1
        self.wait(self.number)
        return self.number < self.frames

    def retrieve(self):
        return True, np.full((2, 2, 3), self.number, np.uint8)


def test_a_video_yields_every_frame_once_and_in_order(tmp_path):
    path = write_video(tmp_path / "a.mp4", 20)
    grey = [float(frame.pixels.mean()) for frame in frames_of(open_video(path))]
    assert len(grey) == 20
    np.testing.assert_allclose(grey, [20 + 10 * number for number in range(20)], atol=4.5)


def test_older_frames_are_dropped_and_counted():
    frames = NewestFrames(Camera(10))
    frames._thread.join()
    assert [int(frame.pixels[0, 0, 0]) for frame in frames] == [9]
    assert frames.dropped == 9


def test_no_frame_is_dropped_if_each_is_taken_in_time():
    taken = threading.Semaphore(1)
    frames = NewestFrames(Camera(5, wait=lambda number: taken.acquire()))
    seen = []
    for frame in frames:
        seen.append(int(frame.pixels[0, 0, 0]))
        taken.release()
    assert (seen, frames.dropped) == ([0, 1, 2, 3, 4], 0)


def test_frames_keep_the_set_rate():
    started = time.monotonic()
    frames = NewestFrames(Camera(6), frames_per_second=20)
    seen = len(list(frames))
    assert time.monotonic() - started >= 5 / 20
    assert seen + frames.dropped == 6


def test_close_ends_the_thread():
    frames = NewestFrames(Camera(10**9, wait=lambda number: time.sleep(0.001)))
    next(iter(frames))
    frames.close()
    assert not frames._thread.is_alive()


@pytest.mark.parametrize(
    ("fraction", "square", "rows", "columns"),
    [
        (1.0, False, (0, 40), (0, 60)),
        (0.5, False, (10, 30), (15, 45)),
        (0.01, False, (19, 20), (29, 30)),
        (1.0, True, (0, 40), (10, 50)),
        (0.5, True, (10, 30), (20, 40)),
    ],
)
def test_the_part_is_in_the_middle_with_the_proportions_of_the_frame_or_a_square(fraction, square, rows, columns):
    found = center(np.zeros((40, 60, 3), np.uint8), fraction, square)
    assert [(part.start, part.stop) for part in found] == [rows, columns]
    turned = center(np.zeros((60, 40, 3), np.uint8), fraction, square)
    assert [(part.start, part.stop) for part in turned] == [columns, rows]


def test_a_missing_video_is_refused(tmp_path):
    with pytest.raises(NoFrames, match="no such file"):
        open_video(tmp_path / "missing.mp4")
