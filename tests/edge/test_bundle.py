import ast
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from toy_bundle import VARIANT, edgewise, make_bundle, toy_bundle
from toy_project import compressed_project

from stages.common import paths
from stages.common.errors import UserError
from stages.common.files import sha256_of
from stages.datasets.decode import decode
from stages.datasets.store import open_part
from stages.edge import bundle
from stages.edge.bundle import CAMERA, SOURCES, choose_threshold, pinned
from stages.export.session import open_session, session_logits

SCRIPTS = {"predict.py", "bench.py", "camera.py"}


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(compressed_project(tmp_path))
    return tmp_path


def test_a_bundle_has_the_model_its_description_and_the_scripts():
    folder = toy_bundle()
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {  # a test that ran the scripts left it
        *("model.onnx", "bundle.json", "requirements.txt", "requirements-camera.txt"),
        *SOURCES,
    }
    assert set(SOURCES) >= SCRIPTS
    content = json.loads((folder / "bundle.json").read_text())
    described = json.loads((folder.parents[1] / paths.compressed(VARIANT) / "model.json").read_text())
    assert content["variant"] == VARIANT
    assert (content["classes"], content["image_size"]) == (described["classes"], described["image_size"])
    assert content["onnx_sha256"] == described["onnx"]["sha256"] == sha256_of(folder / "model.onnx")
    assert content["n_validation"] == 60
    assert content["validation_coverage"] == content["validation_answered"] / 60
    assert content["validation_selective_accuracy"] >= content["accuracy_asked"] == 0.25


def test_the_threshold_divides_the_validation_images_as_bundle_json_says():
    folder = toy_bundle()
    content = json.loads((folder / "bundle.json").read_text())
    part = open_part(folder.parents[1] / paths.IMAGES, "validation")
    logits = session_logits(open_session(folder / "model.onnx", 1), part.images, 1).astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    answered = softmax.max(1) >= content["confidence_threshold"] - 1e-12
    assert answered.sum() == content["validation_answered"]
    right = softmax.argmax(1)[answered] == part.labels[answered]
    assert right.mean() == pytest.approx(content["validation_selective_accuracy"])


def test_the_test_images_are_not_needed(project):
    for path in paths.IMAGES.glob("test_*"):
        path.unlink()
    assert (make_bundle(project, "--accuracy", "0.1") / "bundle.json").is_file()


def test_an_accuracy_out_of_reach_is_refused_with_the_highest_one(project, monkeypatch):
    labels = np.load(paths.IMAGES / "validation_labels.npy")
    logits = np.eye(5, dtype=np.float32)[labels] * np.linspace(1, 2, len(labels), dtype=np.float32)[:, None]
    logits[-1] = np.eye(5)[(labels[-1] + 1) % 5] * 3  # the answer with the highest confidence is wrong
    monkeypatch.setattr(bundle, "session_logits", lambda session, images, batch: logits)
    with pytest.raises(UserError, match=r"out of reach on 60 .* 0\.9833, .* 100\.0 %"):
        choose_threshold(paths.compressed(VARIANT), paths.IMAGES, 0.99)


def test_requirements_pin_the_installed_versions():
    folder = toy_bundle()
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines == [f"{name}=={pinned(name)}" for name in ("onnxruntime", "numpy", "pillow", "psutil")]
    camera = (folder / "requirements-camera.txt").read_text().splitlines()
    assert camera == ["-r requirements.txt", f"{CAMERA}=={pinned(CAMERA)}"]


