"""Classify the frames of a camera, a video file or a folder of images.

    python camera.py [--camera 0 | --video file | --folder dir] [--headless] [--save out.mp4]

The script brings whole frames to the model's input as predict.py does, with the geometry in `bundle.json`; its first
line and each drawn frame name it. To point at something, --crop 0.7 takes the middle of a frame alone. The script drops
and counts the camera frames that arrive while it is busy. It drops no frame of a video or a folder, unless --realtime
plays the video at its own rate. Ctrl-C, q or Escape end the script, and it prints a summary.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

try:
    import cv2
    import numpy as np
    from edgewise_decode import decode, to_rgb
    from edgewise_frames import Frame, NewestFrames, NoFrames, center, frames_of, open_video
    from edgewise_model import Answer, Model, open_model, reason_of, run_script, stop, threads_argument
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
    printed: tuple[float, int] | None = None  # time and number of frames of the last line

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

    def print_line(self, dropped: int) -> None:
        """One line each second, where there is no window."""
        now, (before, frames) = time.monotonic(), self.printed or (self.started, 0)
        if now - before >= 1:
            rate = (self.frames - frames) / (now - before)
            line = f"{now - self.started:.0f} s: {rate:.1f} frames/s, {self.last}, {self.times(frames)}"
            print(f"{line}, {dropped} dropped", flush=True)
            self.printed = now, self.frames

    def summary(self, dropped: int) -> str:
        seconds = time.monotonic() - self.started
        return (
            f"{self.frames} frames in {seconds:.1f} s, {self.frames / seconds:.1f} frames/s, {dropped} dropped,"
            f" {self.unsure} unsure\np50 of each part: {self.times() or 'no frames'}"
        )


def folder_frames(folder: Path, left_out: list[Path]) -> Iterator[Frame]:
    """The images of a folder in the order of their names, upright; other files are named and added to `left_out`."""
    if not folder.is_dir():
        raise NoFrames(f"{folder}: {'a file, not a folder' if folder.exists() else 'no such folder'}")
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        started = time.perf_counter_ns()
        try:
            with Image.open(path) as image:
                image.load()
                rgb = np.asarray(to_rgb(ImageOps.exif_transpose(image)))
        except Exception as error:  # errors of Pillow have no common class
            print(f"{path}: left out: {reason_of(error, path)}", file=sys.stderr)
            left_out.append(path)
            continue
        yield Frame(np.ascontiguousarray(rgb[..., ::-1]), (time.perf_counter_ns() - started) / 1e6)


def view_of(model: Model, crop: float) -> str:
    """What the model sees of a frame."""
    return model.bundle.geometry + ("" if crop == 1 else f" of the middle {100 * crop:g} %")


def draw(pixels: np.ndarray, seen: tuple[slice, slice], view: str, answer: Answer) -> np.ndarray:
    """A copy of a frame with the label, a rectangle around what the model sees, and the name of that view."""
    drawn, colour = pixels.copy(), SURE if answer.sure else UNSURE
    rows, columns = seen
    cv2.rectangle(drawn, (columns.start, rows.start), (columns.stop - 1, rows.stop - 1), colour, 1)
    text = f"{answer.label if answer.sure else f'{answer.label}?'} {answer.confidence:.2f}"
    scale = max(0.4, min(pixels.shape[:2]) / 600)
    left, lowest = max(2, columns.start), len(pixels) - 4
    for line, place in ((text, (left, max(round(24 * scale), rows.start - 4))), (view, (left, lowest))):
        for thick, ink in ((round(4 * scale) + 1, (0, 0, 0)), (round(2 * scale), colour)):  # outlined
            cv2.putText(drawn, line, place, cv2.FONT_HERSHEY_SIMPLEX, scale, ink, max(1, thick), cv2.LINE_AA)
    return drawn


class Screen:
    """The output of drawn frames: a window, a video file, both, or neither."""

    def __init__(self, window: bool, save: Path | None, frames_per_second: float) -> None:
        self.window, self.save, self.rate = window, save, frames_per_second
        self.wanted = window or save is not None
        self.writer: cv2.VideoWriter | None = None
        if window and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
            stop("there is no display for a window: add --headless")  # Qt would abort the process
        try:
            if window:
                cv2.namedWindow("edgewise")
        except cv2.error:
            stop("this OpenCV cannot open windows: add --headless, or install opencv-python instead")

    def show(self, drawn: np.ndarray) -> bool:
        """Returns False if the user wants to stop."""
        if self.save is not None:
            if self.writer is None:
                self.size = drawn.shape[1], drawn.shape[0]
                self.writer = cv2.VideoWriter(str(self.save), cv2.VideoWriter.fourcc(*"mp4v"), self.rate, self.size)
                if not self.writer.isOpened():
                    stop(f"{self.save} cannot be written: does the folder exist, and does the name end in .mp4?")
            self.writer.write(cv2.resize(drawn, self.size))  # the images of a folder differ in size
        if not self.window:
            return True
        cv2.imshow("edgewise", drawn)
        return cv2.waitKey(1) & 0xFF not in (ord("q"), 27)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.release()
        if self.window:
            cv2.destroyAllWindows()


def classify(model: Model, frame: Frame, crop: float, screen: Screen, tally: Tally) -> bool:
    """Classify a frame, show and count it; returns False if the user wants to stop."""
    times, bundle = [time.perf_counter_ns()], model.bundle
    part = cv2.cvtColor(frame.pixels[center(frame.pixels, crop)], cv2.COLOR_BGR2RGB)
    pixels, _ = decode(part, bundle.image_size, bundle.geometry, bundle.channels)
    times.append(time.perf_counter_ns())
    answer = model.answer(pixels)
    times.append(time.perf_counter_ns())
    keep_going = True
    if screen.wanted:
        seen = center(frame.pixels, crop, square=bundle.geometry == "crop")
        keep_going = screen.show(draw(frame.pixels, seen, view_of(model, crop), answer))
    times.append(time.perf_counter_ns())
    resize_ms, inference_ms, drawing_ms = (np.diff(times) / 1e6).tolist()
    drawing = {"drawing": drawing_ms} if screen.wanted else {}
    tally.add(answer, decode=frame.decode_ms, resize=resize_ms, inference=inference_ms, **drawing)
    return keep_going


def run(arguments: argparse.Namespace) -> str | None:
    """Classify until the end, print the summary, and return a message if something went wrong."""
    model = open_model(Path(__file__).parent, arguments.threads)
    source: int | Path = arguments.folder or arguments.video or arguments.camera
    live, rate, crop = None, DEFAULT_RATE, arguments.crop
    left_out: list[Path] = []
    capture = None if arguments.folder else open_video(source)
    if capture is not None:
        rate = capture.get(cv2.CAP_PROP_FPS) or DEFAULT_RATE
    screen = Screen(not arguments.headless, arguments.save, rate)
    if capture is None:
        frames: Iterable[Frame] = folder_frames(arguments.folder, left_out)
    elif arguments.video and not arguments.realtime:
        frames = frames_of(capture)
    else:
        frames = live = NewestFrames(capture, rate if arguments.video else 0.0)
    tally, ended = Tally(), False
    try:
        for frame in frames:
            keep_going = classify(model, frame, crop, screen, tally)
            if tally.frames == 1:
                print(f"{model.bundle.variant}: geometry {view_of(model, crop)}", flush=True)
            if arguments.headless:
                tally.print_line(live.dropped if live else 0)
            if not keep_going or tally.frames == arguments.max_frames:
                break
        else:
            ended = True
    except KeyboardInterrupt:
        pass  # the usual way to end a camera
    finally:
        screen.close()
        if live:
            live.close()
    if ended and not tally.frames:
        if isinstance(source, int):
            return f"camera {source} gives no frames"
        return f"{source} contains no {'image' if arguments.folder else 'frames'}"
    print(tally.summary(live.dropped if live else 0))
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
    text = "use the middle of each frame alone, with this fraction of its sides (default: 1, the whole frame)"
    parser.add_argument("--crop", type=float, default=1.0, metavar="fraction", help=text)
    parser.add_argument("--threads", type=threads_argument, default=1, help="threads of ONNX Runtime (default: 1)")
    arguments = parser.parse_args()
    if arguments.realtime and not arguments.video:
        parser.error("--realtime needs --video")
    if not 0 < arguments.crop <= 1:
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
        if wrong := run(parse()):
            stop(wrong)
    except NoFrames as error:
        stop(error)
    except KeyboardInterrupt:
        stop("interrupted before the first frame")


if __name__ == "__main__":
    run_script(main)
