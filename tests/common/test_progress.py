import io

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from stages.common import progress as module
from stages.common.progress import EpochProgress, count_progress, epoch_progress


def test_outside_a_terminal_each_epoch_is_one_line(capsys):
    with epoch_progress("finetune a", epochs=2, steps_per_epoch=3) as progress:
        for epoch in range(2):
            for _ in range(3):
                progress.step()
            progress.epoch(loss=1.5 - epoch, top1=0.25, balanced_accuracy=0.5, images_per_second=1234.0)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(
        "finetune a: epoch 1/2 loss 1.500 validation top-1 25.00 %, balanced 50.00 % 1,234 images/s"
    )
    assert lines[1].endswith("0:00 left")


def test_in_a_terminal_the_bar_shows_epoch_figures_and_time_left():
    screen = io.StringIO()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(file=screen, force_terminal=True, width=160)) as bar:
        progress = EpochProgress("finetune a", 4, 10, done=1, small=(0, 1), bar=bar)
        texts = [bar.tasks[0].fields["text"]]
        for top1 in (0.75, 1.0):
            for _ in range(10):
                progress.step()
                texts.append(bar.tasks[0].fields["text"])
            progress.epoch(loss=0.5, top1=top1, balanced_accuracy=top1, images_per_second=10.0)
            texts.append(bar.tasks[0].fields["text"])
        assert bar.tasks[0].completed == 30
    assert len({len(text) for text in texts}) == 1  # a constant width keeps the bar's width
    assert texts[11].startswith("epoch 2/4 loss 0.500 validation top-1 75.00 %")
    assert texts[22].startswith("epoch 3/4 loss 0.500 validation top-1 100.00 %")
    assert texts[22] in screen.getvalue()
    assert "left" in screen.getvalue()


def test_the_time_left_counts_epochs_with_small_images_by_their_cost(capsys, monkeypatch):
    clock = iter([0.0, 10.0, 20.0, 30.0, 70.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with epoch_progress("finetune a", epochs=5, steps_per_epoch=1, small=(3.0, 0.25)) as progress:
        for _ in range(4):
            progress.epoch(loss=1.0, top1=0.5, balanced_accuracy=0.5, images_per_second=1.0)
    ends = [line.split()[-2] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["1:40", "1:30", "1:20", "0:40"]


def test_outside_a_terminal_a_search_prints_occasional_lines(capsys, monkeypatch):
    clock = iter(range(0, 1000, 8))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(module, "LINE_SECONDS", 20)
    with count_progress("quantize a", total=10, unit="evaluation") as step:
        for figure in "abcdefghij":
            step(f"best loss {figure}")
    lines = capsys.readouterr().out.splitlines()
    assert 2 <= len(lines) < 6
    assert lines[0].startswith("quantize a: evaluation  ")
    assert " best loss " in lines[0]
    assert lines[0].endswith(" left")


def test_in_a_terminal_a_search_has_a_bar_that_ends_full(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(module, "Console", lambda: console)
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
    with count_progress("quantize a", total=3, unit="evaluation") as step:
        for _ in range(3):
            step("best loss 0.5")
    assert "evaluation 3/3 best loss 0.5" in screen.getvalue()
    assert "0:00 left" in screen.getvalue()
