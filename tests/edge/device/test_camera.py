import re
import signal
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from toy_bundle import device_command, on_device, toy_bundle, write_video

from stages.datasets.decode import decode
from stages.edge.device.edgewise_model import confidences
from stages.export.session import open_session, session_logits

SUMMARY = r"(\d+) frames in [\d.]+ s, [\d.]+ frames/s, (\d+) dropped, (\d+) unsure\np50 of each part: (.*)\n"


def summary_of(done):
    assert (done.returncode, done.stderr) == (0, "")
    frames, dropped, unsure, times = re.search(SUMMARY, done.stdout).groups()
    return int(frames), int(dropped), int(unsure), times


def test_every_frame_of_a_video_is_classified(tmp_path):
    done = on_device(toy_bundle(), "camera.py", "--headless", "--video", write_video(tmp_path / "a.mp4", 30))
    frames, dropped, unsure, times = summary_of(done)
    assert (frames, dropped) == (30, 0)
    assert 0 <= unsure <= 30
    assert [part.split()[0] for part in times.split(", ")] == ["decode", "resize", "inference"]


def test_labeled_frames_are_saved_and_their_drawing_is_timed(tmp_path):
    video, out = write_video(tmp_path / "a.mp4", 12), tmp_path / "out.mp4"
    done = on_device(toy_bundle(), "camera.py", "--headless", "--video", video, "--save", out, "--max-frames", 7)
    frames, _, _, times = summary_of(done)
    assert frames == 7
    assert [part.split()[0] for part in times.split(", ")] == ["decode", "resize", "inference", "drawing"]
    capture = cv2.VideoCapture(str(out))
    pictures = []
    while (read := capture.read())[0]:
        pictures.append(read[1])
    assert len(pictures) == 7
    assert pictures[0].shape == (64, 96, 3)
    assert pictures[0].std() > 10  # the frames are plain, so the label was drawn


