"""download: bring the images into one form, once.

In: the section `data` (a name and a source). Out: `data/images/` as `stages/datasets/store.py` describes it: uint8
arrays for train, validation and test, and `images.json` with counts, checksums and statistics.

Run by `dvc repro download`, or `python -m stages.download` in the folder of `params.yaml`.
"""

import shutil
from pathlib import Path

from stages.common import paths
from stages.common.cores import usable_cores
from stages.common.errors import run_stage
from stages.common.files import atomic_folder
from stages.datasets.findings import lines
from stages.datasets.source import Source
from stages.datasets.sources.cifar10 import cifar10_source
from stages.datasets.sources.digits import digits_source
from stages.datasets.sources.folder import folder_source
from stages.datasets.sources.parquet import parquet_source
from stages.datasets.store import Info
from stages.datasets.writer import write_images
from stages.params.data import Data
from stages.params.load import load_params
from stages.params.section import Section

DECODERS = 4
"""Maximum number of threads: with small images, more threads wait for Python's global lock."""


class Params(Section):
    data: Data


def open_source(data: Data, scratch: Path) -> Source:
    """The source that `data` names, with its files downloaded, checked and unpacked below `scratch`."""
    match data.source:
        case "digits":
            return digits_source(data.sha256)
        case "cifar10":
            return cifar10_source(data.location, data.sha256, scratch)
        case "parquet":
            return parquet_source(str(data.location), data.sha256, scratch)
        case "folder":
            return folder_source(str(data.location), data.sha256, scratch)


def download(data: Data, folder: Path, scratch: Path, threads: int) -> tuple[Info, str]:
    """Write the images into the empty folder `folder` and return their description and the remark of the source.

    Downloads stay in `scratch/downloads`, so that another `image_size` or split does not download them again.
    """
    try:
        source = open_source(data, scratch)
        return write_images(source, data, folder, threads), source.remark
    finally:
        shutil.rmtree(scratch / "unpacked", ignore_errors=True)


def summary(info: Info, remark: str, size_bytes: int) -> str:
    counts = ", ".join(f"{part} {count:,}" for part, count in info.counts.items())
    kind = f"{info.geometry}, {'gray' if info.channels == 1 else 'RGB'}"
    line = (
        f"{paths.IMAGES}: {info.name} ({info.source}), {len(info.classes)} classes, {counts} images of"
        f" {info.image_size}x{info.image_size} ({kind}), {size_bytes / 1e6:,.1f} MB"
    )
    unreadable = f"unreadable images left out: {len(info.unreadable):,}" if info.unreadable else ""
    return "; ".join(filter(None, [line, unreadable, remark]))


def main() -> None:
    data = load_params(Params).data
    with atomic_folder(paths.IMAGES) as folder:
        info, remark = download(data, folder, paths.SCRATCH, min(DECODERS, usable_cores()))
        size_bytes = sum(path.stat().st_size for path in folder.iterdir())
    print("\n".join([summary(info, remark, size_bytes), *lines(info)]))


if __name__ == "__main__":
    run_stage(main)
