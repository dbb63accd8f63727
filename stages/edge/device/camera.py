"""Classify live: a camera, a video file or a folder of images.

    python camera.py [--camera 0 | --video file | --folder dir] [--headless] [--save out.mp4]

The square in the middle of the picture is classified; of a folder's images the whole, as predict.py does. A camera's
frames that came while the last one was being worked on are dropped and counted; of a video or a folder none is, unless
--realtime plays the video at its own rate. Ctrl-C, q or Escape end it, with a summary.
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
    from edgewise_frames import CROP, Frame, NewestFrames, NoFrames, centre_square, frames_of, open_video
    from edgewise_model import Answer, Model, open_model, run_script, stop, threads_argument
    from PIL import Image, ImageOps
except ImportError as missing:
    own = str(missing.name).startswith("edgewise_")
    sys.exit(f"error: {missing}: {'copy the whole bundle again' if own else 'pip install -r requirements-camera.txt'}")

PARTS = ("decode", "resize", "inference", "drawing")
SURE, UNSURE = (80, 200, 80), (60, 160, 240)  # BGR
FALLBACK_RATE = 25.0  # frames per second, where a source does not tell its own


@dataclass
class Tally:
    """What was seen, and how long each part of the work took."""

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
        """p50 of each part over the frames from number `since` on; a part that was not done is left out."""
        p50 = {part: np.median(values[since:]) for part, values in self.times_ms.items() if values[since:]}
        return ", ".join(f"{part} {value:.2f} ms" for part, value in p50.items())


class Lines:
    """One line a second, for where there is no window."""

    def __init__(self, tally: Tally) -> None:
        self.tally, self.told, self.frames = tally, tally.started, 0

    def frame(self, dropped: int) -> None:
        now = time.monotonic()
        if now - self.told < 1:
            return
        rate = (self.tally.frames - self.frames) / (now - self.told)
        print(
            f"{now - self.tally.started:.0f} s: {rate:.1f} frames/s, {self.tally.last},"
            f" {self.tally.times(self.frames)}, {dropped} dropped",
            flush=True,
        )
        self.told, self.frames = now, self.tally.frames


def summary(tally: Tally, dropped: int) -> str:
    seconds = time.monotonic() - tally.started
    return (
        f"{tally.frames} frames in {seconds:.1f} s, {tally.frames / seconds:.1f} frames/s, {dropped} dropped,"
        f" {tally.unsure} unsure\np50 of each part: {tally.times() or 'nothing was done'}"
    )


def folder_frames(folder: Path, left_out: list[Path]) -> Iterator[Frame]:
    """The images of a folder in the order of their names, upright and as RGB at first; the rest is named and left out.

    Args:
        left_out: is told the files that are no images.

    Raises:
        NoFrames: if the folder is missing, or no file of it is an image.
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
        except Exception as error:  # Pillow's errors have no common class
            reason = " ".join(str(error).split()).replace(f" {str(path)!r}", "") or type(error).__name__
            print(f"{path}: left out: {reason}", file=sys.stderr)
            left_out.append(path)
            continue
        found = True
        yield Frame(np.ascontiguousarray(rgb[..., ::-1]), (time.perf_counter_ns() - started) / 1e6)
    if not found:
        raise NoFrames(f"{folder} holds no image")