def test_a_folder_is_classified_like_predict_and_other_files_are_left_out(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(generator.integers(0, 256, (30, 40 + number, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    done = on_device(toy_bundle(), "camera.py", "--headless", "--folder", tmp_path)
    assert done.returncode == 1  # like predict.py
    assert re.search(SUMMARY, done.stdout)[1] == "3"
    assert re.fullmatch(r".*notes\.txt: left out: .*\nerror: 1 files of .* were left out\n", done.stderr)
    predicted = on_device(toy_bundle(), "predict.py", *sorted(tmp_path.glob("*.png"))).stdout
    assert re.search(SUMMARY, done.stdout)[3] == str(predicted.count("unsure"))


def test_realtime_plays_a_video_at_its_rate_and_prints_a_line_each_second(tmp_path):
    video = write_video(tmp_path / "a.mp4", 12, rate=8)
    done = on_device(toy_bundle(), "camera.py", "--headless", "--realtime", "--video", video)
    frames, dropped, _, _ = summary_of(done)
    assert frames + dropped == 12
    assert float(re.search(r"frames in ([\d.]+) s", done.stdout)[1]) >= 11 / 8 - 0.1
    lines = [line for line in done.stdout.splitlines() if re.match(r"1 s: [\d.]+ frames/s, .*, \d+ dropped$", line)]
    assert len(lines) == 1


@pytest.mark.parametrize("crop", [1.0, 0.5])
def test_a_frame_is_classified_whole_in_the_recorded_geometry_or_by_its_middle(crop):
    frame = np.random.default_rng(0).integers(0, 256, (8, 12, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    code = (
        f"import sys; sys.path.insert(0, {str(toy_bundle())!r})\n"
        "import numpy as np\nfrom pathlib import Path\nfrom camera import Frame, Screen, Tally, classify, open_model\n"
        "frame = np.frombuffer(sys.stdin.buffer.read(), np.uint8).reshape(64, 96, 3)\n"
        f"model, tally = open_model(Path({str(toy_bundle())!r}), 1), Tally()\n"
        f"classify(model, Frame(frame, 0.0), {crop}, Screen(False, None, 25.0), tally)\n"
        "print(tally.last.label, tally.last.confidence)\n"
    )
    bgr = np.ascontiguousarray(frame[..., ::-1])
    done = subprocess.run([sys.executable, "-I", "-c", code], input=bgr.tobytes(), capture_output=True, check=True)
    part = frame if crop == 1 else frame[16:48, 24:72]
    pixels, _ = decode(np.ascontiguousarray(part), 24, "crop", 3)
    logits = session_logits(open_session(toy_bundle() / "model.onnx", 1), pixels[None], 1)
    label, confidence = done.stdout.decode().split()
    assert label == ["zero", "one", "two", "three", "four"][logits.argmax()]
    assert float(confidence) == pytest.approx(confidences(logits)[0])


@pytest.mark.parametrize(
    ("options", "view", "shown"), [([], "crop", (64, 64)), (["--crop", 0.5], "crop of the middle 50 %", (32, 32))]
)
def test_the_first_line_and_the_drawn_frame_say_what_is_classified(tmp_path, options, view, shown):
    video, out = write_video(tmp_path / "a.mp4", 2), tmp_path / "out.mp4"
    done = on_device(toy_bundle(), "camera.py", "--headless", "--video", video, "--save", out, *options)
    assert done.stdout.splitlines()[0] == f"toy-none-int8: geometry {view}"
    drawn = cv2.VideoCapture(str(out)).read()[1].astype(int)
    rectangle = np.abs(drawn[32] - drawn[32, 48]).max(1) > 40  # the row in the middle crosses its two sides
    sides = np.flatnonzero(rectangle)
    assert (sides.max() - sides.min(), shown[0]) == (pytest.approx(shown[1], abs=3), shown[1])


def test_an_interruption_prints_the_summary(tmp_path):
    video = write_video(tmp_path / "a.mp4", 100, rate=5)
    command = device_command(toy_bundle(), "camera.py", "--headless", "--realtime", "--video", video)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        geometry, first = process.stdout.readline(), process.stdout.readline()
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=20)
    assert geometry == "toy-none-int8: geometry crop\n"
    assert first.startswith("1 s: ")
    assert (process.returncode, errors) == (0, "")
    assert 1 <= int(re.search(SUMMARY, rest)[1]) < 100


@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        ("--camera", "63", r"camera 63 cannot be opened"),
        ("--video", "missing.mp4", r"missing\.mp4: no such file"),
        ("--video", "text.mp4", r"text\.mp4 cannot be opened as a video"),
        ("--video", "nothing.mp4", r"nothing\.mp4 (cannot be opened as a video|contains no frames)"),
        ("--video", "empty", r"empty: a folder, not a video"),
        ("--folder", "empty", r"empty contains no image"),
        ("--folder", "missing", r"missing: no such folder"),
        ("--folder", "text.mp4", r"text\.mp4: a file, not a folder"),
    ],
)
def test_a_source_without_frames_is_an_error_in_one_line(tmp_path, option, name, reason):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    write_video(tmp_path / "nothing.mp4", 0)
    value = name if option == "--camera" else tmp_path / name
    done = on_device(toy_bundle(), "camera.py", "--headless", option, value)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: .*{reason}.*\n", done.stderr)


def test_a_missing_opencv_or_display_is_an_error_with_the_remedy(tmp_path):
    done = on_device(toy_bundle(), "camera.py", "--headless", blocked=("cv2",))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*cv2.*: pip install -r requirements-camera\.txt\n", done.stderr)
    done = on_device(toy_bundle(), "camera.py", "--video", write_video(tmp_path / "a.mp4", 2))
    assert done.returncode == 1
    assert "add --headless" in done.stderr


def test_a_video_is_not_saved_over_itself_or_into_a_missing_folder(tmp_path):
    video = write_video(tmp_path / "a.mp4", 2)
    content = video.read_bytes()
    done = on_device(toy_bundle(), "camera.py", "--headless", "--video", video, "--save", tmp_path / "." / "a.mp4")
    assert (done.returncode, video.read_bytes()) == (2, content)
    done = on_device(toy_bundle(), "camera.py", "--headless", "--video", video, "--save", tmp_path / "none" / "a.mp4")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .* cannot be written: .*\n", done.stderr)


@pytest.mark.parametrize("wrong", ["--camera=-1", "--crop=0", "--crop=1.5", "--max-frames=0", "--realtime"])
def test_impossible_options_are_refused(wrong):
    assert on_device(toy_bundle(), "camera.py", "--headless", wrong).returncode == 2
