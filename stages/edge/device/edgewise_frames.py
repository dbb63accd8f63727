"""Frames of a camera or a video file: uint8 `[H, W, 3]` in the channel order of OpenCV, BGR."""

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np


@dataclass(frozen=True)
class Frame:
    pixels: np.ndarray
    decode_ms: float


class NoFrames(Exception):
    """There is nothing to classify; the message tells the user why."""


def center(pixels: np.ndarray, fraction: float, square: bool = False) -> tuple[slice, slice]:
    """Rows and columns of the middle part whose sides are `fraction` of the frame's, or of the square in its middle."""
    height, width = pixels.shape[:2]
    tall, wide = max(1, round(fraction * height)), max(1, round(fraction * width))
    if square:
        tall = wide = min(tall, wide)
    top, left = (height - tall) // 2, (width - wide) // 2
    return slice(top, top + tall), slice(left, left + wide)


def open_video(source: int | Path) -> cv2.VideoCapture:
    """Open a camera by its number, or a video file; raises `NoFrames` if that is not possible."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # AV_LOG_QUIET: the scripts report an error in one line
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    if isinstance(source, Path) and not source.is_file():
        raise NoFrames(f"{source}: {'a folder, not a video' if source.is_dir() else 'no such file'}")
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    if not capture.isOpened():
        if isinstance(source, int):
            raise NoFrames(f"camera {source} cannot be opened: is it plugged in, and does no other program use it?")
        raise NoFrames(f"{source} cannot be opened as a video")
    return capture


def frames_of(capture: cv2.VideoCapture) -> Iterator[Frame]:
    """Yield every frame in order, as fast as the caller takes them."""
    started = time.perf_counter_ns()
    while (read := capture.read())[0]:
        yield Frame(read[1], (time.perf_counter_ns() - started) / 1e6)
        started = time.perf_counter_ns()


class NewestFrames:
    """Yields the newest frame each time; `dropped` counts the frames that a newer one replaced.

    A thread reads the frames, so a slow classifier never works through a queue of old ones. A video file plays at
    `frames_per_second`; that is 0 for a camera, which has its own rate.
    """

    def __init__(self, capture: cv2.VideoCapture, frames_per_second: float = 0.0) -> None:
        self.dropped = 0
        self._capture = capture
        self._interval = 1 / frames_per_second if frames_per_second else 0.0
        self._newest: Frame | None = None
        self._ended = self._stopped = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._grab, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._newest is not None or self._ended)
                frame, self._newest = self._newest, None
            if frame is None:
                return
            yield frame

    def close(self) -> None:
        """End the thread; if the camera hangs, the thread ends with the process."""
        self._stopped = True
        self._thread.join(timeout=2)

    def _grab(self) -> None:
        due = time.monotonic()
        while not (self._stopped or self._ended):
            started = time.perf_counter_ns()
            grabbed = self._capture.grab()
            if not self._interval:  # grab waits for the next frame of the camera
                started = time.perf_counter_ns()
            pixels = self._capture.retrieve()[1] if grabbed else None
            decode_ms = (time.perf_counter_ns() - started) / 1e6
            if self._interval:
                time.sleep(max(0.0, due - time.monotonic()))
                due += self._interval
            with self._changed:
                self._ended = pixels is None
                if pixels is not None:
                    self.dropped += self._newest is not None
                    self._newest = Frame(pixels, decode_ms)
                self._changed.notify()