def test_scripts_import_only_packages_of_the_requirements():
    folder = toy_bundle()
    own = {path.stem for path in folder.glob("*.py")}
    extra = {"camera": {"cv2"}, "edgewise_frames": {"cv2"}, "edgewise_machine": {"psutil"}}
    for path in folder.glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        allowed = {"numpy", "onnxruntime", "PIL"} | extra.get(path.stem, set())
        assert found - set(sys.stdlib_module_names) - own <= allowed, path.name


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("geometry", ["crop", "letterbox", "stretch"])
def test_the_device_decodes_the_same_pixels_as_the_download_stage(tmp_path, geometry, channels):
    generator = np.random.default_rng(0)
    rgb = Image.fromarray(generator.integers(0, 256, (37, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    rgb.save(tmp_path / "turned.jpg", exif=exif)
    rgb.convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(generator.integers(0, 256, (20, 30, 4), np.uint8), "RGBA").save(tmp_path / "transparent.png")
    Image.fromarray(generator.integers(0, 65536, (20, 30), np.uint16)).save(tmp_path / "deep.png")
    rgb.convert("CMYK").save(tmp_path / "print.tif")
    for number, (width, height) in enumerate([(30, 90), (33, 24), (24, 24), (1, 1), (2, 400)]):
        pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    images = sorted(tmp_path.iterdir())
    code = (
        f"import sys; sys.modules['stages'] = None; sys.path.insert(0, {str(toy_bundle())!r})\n"
        "from edgewise_decode import decode\n"
        "from pathlib import Path\n"
        "for path in sys.argv[1:]:\n"
        f"    sys.stdout.buffer.write(decode(Path(path), 24, {geometry!r}, {channels})[0].tobytes())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, *map(str, images)], capture_output=True, check=True)
    stored = b"".join(decode(path.read_bytes(), 24, geometry, channels)[0].tobytes() for path in images)
    assert len(stored) == len(images) * 24 * 24 * channels
    assert done.stdout == stored


def test_the_bundle_has_the_card_if_it_describes_this_model(project, capsys):
    sha256 = sha256_of(paths.compressed(VARIANT) / "model.onnx")
    card = paths.REPORTS / "cards" / f"{VARIANT}.md"
    card.parent.mkdir(parents=True)
    for text, word in [("of another model", "another"), (f"sha256 `{sha256}`", "README.md"), (None, "missing")]:
        card.write_text(text) if text else card.unlink()
        folder = make_bundle(project, "--accuracy", "0.1")
        assert word in capsys.readouterr().out.splitlines()[-1]
        assert (folder / "README.md").exists() == (word == "README.md")


def test_a_broken_model_leaves_the_previous_bundle_unchanged(project):
    folder = make_bundle(project, "--accuracy", "0.1")
    before = {path.name: sha256_of(path) for path in folder.iterdir()}
    with (paths.compressed(VARIANT) / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"model\.onnx"):
        make_bundle(project, "--accuracy", "0.1")
    assert {path.name: sha256_of(path) for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [VARIANT]


def test_a_new_bundle_leaves_other_files_in_the_folder(project):
    folder = make_bundle(project, "--accuracy", "0.1")
    names = {path.name for path in folder.iterdir()}
    (folder / "env").mkdir()
    (folder / "env/mine").write_text("keep")
    (folder / "README.md").write_text("the card of another model")
    (folder / "predict.py").write_text("an older one")
    before = (folder / "bundle.json").read_text()
    make_bundle(project, "--accuracy", "0.2")
    assert (folder / "env/mine").read_text() == "keep"
    assert (folder / "predict.py").read_bytes() == SOURCES["predict.py"].read_bytes()
    assert (folder / "bundle.json").read_text() != before
    assert {path.name for path in folder.iterdir()} == names | {"env"}


def test_a_folder_that_is_not_a_bundle_is_not_replaced(project):
    (project / "mine").mkdir()
    (project / "mine" / VARIANT).write_text("a file")
    for out in (paths.compressed(VARIANT).parent, "mine"):
        with pytest.raises(UserError, match="is not a bundle: move it away"):
            make_bundle(project, "--accuracy", "0.1", "--out", str(out))
    assert (paths.compressed(VARIANT) / "model.safetensors").is_file()
    assert (project / "mine" / VARIANT).read_text() == "a file"


def test_unknown_variants_other_images_and_impossible_accuracies_are_refused(project, capsys):
    with pytest.raises(UserError, match="give one entry of variants: toy-none-fp32, toy-none-int8"):
        edgewise("bundle", "toy-none-int4")
    for accuracy in ("95", "0", "nan", "much"):
        with pytest.raises(SystemExit):
            make_bundle(project, "--accuracy", accuracy)
        assert "--accuracy" in capsys.readouterr().err
    info = json.loads((paths.IMAGES / "images.json").read_text())
    (paths.IMAGES / "images.json").write_text(json.dumps(info | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match="other images"):
        make_bundle(project, "--accuracy", "0.1")
