import json
import re
import shutil
import subprocess

import numpy as np
import onnxruntime
import pytest
from PIL import Image
from toy_bundle import device_command, on_device, toy_bundle

from stages.datasets.decode import decode
from stages.edge.device import edgewise_model
from stages.edge.device.edgewise_model import Answer, comparison, confidences, open_model
from stages.export import session
from stages.export.session import open_session, session_logits

TIMES = r", \d+\.\d\d ms preprocess, \d+\.\d\d ms inference"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def changeable(tmp_path):
    return shutil.copytree(toy_bundle(), tmp_path / "bundle")


def rewrite(folder, **changes):
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def expected_answer(path):
    folder = toy_bundle()
    content = json.loads((folder / "bundle.json").read_text())
    pixels, _ = decode(path, content["image_size"], content["geometry"], content["channels"], content["levels"])
    logits = session_logits(open_session(folder / "model.onnx", 1), pixels[None], 1)[0]
    softmax = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    return content["classes"][logits.argmax()], softmax.max()


def test_each_image_gets_one_line_with_label_confidence_and_times(changeable, image):
    label, confidence = expected_answer(image)
    rewrite(changeable, confidence_threshold=0.0)
    done = on_device(changeable, "predict.py", image, image)
    assert (done.returncode, done.stderr) == (0, "")
    line = f"{re.escape(str(image))}: {label} {confidence:.2f}{TIMES}"
    assert re.fullmatch(f"{line}\n{line}\n", done.stdout)


def test_below_the_threshold_the_answer_is_unsure(changeable, image):
    label, confidence = expected_answer(image)
    rewrite(changeable, confidence_threshold=0.999)
    done = on_device(changeable, "predict.py", image)
    guess = f"unsure (best guess {label}, {comparison(confidence, 0.999)})"
    assert done.returncode == 0
    assert re.fullmatch(f"{re.escape(f'{image}: {guess}')}{TIMES}\n", done.stdout)


def test_a_confidence_at_the_threshold_is_answered():
    assert str(Answer("cat", 0.62, 0.62, 1.0)) == "cat 0.62"
    assert str(Answer("cat", 0.41, 0.62, 1.0)) == "unsure (best guess cat, 0.41 < 0.62)"
    assert str(Answer("cat", 0.6199, 0.62, 1.0)) == "unsure (best guess cat, 0.6199 < 0.6200)"


def test_bad_files_get_one_line_each_and_the_others_an_answer(tmp_path, image):
    folder, missing, text, cut = (tmp_path / name for name in ("folder", "missing.jpg", "text.jpg", "cut.jpg"))
    folder.mkdir()
    text.write_text("no image")
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)).save(cut)
    cut.write_bytes(cut.read_bytes()[:1500])
    done = on_device(toy_bundle(), "predict.py", folder, missing, image, text, cut)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 4
    for line, path, reason in zip(
        lines,
        (folder, missing, text, cut),
        ("Is a directory", "No such file or directory", "cannot identify image file", "image file is truncated"),
        strict=True,
    ):
        assert line.startswith(f"{path}: cannot read it: {reason}")
    assert re.fullmatch(f"{re.escape(str(image))}: .*{TIMES}\n", done.stdout)


def test_every_script_refuses_another_model_than_bundle_json_describes(changeable, image):
    with (changeable / "model.onnx").open("ab") as file:
        file.write(b"\0")
    for script, argument in [("predict.py", image), ("bench.py", "--seconds=1"), ("camera.py", f"--folder={image}")]:
        done = on_device(changeable, script, argument)
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"error: .*model\.onnx has sha256 .*: copy the whole bundle again\n", done.stderr)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classes": ["a"] * 9}, "number of classes is 5, but bundle.json has 9"),
        ({"classes": None}, "classes has a wrong type"),
        ({"classes": [1, 2, 3, 4, 5]}, "classes has a wrong type"),
        ({"image_size": 16}, "image size is 24, but bundle.json has 16"),
        ({"image_size": "24"}, "image_size has a wrong type"),
        ({"channels": 1}, "number of channels is 3, but bundle.json has 1"),
        ({"geometry": None}, "geometry has a wrong type"),
        ({"confidence_threshold": None}, "confidence_threshold has a wrong type"),
        ({"versions": {}}, "bundle.json is damaged"),
        (None, "model.onnx: No such file"),
    ],
    ids=str,
)
def test_a_missing_damaged_or_different_file_of_the_bundle_is_refused(changeable, changes, words):
    if changes is None:
        (changeable / "model.onnx").unlink()
    else:
        rewrite(changeable, **changes)
    with pytest.raises(SystemExit, match=rf"^error: .*{words}.*: copy the whole bundle again$"):
        open_model(changeable, 1)


def test_a_missing_module_of_the_bundle_is_not_confused_with_a_package(changeable, image):
    (changeable / "edgewise_decode.py").unlink()
    done = on_device(changeable, "predict.py", image)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*edgewise_decode.*: copy the whole bundle again\n", done.stderr)


def test_a_closed_pipe_ends_the_script_silently(image):
    command = device_command(toy_bundle(), "predict.py", *[image] * 200)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout.readline()
        done.stdout.close()
        assert done.stderr.read() == ""
    assert done.returncode == 141


@pytest.mark.parametrize(
    ("script", "package"),
    [("predict.py", "onnxruntime"), ("predict.py", "PIL"), ("predict.py", "numpy"), ("bench.py", "psutil")],
)
def test_a_missing_package_is_an_error_that_says_what_to_install(script, package, image):
    done = on_device(toy_bundle(), script, *[image] * (script == "predict.py"), blocked=(package,))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: .*{package}.*pip install -r requirements\.txt\n", done.stderr)


def test_an_older_onnx_runtime_is_a_warning(changeable, capsys):
    versions = json.loads((changeable / "bundle.json").read_text())["versions"]
    for version, word in [("999.1", "older than 999.1"), ("1.2", "")]:  # 1.10 and later are newer than 1.2
        rewrite(changeable, versions=versions | {"onnxruntime": version})
        open_model(changeable, 1)
        printed = capsys.readouterr().err
        assert (word in printed) if word else (printed == "")


def test_more_threads_than_cores_are_refused(image):
    done = on_device(toy_bundle(), "predict.py", "--threads=1000", image)
    assert done.returncode == 2
    assert "usable cores" in done.stderr


def test_confidences_are_softmax_and_do_not_overflow():
    logits = np.array([[1.0, 2.0, 0.5], [1000.0, 0.0, 0.0]], np.float32)
    assert confidences(logits)[0] == pytest.approx(np.exp(2) / np.exp([1, 2, 0.5]).sum())
    assert confidences(logits)[1] == 1


def test_the_session_has_the_same_options_as_in_the_pipeline(monkeypatch):
    opened = []

    def record(path, options, providers):
        entries = ["session.intra_op.allow_spinning", "session.inter_op.allow_spinning"]
        plain = {
            name: getattr(options, name)
            for name in dir(options)
            if isinstance(getattr(options, name), (int, str, bool)) or "mode" in name or "level" in name
        }
        opened.append((path, plain, [options.get_session_config_entry(entry) for entry in entries], providers))
        return real(path, options, providers=providers)

    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    open_model(toy_bundle(), 1)
    session.open_session(toy_bundle() / edgewise_model.MODEL, 1)
    assert opened[0] == opened[1]
    assert opened[0][1]["intra_op_num_threads"] == 1