def draw(pixels: np.ndarray, square: tuple[slice, slice], answer: Answer) -> np.ndarray:
    """A copy of a frame with the label, and the square that was classified."""
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
    """Where drawn frames go: a window, a video file, both, or nowhere."""

    def __init__(self, window: bool, save: Path | None, frames_per_second: float) -> None:
        self.window, self.save, self.rate = window, save, frames_per_second
        self.writer: cv2.VideoWriter | None = None
        if window and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
            stop("there is no display for a window: add --headless")  # Qt would end the process
        if window:
            try:
                cv2.namedWindow("edgewise")
            except cv2.error:
                stop("this OpenCV opens no windows: add --headless, or install opencv-python in its place")

    @property
    def wanted(self) -> bool:
        return self.window or self.save is not None

    def show(self, drawn: np.ndarray) -> bool:
        """False where the user wants to stop."""
        if self.save is not None:
            height, width = drawn.shape[:2]
            if self.writer is None:
                code = cv2.VideoWriter_fourcc(*"mp4v")
                self.size = (width, height)
                self.writer = cv2.VideoWriter(str(self.save), code, self.rate, self.size)
                if not self.writer.isOpened():
                    stop(f"{self.save} cannot be written: is the folder there, and does the name end in .mp4?")
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
    """Work on one frame after the other and call `after` each; whether the frames came to their own end."""
    for frame in frames:
        times = [time.perf_counter_ns()]
        square = centre_square(frame.pixels, crop) if crop else whole(frame.pixels)
        rgb = np.ascontiguousarray(frame.pixels[square][..., ::-1])
        pixels, _ = decode(rgb, model.bundle.image_size)
        times.append(time.perf_counter_ns())
        answer = model.answer(pixels)
        times.append(time.perf_counter_ns())
        going_on = screen.show(draw(frame.pixels, square, answer)) if screen.wanted else True
        times.append(time.perf_counter_ns())
        resize_ms, inference_ms, drawing_ms = (np.diff(times) / 1e6).tolist()
        tally.add(answer, decode=frame.decode_ms, resize=resize_ms, inference=inference_ms)
        if screen.wanted:
            tally.times_ms["drawing"].append(drawing_ms)
        after()
        if not going_on or tally.frames == most:
            return False
    return True


def whole(pixels: np.ndarray) -> tuple[slice, slice]:
    height, width = pixels.shape[:2]
    return slice(0, height), slice(0, width)


def run(arguments: argparse.Namespace) -> str | None:
    """Classify until the end, print the summary, and return what was wrong, if anything.

    Raises:
        NoFrames: if the source cannot be opened.
    """
    model = open_model(Path(__file__).parent, arguments.threads)
    source: int | Path = arguments.folder or arguments.video or arguments.camera
    capture, live, rate, crop = None, None, FALLBACK_RATE, arguments.crop
    if not arguments.folder:
        capture = open_video(source)
        rate, crop = capture.get(cv2.CAP_PROP_FPS) or FALLBACK_RATE, crop or CROP
    screen, left_out = Screen(not arguments.headless, arguments.save, rate), []
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
        pass  # how a camera is meant to be ended
    finally:
        screen.close()
        if live:
            live.close()
    if ended and not tally.frames:
        return f"{source} gives no frame" if arguments.video else f"camera {source} gives no frame"
    print(summary(tally, dropped()))
    if ended and live and not arguments.video:
        return f"camera {source} gives no more frames: was it unplugged?"
    return f"{len(left_out)} files of {source} were left out" if left_out else None


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument("--camera", type=int, default=0, metavar="number", help="(default: 0)")
    sources.add_argument("--video", type=Path, metavar="file")
    sources.add_argument("--folder", type=Path, metavar="dir")
    parser.add_argument("--realtime", action="store_true", help="play the video at its own rate, and drop what is late")
    parser.add_argument("--headless", action="store_true", help="no window: one line a second")
    parser.add_argument("--save", type=Path, metavar="out.mp4", help="write the pictures with their labels")
    parser.add_argument("--max-frames", type=int, metavar="n", help="end after so many")
    parser.add_argument(
        "--crop",
        type=float,
        metavar="share",
        help=f"side of the square that is classified over the shorter side (default: {CROP}; a folder's images: whole)",
    )
    parser.add_argument("--threads", type=threads_argument, default=1, help="of ONNX Runtime (default: 1)")
    arguments = parser.parse_args()
    if arguments.realtime and not arguments.video:
        parser.error("--realtime goes with --video")
    if arguments.crop is not None and not 0 < arguments.crop <= 1:
        parser.error("--crop: more than 0 and at most 1")
    if arguments.save and arguments.video and arguments.save.resolve() == arguments.video.resolve():
        parser.error("--save would overwrite the video that is played")
    if arguments.camera < 0:
        parser.error("--camera: 0 or more")
    if arguments.max_frames is not None and arguments.max_frames < 1:
        parser.error("--max-frames: at least 1")
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
