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
from stages.edge.device.edgewise_model import Answer, as_read, confidences, open_model
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
    told = json.loads((folder / "bundle.json").read_text())
    logits = session_logits(open_session(folder / "model.onnx", 1), decode(path, told["image_size"])[0][None], 1)[0]
    softmax = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    return told["classes"][logits.argmax()], softmax.max()


def test_each_image_gets_one_line_with_label_confidence_and_times(changeable, image):
    label, confidence = expected_answer(image)
    rewrite(changeable, confidence_threshold=0.0)
    done = on_device(changeable, "predict.py", image, image)
    assert (done.returncode, done.stderr) == (0, "")
    line = f"{re.escape(str(image))}: {label} {confidence:.2f}{TIMES}"
    assert re.fullmatch(f"{line}\n{line}\n", done.stdout)


def test_what_is_under_the_threshold_is_not_answered(changeable, image):
    label, confidence = expected_answer(image)
    rewrite(changeable, confidence_threshold=0.999)
    done = on_device(changeable, "predict.py", image)
    guess = f"unsure (best guess {label}, {as_read(confidence, 0.999)})"
    assert done.returncode == 0
    assert re.fullmatch(f"{re.escape(f'{image}: {guess}')}{TIMES}\n", done.stdout)


def test_the_threshold_itself_is_sure():
    assert str(Answer("cat", 0.62, 0.62, 1.0)) == "cat 0.62"
    assert str(Answer("cat", 0.41, 0.62, 1.0)) == "unsure (best guess cat, 0.41 < 0.62)"
    assert str(Answer("cat", 0.6199, 0.62, 1.0)) == "unsure (best guess cat, 0.6199 < 0.6200)"


def test_bad_files_get_one_line_each_and_the_others_their_answer(tmp_path, image):
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
        assert line.startswith(f"{path}: cannot be read: {reason}")
    assert re.fullmatch(f"{re.escape(str(image))}: .*{TIMES}\n", done.stdout)


def test_another_model_than_bundle_json_describes_is_refused(changeable, image):
    with (changeable / "model.onnx").open("ab") as file:
        file.write(b"\0")
    for script, argument in [("predict.py", image), ("bench.py", "--seconds=1"), ("camera.py", f"--folder={image}")]:
        done = on_device(changeable, script, argument)
        assert done.returncode == 1
        assert done.stdout == ""
        assert re.fullmatch(
            r"error: .*model\.onnx has sha256 .*, bundle\.json says .*: it is not the model.*\n", done.stderr
        )


def test_a_missing_or_damaged_file_of_the_bundle_is_named(changeable, image):
    (changeable / "model.onnx").unlink()
    done = on_device(changeable, "predict.py", image)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "model.onnx: No such file" in done.stderr
    (changeable / "bundle.json").write_text('{"variant": "toy"}')
    done = on_device(changeable, "predict.py", image)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "bundle.json is damaged" in done.stderr


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("classes", ["a"] * 9, "has 5 as its classes, bundle.json 9: copy the whole bundle again"),
        ("classes", None, "classes is of another kind than it must be"),
        ("classes", [1, 2, 3, 4, 5], "classes is of another kind"),
        ("image_size", 16, "has 24 as its images of side, bundle.json 16"),
        ("image_size", "24", "image_size is of another kind"),
        ("confidence_threshold", None, "confidence_threshold is of another kind"),
    ],
)
def test_a_bundle_json_that_does_not_fit_the_model_is_refused_by_every_script(changeable, image, key, value, words):
    rewrite(changeable, **{key: value})
    for script, argument in [("predict.py", image), ("bench.py", "--seconds=1"), ("camera.py", f"--folder={image}")]:
        done = on_device(changeable, script, argument)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
        assert words in done.stderr


def test_a_missing_module_of_the_bundle_is_not_taken_for_a_package(changeable, image):
    (changeable / "edgewise_decode.py").unlink()
    done = on_device(changeable, "predict.py", image)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: .*edgewise_decode.*: copy the whole bundle again\n", done.stderr)


def test_a_reader_that_has_had_enough_ends_it_without_a_word(image):
    command = [*device_command(toy_bundle(), "predict.py", *[image] * 200)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout.readline()
        done.stdout.close()
        assert done.stderr.read() == ""
    assert done.returncode == 141


@pytest.mark.parametrize("package", ["onnxruntime", "PIL", "numpy"])
def test_a_missing_package_ends_with_what_to_install(package, image):
    done = on_device(toy_bundle(), "predict.py", image, blocked=(package,))
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(rf"error: .*{package}.*pip install -r requirements\.txt\n", done.stderr)


def test_an_older_onnx_runtime_is_only_warned_of(changeable, image):
    versions = json.loads((changeable / "bundle.json").read_text())["versions"]
    rewrite(changeable, versions=versions | {"onnxruntime": "999.1"})
    done = on_device(changeable, "predict.py", image)
    assert done.returncode == 0
    assert re.fullmatch(r"warning: ONNX Runtime .* is older than 999\.1.*\n", done.stderr)
    rewrite(changeable, versions=versions | {"onnxruntime": "1.2"})  # 1.10 and later are newer
    assert on_device(changeable, "predict.py", image).stderr == ""


def test_more_threads_than_cores_are_refused(image):
    done = on_device(toy_bundle(), "predict.py", "--threads=1000", image)
    assert done.returncode == 2
    assert "the cores that this process may use" in done.stderr


def test_confidences_are_softmax_and_do_not_overflow():
    logits = np.array([[1.0, 2.0, 0.5], [1000.0, 0.0, 0.0]], np.float32)
    assert confidences(logits)[0] == pytest.approx(np.exp(2) / np.exp([1, 2, 0.5]).sum())
    assert confidences(logits)[1] == 1


def test_the_session_is_opened_as_the_pipeline_opens_it(monkeypatch):
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
