"""The section `data`: where the images come from and how they are stored."""

from typing import Annotated, Literal

from pydantic import Field

from stages.params.section import Geometry, Section, Seed


class Data(Section):
    name: str
    """Name of the data set in reports."""
    source: Literal["digits", "cifar10", "parquet", "folder"]
    """`digits`: scikit-learn's handwritten digits, without network access. `cifar10`: the official archive. `parquet`:
    the column layout of Hugging Face image data sets. `folder`: one folder for each class, or an archive of it."""
    location: str | None = None
    """Folder, file or URL of the images. `parquet` and `folder` require it; `cifar10` takes the official archive or a
    folder of parquet files from there instead of downloading."""
    sha256: dict[str, str] = {}
    """Expected SHA-256 checksums by file name. Files that are not listed are not checked."""
    image_size: Annotated[int, Field(ge=4, le=1024)]
    """Side of the stored images, which are square; this is also the input of `model.onnx`. Unit: pixels."""
    geometry: Geometry = "crop"
    """How a picture of other proportions becomes a square: `crop` (scale the shorter side to `image_size` and take the
    central square), `letterbox` (scale the longer side and pad with gray, 127 in every channel), `stretch` (change the
    proportions). Predictions of a bundle, its camera and the printed samples use the same geometry."""
    channels: Literal[1, 3] = 3
    """Channels of the stored images and of every network's input: 3 is RGB; 1 is gray (luma, ITU-R 601-2)."""
    levels: Annotated[list[float], Field(min_length=2, max_length=2)] | None = None
    """Gray values `[black, white]` of images with more than 8 bits, which become 0 and 255; values outside are clipped.
    12-bit values in 16-bit files need `[0, 4095]`. null is the whole range of the file's type."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the training images that becomes the validation part, stratified by class, if the source has no
    validation part of its own. It selects the best epoch and the variant to ship."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Fraction of the images that becomes the test part, stratified by class, if the source has no test part of its
    own. No stage before `profile` reads it."""
    split_seed: Seed = 0
    """Seed of the split into parts."""
    allow_unreadable: bool = False
    """Leave out unreadable images and list them, instead of stopping at the first."""
