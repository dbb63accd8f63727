import json

import numpy as np
import pytest
from toy_bundle import VARIANT, edgewise
from toy_project import compressed_project

from stages.common import paths
from stages.common.errors import UserError
from stages.datasets.store import open_part
from stages.edge import printed, printing
from stages.edge.printed import sample
from stages.export.session import open_session, session_logits


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(compressed_project(tmp_path))
    return tmp_path


def test_the_result_has_the_accuracy_on_clean_images_too_and_repeats_with_its_seed(project, capsys):
    edgewise("printed", VARIANT, "--images", "20", "--seed", "3")
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
    edgewise("printed", VARIANT, "--images", "20", "--seed", "3")
    assert json.loads((folder / "printed.json").read_text()) == first


@pytest.mark.parametrize(("turn", "least", "most"), [(1, 0.75, 1.0), (-1, 0.0, 0.6)])
def test_prints_without_distortion_are_classified_like_the_images(project, monkeypatch, turn, least, most):
    """Enlarged, encoded, decoded and scaled down again, most keep their class; mirrored ones do not."""

    def plain(image, strengths, generator):
        frame = np.full((strengths.frame_px, strengths.frame_px, 3), 128, np.uint8)
        side = slice(strengths.margin_px, strengths.margin_px + strengths.print_px)
        frame[side, side] = np.rint(printing.enlarge(image[:, ::turn], strengths.print_px))
        return frame

    monkeypatch.setattr(printing, "photograph", plain)
    edgewise("printed", VARIANT, "--images", "50")
    result = json.loads((project / "dist" / VARIANT / "printed" / "printed.json").read_text())
    assert least <= result["agreement"] <= most


def test_the_sample_is_seeded_without_repetition_and_within_the_test_part():
    assert np.array_equal(sample(2000, None, 0), sample(2000, 1000, 0))
    assert len(set(sample(2000, 1000, 0).tolist())) == 1000
    assert not np.array_equal(sample(2000, 1000, 0), sample(2000, 1000, 1))
    assert np.array_equal(sample(50, None, 0), np.arange(50))
    for images in (0, 51):
        with pytest.raises(ValueError, match=f"images = {images}: give 1 to 50"):
            sample(50, images, 0)


def test_impossible_options_other_files_and_a_missing_opencv_are_refused(project, monkeypatch):
    (project / "mine").mkdir()
    (project / "mine" / "notes.txt").write_text("keep")
    for options, words in [
        (["--images", "51"], "--images = 51: give 1 to 50"),
        (["--seed", "-1"], "--seed -1"),
        (["--images", "2", "--out", "mine"], "contains other files"),
    ]:
        with pytest.raises(UserError, match=words):
            edgewise("printed", VARIANT, *options)
    assert (project / "mine" / "notes.txt").read_text() == "keep"
    monkeypatch.setattr(printed, "CAMERA", "no-such-package")
    with pytest.raises(UserError, match="uv sync --extra camera"):
        edgewise("printed", VARIANT)


def test_every_image_has_a_random_generator_of_its_own(project, monkeypatch):
    drawn = []

    def watched(image, strengths, generator):
        drawn.append(tuple(generator.random(4)))
        return np.full((strengths.frame_px, strengths.frame_px, 3), 128, np.uint8)

    monkeypatch.setattr(printing, "photograph", watched)
    edgewise("printed", VARIANT, "--images", "6")
    assert len(set(drawn)) == len(drawn) == 6
