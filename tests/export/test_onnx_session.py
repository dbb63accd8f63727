import numpy as np
import pytest

from stages.common.errors import UserError
from stages.export.session import open_session, session_logits


def test_a_missing_or_broken_file_is_named(tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match=r"model\.onnx is missing: run `dvc repro`"):
        open_session(path, 1)
    path.write_bytes(b"no protobuf")
    with pytest.raises(UserError, match=r"model\.onnx cannot be opened by ONNX Runtime"):
        open_session(path, 1)


def test_images_of_another_size_or_type_are_refused(float_export, images):
    session = open_session(float_export[1], 1)
    assert session.get_session_options().intra_op_num_threads == 1
    with pytest.raises(UserError, match="takes uint8 images"):
        session_logits(session, images[:, :16], 8)
    with pytest.raises(UserError, match="these are float32"):
        session_logits(session, images.astype(np.float32), 8)
    assert session_logits(session, images[:0], 8).shape == (0, 10)
