"""Classify the frames of a camera, a video file or a folder of images.

    python camera.py [--camera 0 | --video file | --folder dir] [--headless] [--save out.mp4]

The script classifies the square in the middle of a frame, or the whole image with --folder, as predict.py does. It
drops and counts the camera frames that arrive while it is busy. It drops no frame of a video or a folder, unless
--realtime plays the video at its own rate. Ctrl-C, q or Escape end the script, and it prints a summary.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

try:
    import cv2
    import numpy as np
    from edgewise_decode import decode, to_rgb
    from edgewise_frames import CROP, Frame, NewestFrames, NoFrames, center_square, frames_of, open_video
    from edgewise_model import Answer, Model, open_model, run_script, stop, threads_argument
    from PIL import Image, ImageOps
except ImportError as missing:
    own = str(missing.name).startswith("edgewise_")
    sys.exit(f"error: {missing}: {'copy the whole bundle again' if own else 'pip install -r requirements-camera.txt'}")

PARTS = ("decode", "resize", "inference", "drawing")
SURE, UNSURE = (80, 200, 80), (60, 160, 240)  # BGR
DEFAULT_RATE = 25.0  # frames per second of a source without a rate of its own


@dataclass
class Tally:
    """The classified frames, and how long each part of the work took."""

    started: float = field(default_factory=time.monotonic)
    times_ms: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    unsure: int = 0
    last: Answer | None = None

    @property
    def frames(self) -> int:
        return len(self.times_ms["inference"])

    def add(self, answer: Answer, **times_ms: float) -> None:
        for part, value in times_ms.items():
            self.times_ms[part].append(value)
        self.unsure += not answer.sure
        self.last = answer

    def times(self, since: int = 0) -> str:
        """Median of each part over the frames from number `since` on, without the parts that did not run."""
        p50 = {part: np.median(values[since:]) for part, values in self.times_ms.items() if values[since:]}
        return ", ".join(f"{part} {value:.2f} ms" for part, value in p50.items())


class Lines:
    """One line each second, where there is no window."""

    def __init__(self, tally: Tally) -> None:
        self.tally, self.printed, self.frames = tally, tally.started, 0

    def frame(self, dropped: int) -> None:
        now = time.monotonic()
        if now - self.printed < 1:
            return
        rate = (self.tally.frames - self.frames) / (now - self.printed)
        print(
            f"{now - self.tally.started:.0f} s: {rate:.1f} frames/s, {self.tally.last},"
            f" {self.tally.times(self.frames)}, {dropped} dropped",
            flush=True,
        )
        self.printed, self.frames = now, self.tally.frames


def summary(tally: Tally, dropped: int) -> str:
    seconds = time.monotonic() - tally.started
    return (
        f"{tally.frames} frames in {seconds:.1f} s, {tally.frames / seconds:.1f} frames/s, {dropped} dropped,"
        f" {tally.unsure} unsure\np50 of each part: {tally.times() or 'no frames'}"
    )


def folder_frames(folder: Path, left_out: list[Path]) -> Iterator[Frame]:
    """The images of a folder in the order of their names, upright; other files are named and left out.

    Args:
        left_out: receives the files that are not images.

    Raises:
        NoFrames: if the folder is missing, or none of its files is an image.
    """
    if not folder.is_dir():
        raise NoFrames(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    found = False
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        started = time.perf_counter_ns()
        try:
            with Image.open(path) as image:
                image.load()
                rgb = np.asarray(to_rgb(ImageOps.exif_transpose(image)))
        except Exception as error:  # errors of Pillow have no common class
            reason = " ".join(str(error).split()).replace(f" {str(path)!r}", "") or type(error).__name__
            print(f"{path}: left out: {reason}", file=sys.stderr)
            left_out.append(path)
            continue
        found = True
        yield Frame(np.ascontiguousarray(rgb[..., ::-1]), (time.perf_counter_ns() - started) / 1e6)
    if not found:
        raise NoFrames(f"{folder} contains no image")


def draw(pixels: np.ndarray, square: tuple[slice, slice], answer: Answer) -> np.ndarray:
    """A copy of a frame with the label and the classified square."""
    drawn, colour = pixels.copy(), SURE if answer.sure else UNSURE
    rows, columns = square
    cv2.rectangle(drawn, (columns.start, rows.start), (columns.stop - 1, rows.stop - 1), colour, 1)
    text = f"{answer.label if answer.sure else f'{answer.label}?'} {answer.confidence:.2f}"
    scale = max(0.4, min(pixels.shape[:2]) / 600)
    place = (max(2, columns.start), max(round(24 * scale), rows.start - 4))
    for thick, ink in ((round(4 * scale) + 1, (0, 0, 0)), (round(2 * scale), colour)):  # outlined
        cv2.putText(drawn, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, max(1, thick), cv2.LINE_AA)
    return drawn


class Screen:
    """The output of drawn frames: a window, a video file, both, or neither."""

    def __init__(self, window: bool, save: Path | None, frames_per_second: float) -> None:
        self.window, self.save, self.rate = window, save, frames_per_second
        self.writer: cv2.VideoWriter | None = None
        if window and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
            stop("there is no display for a window: add --headless")  # Qt would abort the process
        if window:
            try:
                cv2.namedWindow("edgewise")
            except cv2.error:
                stop("this OpenCV cannot open windows: add --headless, or install opencv-python instead")

    @property
    def wanted(self) -> bool:
        return self.window or self.save is not None

    def show(self, drawn: np.ndarray) -> bool:
        """Returns False if the user wants to stop."""
        if self.save is not None:
            height, width = drawn.shape[:2]
            if self.writer is None:
                code = cv2.VideoWriter.fourcc(*"mp4v")
                self.size = (width, height)
                self.writer = cv2.VideoWriter(str(self.save), code, self.rate, self.size)
                if not self.writer.isOpened():
                    stop(f"{self.save} cannot be written: does the folder exist, and does the name end in .mp4?")
            self.writer.write(drawn if (width, height) == self.size else cv2.resize(drawn, self.size))
        if not self.window:
            return True
        cv2.imshow("edgewise", drawn)
        return cv2.waitKey(1) & 0xFF not in (ord("q"), 27)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()
        if self.window:
            cv2.destroyAllWindows()


def watch(
    model: Model,
    frames: Iterable[Frame],
    crop: float | None,
    screen: Screen,
    tally: Tally,
    most: int | None,
    after: Callable[[], None],
) -> bool:
    """Classify each frame and then call `after`. Returns True if the source ended."""
    for frame in frames:
        times = [time.perf_counter_ns()]
        square = center_square(frame.pixels, crop) if crop else whole(frame.pixels)
        rgb = np.ascontiguousarray(frame.pixels[square][..., ::-1])
        pixels, _ = decode(rgb, model.bundle.image_size)
        times.append(time.perf_counter_ns())
        answer = model.answer(pixels)
        times.append(time.perf_counter_ns())
        keep_going = screen.show(draw(frame.pixels, square, answer)) if screen.wanted else True
        times.append(time.perf_counter_ns())
        resize_ms, inference_ms, drawing_ms = (np.diff(times) / 1e6).tolist()
        tally.add(answer, decode=frame.decode_ms, resize=resize_ms, inference=inference_ms)
        if screen.wanted:
            tally.times_ms["drawing"].append(drawing_ms)
        after()
        if not keep_going or tally.frames == most:
            return False
    return True


def whole(pixels: np.ndarray) -> tuple[slice, slice]:
    height, width = pixels.shape[:2]
    return slice(0, height), slice(0, width)


def run(arguments: argparse.Namespace) -> str | None:
    """Classify until the end, print the summary, and return a message if something went wrong.

    Raises:
        NoFrames: if the source cannot be opened.
    """
    model = open_model(Path(__file__).parent, arguments.threads)
    source: int | Path = arguments.folder or arguments.video or arguments.camera
    capture, live, rate, crop = None, None, DEFAULT_RATE, arguments.crop
    if not arguments.folder:
        capture = open_video(source)
        rate, crop = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE, crop or CROP
    screen = Screen(not arguments.headless, arguments.save, rate)
    left_out: list[Path] = []
    if capture is None:
        frames: Iterable[Frame] = folder_frames(arguments.folder, left_out)
    elif arguments.video and not arguments.realtime:
        frames = frames_of(capture)
    else:
        frames = live = NewestFrames(capture, rate if arguments.video else 0.0)
    tally = Tally()
    lines, ended = Lines(tally), False

    def dropped() -> int:
        return live.dropped if live else 0

    def after() -> None:
        if arguments.headless:
            lines.frame(dropped())

    try:
        ended = watch(model, frames, crop, screen, tally, arguments.max_frames, after)
    except KeyboardInterrupt:
        pass  # the usual way to end a camera
    finally:
        screen.close()
        if live:
            live.close()
    if ended and not tally.frames:
        return f"{source} has no frames" if arguments.video else f"camera {source} gives no frames"
    print(summary(tally, dropped()))
    if ended and live and not arguments.video:
        return f"camera {source} stopped giving frames: was it unplugged?"
    return f"{len(left_out)} files of {source} were left out" if left_out else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--camera", type=int, default=0, metavar="number", help="(default: 0)")
    sources.add_argument("--video", type=Path, metavar="file")
    sources.add_argument("--folder", type=Path, metavar="dir")
    parser.add_argument("--realtime", action="store_true", help="play the video at its own rate, and drop late frames")
    parser.add_argument("--headless", action="store_true", help="print one line each second instead of a window")
    parser.add_argument("--save", type=Path, metavar="out.mp4", help="write the labeled frames to a video")
    parser.add_argument("--max-frames", type=int, metavar="n", help="end after this number of frames")
    parser.add_argument(
        "--crop",
        type=float,
        metavar="fraction",
        help=f"side of the classified square over the shorter side (default: {CROP}; with --folder: the whole image)",
    )
    parser.add_argument("--threads", type=threads_argument, default=1, help="threads of ONNX Runtime (default: 1)")
    arguments = parser.parse_args()
    if arguments.realtime and not arguments.video:
        parser.error("--realtime needs --video")
    if arguments.crop is not None and not 0 < arguments.crop <= 1:
        parser.error("--crop: give more than 0 and at most 1")
    if arguments.save and arguments.video and arguments.save.resolve() == arguments.video.resolve():
        parser.error("--save would overwrite the input video")
    if arguments.camera < 0:
        parser.error("--camera: give 0 or more")
    if arguments.max_frames is not None and arguments.max_frames < 1:
        parser.error("--max-frames: give at least 1")
    return arguments


def main() -> None:
    try:
        wrong = run(parse())
    except NoFrames as error:
        stop(error)
    except KeyboardInterrupt:
        stop("interrupted before the first frame")
    if wrong:
        stop(wrong)


if __name__ == "__main__":
    run_script(main)
