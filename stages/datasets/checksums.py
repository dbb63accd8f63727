"""Expected checksums of files that come from outside."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from stages.common.errors import UserError


@dataclass(frozen=True)
class Checksum:
    algorithm: str
    """A name that hashlib knows; publishers of old data sets give md5, we sha256."""
    digest: str
    """Hexadecimal."""

    def of(self, path: Path) -> str:
        """The digest that `path` really has."""
        with path.open("rb") as file:
            return hashlib.file_digest(file, self.algorithm).hexdigest()

    def check(self, path: Path) -> None:
        found = self.of(path)
        if found != self.digest.lower():
            raise UserError(
                f"{path}: wrong checksum: {self.algorithm} is {found}, expected {self.digest}:"
                " the file is damaged or another version; get it again, or correct data.sha256 if it lists this file"
            )


def check_listed(sha256: dict[str, str], files: dict[str, Path], where: str) -> None:
    """Check each file that `data.sha256` lists; `files` are those of the source `where`, by name.

    Raises:
        UserError: on a wrong checksum, and on a listed name that the source lacks (it would go unchecked).
    """
    for name, digest in sha256.items():
        path = files.get(name)
        if path is None or not path.is_file():
            raise UserError(f"data.sha256 lists {name!r}, which {where} does not have: correct the name or remove it")
        Checksum("sha256", digest).check(path)
