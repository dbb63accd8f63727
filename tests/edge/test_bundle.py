import ast
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from toy_bundle import VARIANT, make_bundle, toy_bundle
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


def test_a_bundle_holds_the_model_what_it_is_and_what_runs_it():
    folder = toy_bundle()
    assert {path.name for path in folder.iterdir()} == {
        *("model.onnx", "bundle.json", "requirements.txt", "requirements-camera.txt"),
        *SOURCES,
    }
    assert set(SOURCES) >= SCRIPTS
    told = json.loads((folder / "bundle.json").read_text())
    described = json.loads((folder.parents[1] / paths.compressed(VARIANT) / "model.json").read_text())
    assert told["variant"] == VARIANT
    assert (told["classes"], told["image_size"]) == (described["classes"], described["image_size"])
    assert told["onnx_sha256"] == described["onnx"]["sha256"] == sha256_of(folder / "model.onnx")
    assert told["n_validation"] == 60
    assert told["validation_coverage"] == told["validation_answered"] / 60
    assert told["validation_selective_accuracy"] >= told["accuracy_asked"] == 0.25


def test_the_threshold_divides_the_validation_images_as_bundle_json_says():
    folder = toy_bundle()
    told = json.loads((folder / "bundle.json").read_text())
    part = open_part(folder.parents[1] / paths.IMAGES, "validation")
    logits = session_logits(open_session(folder / "model.onnx", 1), part.images, 1).astype(np.float64)
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    answered = softmax.max(1) >= told["confidence_threshold"] - 1e-12
    assert answered.sum() == told["validation_answered"]
    right = softmax.argmax(1)[answered] == part.labels[answered]
    assert right.mean() == pytest.approx(told["validation_selective_accuracy"])


def test_the_test_images_are_not_needed(project):
    for path in paths.IMAGES.glob("test_*"):
        path.unlink()
    assert (make_bundle(project, "--accuracy", "0.1") / "bundle.json").is_file()


def test_an_accuracy_out_of_reach_ends_with_the_nearest(project, monkeypatch):
    labels = np.load(paths.IMAGES / "validation_labels.npy")
    logits = np.eye(5, dtype=np.float32)[labels] * np.linspace(1, 2, len(labels), dtype=np.float32)[:, None]
    logits[-1] = np.eye(5)[(labels[-1] + 1) % 5] * 3  # the surest is wrong
    monkeypatch.setattr(bundle, "session_logits", lambda session, images, batch: logits)
    with pytest.raises(UserError, match=r"cannot be reached on 60 .* nearest is 0\.9833 on 100\.0 % of them"):
        choose_threshold(paths.compressed(VARIANT), paths.IMAGES, 0.99)


def test_requirements_pin_what_is_installed_here_and_no_torch():
    folder = toy_bundle()
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines == [f"{name}=={pinned(name)}" for name in ("onnxruntime", "numpy", "pillow")]
    camera = (folder / "requirements-camera.txt").read_text().splitlines()
    assert camera == ["-r requirements.txt", f"{CAMERA}=={pinned(CAMERA)}"]


def test_scripts_import_only_what_requirements_name():
    folder = toy_bundle()
    own = {path.stem for path in folder.glob("*.py")}
    for path in folder.glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.split(".")[0])
        allowed = {"numpy", "onnxruntime", "PIL"} | ({"cv2"} if path.stem in ("camera", "edgewise_frames") else set())
        assert found - set(sys.stdlib_module_names) - own <= allowed, path.name


