"""Progress of a training: a live bar in a terminal, one line for each epoch elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class EpochProgress:
    """Call `step` after each step and `epoch` after each epoch."""

    def __init__(self, title: str, epochs: int, steps_per_epoch: int, done: int, bar: Progress | None) -> None:
        self.title, self.epochs, self.steps, self.done, self._bar = title, epochs, steps_per_epoch, done, bar
        self._started, self._done_before, self._figures = time.monotonic(), done, ""
        if bar is not None:
            self._task = bar.add_task(title, total=epochs * steps_per_epoch, completed=done * steps_per_epoch, text="")

    def step(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)
            self._bar.update(self._task, text=f"epoch {self.done + 1}/{self.epochs} {self._figures} {self._left()}")

    def epoch(self, loss: float, top1: float, images_per_second: float) -> None:
        self.done += 1
        self._figures = f"loss {loss:.3f} validation top-1 {100 * top1:.2f} %"
        line = f"epoch {self.done}/{self.epochs} {self._figures} {images_per_second:,.0f} images/s {self._left()}"
        if self._bar is None:
            print(f"{self.title}: {line}", flush=True)
        else:
            self._bar.update(self._task, text=line)

    def _left(self) -> str:
        completed = self.done
        if self._bar is not None:
            completed = self._bar.tasks[self._task].completed / self.steps
        if completed <= self._done_before:
            return ""
        per_epoch = (time.monotonic() - self._started) / (completed - self._done_before)
        minutes, seconds = divmod(round(per_epoch * (self.epochs - completed)), 60)
        return f"{minutes}:{seconds:02d} left"


@contextmanager
def epoch_progress(title: str, epochs: int, steps_per_epoch: int, done: int = 0) -> Iterator[EpochProgress]:
    """Progress over `epochs`, of which `done` were finished by an earlier process."""
    if not sys.stdout.isatty():
        yield EpochProgress(title, epochs, steps_per_epoch, done, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(), refresh_per_second=4) as bar:
        yield EpochProgress(title, epochs, steps_per_epoch, done, bar)
