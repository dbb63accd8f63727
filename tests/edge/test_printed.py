import json
import sys

import numpy as np
import pytest
from toy_bundle import VARIANT
from toy_project import compressed_project

from stages.common import paths
from stages.common.errors import UserError
from stages.datasets.store import open_part
from stages.edge import printed
from stages.edge.printed import sample
from stages.edge.selective import proportion
from stages.export.session import open_session, session_logits


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(compressed_project(tmp_path))
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["printed", VARIANT, *arguments])
    printed.main()


def test_the_result_stands_beside_the_clean_images_and_repeats_by_its_seed(project, monkeypatch, capsys):
    run(monkeypatch, "--images", "20", "--seed", "3")
    folder = project / "dist" / VARIANT / "printed"
    assert sorted(path.name for path in folder.iterdir()) == ["printed.json", "printed.mp4"]
    first = json.loads((folder / "printed.json").read_text())
    assert (first["n_images"], first["video_frames"], first["seed"]) == (20, 20, 3)
    part, chosen = open_part(paths.IMAGES, "test"), sample(50, 20, 3)
    logits = session_logits(open_session(paths.compressed(VARIANT) / "model.onnx", 1), part.images[chosen], 1)
    assert first["top1_clean"] == pytest.approx((logits.argmax(1) == part.labels[chosen]).mean())
    for name in ("top1_printed", "top1_clean"):
        assert first[f"{name}_ci_low"] <= first[name] <= first[f"{name}_ci_high"]
    assert "n = 20" in capsys.readouterr().out
    run(monkeypatch, "--images", "20", "--seed", "3")
    assert json.loads((folder / "printed.json").read_text()) == first


@pytest.mark.parametrize(("turn", "least", "most"), [(1, 0.75, 1.0), (-1, 0.0, 0.6)])
def test_prints_without_any_distortion_are_recognised_as_the_images_are(project, monkeypatch, turn, least, most):
    """Enlarged, encoded, decoded and scaled down again, most keep their class; mirrored ones do not."""
    from stages.edge import printing

    def plain(image, strengths, generator):
        frame = np.full((strengths.frame_px, strengths.frame_px, 3), 128, np.uint8)
        side = slice(strengths.margin_px, strengths.margin_px + strengths.print_px)
        frame[side, side] = np.rint(printing.enlarge(image[:, ::turn], strengths.print_px))
        return frame

    monkeypatch.setattr(printing, "photograph", plain)
    run(monkeypatch, "--images", "50")
    result = json.loads((project / "dist" / VARIANT / "printed" / "printed.json").read_text())
    assert least <= result["agreement"] <= most


def test_the_sample_is_seeded_has_no_image_twice_and_fits_the_test_part():
    assert np.array_equal(sample(2000, None, 0), sample(2000, 1000, 0))
    assert len(set(sample(2000, 1000, 0).tolist())) == 1000
    assert not np.array_equal(sample(2000, 1000, 0), sample(2000, 1000, 1))
    assert np.array_equal(sample(50, None, 0), np.arange(50))
    for images in (0, 51):
        with pytest.raises(ValueError, match=f"images = {images}: 1 to 50, the images of the test part"):
            sample(50, images, 0)


def test_more_images_than_there_are_are_refused(project, monkeypatch):
    with pytest.raises(UserError, match=r"--images = 51: 1 to 50"):
        run(monkeypatch, "--images", "51")


def test_the_interval_is_wilsons():
    found = proportion("x", np.array([True] * 37 + [False] * 3), 0.95)
    z, n, p = 1.959964, 40, 0.925
    centre, half = (p + z * z / (2 * n)) / (1 + z * z / n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert found["x"] == p
    assert found["x_ci_low"] == pytest.approx(centre - half / (1 + z * z / n), abs=1e-6)
    assert found["x_ci_high"] == pytest.approx(centre + half / (1 + z * z / n), abs=1e-6)


def test_a_folder_with_other_files_is_not_replaced(project, monkeypatch):
    (project / "mine").mkdir()
    (project / "mine" / "notes.txt").write_text("keep")
    with pytest.raises(UserError, match="holds other files"):
        run(monkeypatch, "--images", "2", "--out", "mine")
    assert (project / "mine" / "notes.txt").read_text() == "keep"


def test_without_opencv_it_says_what_to_install(project, monkeypatch):
    monkeypatch.setattr(printed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="uv sync --extra camera"):
        run(monkeypatch)


def test_every_image_is_seen_in_a_light_and_at_an_angle_of_its_own(project, monkeypatch):
    from stages.edge import printing

    seen = []

    def watched(image, strengths, generator):
        seen.append(generator.random(4).tolist())
        return np.full((strengths.frame_px, strengths.frame_px, 3), 128, np.uint8)

    monkeypatch.setattr(printing, "photograph", watched)
    run(monkeypatch, "--images", "6")
    assert len({tuple(drawn) for drawn in seen}) == len(seen) == 6