def odd_images(folder):
    generator = np.random.default_rng(0)
    rgb = Image.fromarray(generator.integers(0, 256, (37, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    rgb.save(folder / "turned.jpg", exif=exif)
    rgb.convert("P").save(folder / "palette.gif")
    Image.fromarray(generator.integers(0, 256, (20, 30, 4), np.uint8), "RGBA").save(folder / "transparent.png")
    Image.fromarray(generator.integers(0, 65536, (20, 30), np.uint16)).save(folder / "deep.png")
    rgb.convert("CMYK").save(folder / "print.tif")
    return sorted(folder.iterdir())


def test_the_device_sees_the_very_pixels_that_datasets_store(tmp_path):
    images = odd_images(tmp_path)
    code = (
        f"import sys; sys.modules['stages'] = None; sys.path.insert(0, {str(toy_bundle())!r})\n"
        "from edgewise_decode import decode\n"
        "for path in sys.argv[1:]: sys.stdout.buffer.write(decode(__import__('pathlib').Path(path), 24)[0].tobytes())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, *map(str, images)], capture_output=True, check=True)
    stored = b"".join(decode(path.read_bytes(), 24)[0].tobytes() for path in images)
    assert len(stored) == len(images) * 24 * 24 * 3
    assert done.stdout == stored


def test_a_card_goes_along_where_it_is_about_this_model(project, capsys):
    sha256 = sha256_of(paths.compressed(VARIANT) / "model.onnx")
    card = paths.REPORTS / "cards" / f"{VARIANT}.md"
    card.parent.mkdir(parents=True)
    for text, expected in [("of another model", "is about another model.onnx"), (f"sha256 `{sha256}`", "is the model")]:
        card.write_text(text)
        folder = make_bundle(project, "--accuracy", "0.1")
        assert expected in capsys.readouterr().out.splitlines()[-1]
        assert (folder / "README.md").exists() == ("another" not in expected)
    card.unlink()
    folder = make_bundle(project, "--accuracy", "0.1")
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"no model card: {card} is missing")
    assert not (folder / "README.md").exists()


def test_a_broken_model_leaves_the_former_bundle_as_it_was(project):
    folder = make_bundle(project, "--accuracy", "0.1")
    before = {path.name: sha256_of(path) for path in folder.iterdir()}
    with (paths.compressed(VARIANT) / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"is not the file that model\.json describes"):
        make_bundle(project, "--accuracy", "0.1")
    assert {path.name: sha256_of(path) for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [VARIANT]


def test_a_new_bundle_leaves_what_else_lies_in_the_folder(project):
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


def test_what_is_no_bundle_is_not_replaced(project):
    with pytest.raises(UserError, match="is no bundle: move it away"):
        make_bundle(project, "--accuracy", "0.1", "--out", str(paths.compressed(VARIANT).parent))
    assert (paths.compressed(VARIANT) / "model.safetensors").is_file()
    (project / "mine").mkdir()
    (project / "mine" / VARIANT).write_text("a file")
    with pytest.raises(UserError, match="is no bundle: move it away"):
        make_bundle(project, "--accuracy", "0.1", "--out", "mine")
    assert (project / "mine" / VARIANT).read_text() == "a file"


def test_unknown_variants_other_images_and_odd_accuracies_are_refused(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bundle", "toy-none-int4"])
    with pytest.raises(UserError, match="give one entry of variants: toy-none-fp32, toy-none-int8"):
        bundle.main()
    with pytest.raises(SystemExit):
        make_bundle(project, "--accuracy", "95")
    assert "more than 0 and at most 1" in capsys.readouterr().err
    info = json.loads((paths.IMAGES / "images.json").read_text())
    (paths.IMAGES / "images.json").write_text(json.dumps(info | {"sha256": "0" * 64}))
    with pytest.raises(UserError, match="was made from other images"):
        make_bundle(project, "--accuracy", "0.1")


def test_it_runs_as_a_command_in_a_folder_of_its_own(project):
    shutil.rmtree(project / "dist", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "stages.edge.bundle", VARIANT, "--accuracy", "0.1"],
        env={"PYTHONPATH": str(bundle.STAGES.parent), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "of 60 validation images" in done.stdout
    assert (project / "dist" / VARIANT / "bundle.json").is_file()
