"""Zip files of scans: unpacked into a temporary folder, never outside it and never more than such a file can hold."""

import errno
import lzma
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from pgsam.errors import UserError
from pgsam.formats.common import DEFLATE_RATIO, LARGEST_BYTES, unreadable

_DAMAGE = (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)
_FLAG_ENCRYPTED = 0x1


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Gives a temporary folder with the files of a zip, and removes it at the end; hidden files and macOS's `__MACOSX` are left out.

    Every member is read to its end, so that its checksum is compared.

    Raises:
        UserError: it is no zip, damaged, encrypted, names a place outside the folder or one place twice, or claims a size it cannot hold.
    """
    with tempfile.TemporaryDirectory(prefix="pgsam_zip_") as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                if not all(member.filename for member in archive.infolist()):  # zipfile cannot say whether these are folders
                    raise UserError(f"{path}: expected a name for every member, found one without; make the zip again")
                members = [member for member in archive.infolist() if not member.is_dir()]
                _check_members(path, members)
                for member in members:
                    if not _is_hidden(member.filename):
                        archive.extract(member, folder)
        except (OSError, *_DAMAGE) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # damage has no number, or is a place before the file
                raise
            with path.open("rb") as file:
                known = file.read(2) == b"PK"
            raise unreadable(path, "a zip file", error, known=known) from error
        yield Path(folder)


def _is_hidden(name: str) -> bool:
    return any(part == "__MACOSX" or (part.startswith(".") and part.strip(".")) for part in PurePosixPath(name).parts)


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    files: set[PurePosixPath] = set()
    for member in members:
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if not name.parts or name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
            raise UserError(f"{path}: expected members below one folder, found {member.filename!r}; make the zip again")
        if member.flag_bits & _FLAG_ENCRYPTED:
            raise UserError(f"{path}: expected a zip without a password, {member.filename} is encrypted; unpack it and give the folder")
        if member.file_size > DEFLATE_RATIO * member.compress_size + (1 << 16):
            raise UserError(
                f"{path}: {member.filename} claims {member.file_size} bytes from {member.compress_size} packed ones, more than any packing "
                "reaches; make the zip again"
            )
        if name in files:
            raise UserError(f"{path}: expected every member once, found {member.filename} twice; make the zip again")
        files.add(name)
    both = files & {parent for name in files for parent in name.parents}
    if both:
        raise UserError(f"{path}: expected files and folders of different names, found {min(both)} as both; make the zip again")
    total = sum(member.file_size for member in members)
    if total > LARGEST_BYTES:
        raise UserError(f"{path}: expected at most {LARGEST_BYTES} bytes when unpacked, found {total}; unpack it and give one scan")
