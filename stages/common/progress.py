"""Progress of a training or a search: a live bar in a terminal, lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

FIGURES_WIDTH = len("loss 0.123 validation top-1 100.00 %, balanced 100.00 %")
LEFT_WIDTH = len("123:45 left")
LINE_SECONDS = 20.0
"""Minimum time between the lines of a search outside a terminal."""


class EpochProgress:
    """Call `step` after each step and `epoch` after each epoch; `kept` is the number of epochs in a checkpoint."""

    def __init__(
        self, title: str, epochs: int, steps_per_epoch: int, done: int, small: tuple[float, float], bar: Progress | None
    ) -> None:
        self.title, self.epochs, self.steps, self.done, self._bar = title, epochs, steps_per_epoch, done, bar
        self._small = small
        self.kept = done
        self._started, self._done_before, self._figures = time.monotonic(), done, ""
        if bar is not None:
            self._task = bar.add_task(title, total=epochs * steps_per_epoch, completed=done * steps_per_epoch, text="")
            bar.update(self._task, text=self._text(done + 1))

    def step(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)
            self._bar.update(self._task, text=self._text(self.done + 1))

    def epoch(self, loss: float, top1: float, balanced_accuracy: float, images_per_second: float) -> None:
        self.done += 1
        top1_text, balanced_text = (f"{100 * fraction:.2f} %" for fraction in (top1, balanced_accuracy))
        self._figures = f"loss {loss:.3f} validation top-1 {top1_text}, balanced {balanced_text}"
        if self._bar is None:
            speed = f"{images_per_second:,.0f} images/s"
            line = f"epoch {self.done}/{self.epochs} {self._figures} {speed} {self._left()}"
            print(f"{self.title}: {line}", flush=True)
        else:
            self._bar.update(self._task, text=self._text(self.done))

    def _text(self, epoch: int) -> str:
        """The text beside the bar. Its width is constant, because it determines the width of the bar."""
        number = f"{epoch:>{len(str(self.epochs))}}/{self.epochs}"
        return f"epoch {number} {self._figures:<{FIGURES_WIDTH}} {self._left():>{LEFT_WIDTH}}"

    def _left(self) -> str:
        completed = self.done if self._bar is None else self._bar.tasks[self._task].completed / self.steps
        if completed <= self._done_before:
            return ""
        per_work = (time.monotonic() - self._started) / (self._work(completed) - self._work(self._done_before))
        return _left(per_work * (self._work(self.epochs) - self._work(completed)))

    def _work(self, epochs: float) -> float:
        """The cost of the first `epochs`, in epochs at full image size."""
        count, cost = self._small
        return min(epochs, count) * cost + max(0.0, epochs - count)


@contextmanager
def epoch_progress(
    title: str, epochs: int, steps_per_epoch: int, done: int = 0, small: tuple[float, float] = (0, 1)
) -> Iterator[EpochProgress]:
    """Progress over `epochs`, of which an earlier process finished `done`.

    Args:
        small: the number of first epochs with smaller images, and their time as a fraction of a later epoch's time.
    """
    if not sys.stdout.isatty():
        yield EpochProgress(title, epochs, steps_per_epoch, done, small, None)
        return
    with _bar() as bar:
        yield EpochProgress(title, epochs, steps_per_epoch, done, small, bar)


@contextmanager
def count_progress(title: str, total: int, unit: str) -> Iterator[Callable[[str], None]]:
    """Progress over `total` parts of similar length. Call the yielded function after each, with a figure to show."""
    started, printed, done = time.monotonic(), time.monotonic(), 0

    def text(figure: str) -> str:
        left = _left((time.monotonic() - started) / done * (total - done)) if done else ""
        return f"{unit} {done:>{len(str(total))}}/{total} {figure} {left:>{LEFT_WIDTH}}"

    def step(figure: str) -> None:
        nonlocal printed, done
        done += 1
        if bar is not None:
            bar.update(task, completed=done, text=text(figure))
        elif time.monotonic() - printed >= LINE_SECONDS:
            printed = time.monotonic()
            print(f"{title}: {text(figure)}", flush=True)

    if not sys.stdout.isatty():
        bar = None
        yield step
        return
    with _bar() as bar:
        task = bar.add_task(title, total=total, text=text(""))
        yield step


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    return Progress(*columns, console=Console(), refresh_per_second=4)


def _left(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d} left"
