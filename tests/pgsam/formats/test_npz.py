"""npz files against numpy's own reading and writing of them: the same bytes, arrays and refusals, whatever the file."""

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgsam.formats.arrays import DAMAGE
from pgsam.formats.npz import read_npz, write_npz

RNG = np.random.default_rng(0)
IMAGE, LABEL = RNG.random((6, 5), dtype=np.float32), RNG.integers(0, 9, (6, 5)).astype(np.float32)
KEYS = ("image", "label")
ARRAYS: dict[str, Any] = {
    "float32": IMAGE,
    "float16": IMAGE.astype(np.float16),
    "big-endian": IMAGE.astype(">f8"),
    "bytes": LABEL.astype(np.uint8),
    "booleans": LABEL > 3,
    "Fortran order": np.asfortranarray(IMAGE),
    "every other column": IMAGE[:, ::2],
    "backwards": IMAGE[::-1],
    "three axes": RNG.integers(-9, 9, (3, 4, 5)),
    "three axes in Fortran order": np.asfortranarray(RNG.random((3, 4, 5))),
    "nothing": IMAGE[:0],
    "one number": np.float64(3.5),
    "text": "LAS",
    "text beyond ASCII": np.array(["Übersicht", "像"]),
    "a list": [-125.0, 275.0],
}


class Trap:
    """Would leave a file behind if it were unpickled."""

    def __reduce__(self) -> tuple:
        return open, ("trap", "w")


def by_numpy(path: Path, keys: tuple[str, ...] = KEYS) -> list[np.ndarray]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        return [archive[key] for key in keys]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.flags.c_contiguous, one.flags.writeable) == (
            other.dtype,
            other.shape,
            other.flags.c_contiguous,
            other.flags.writeable,
        )
        assert one.tobytes() == other.tobytes()


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left to numpy's own reader."""
    monkeypatch.setattr(np, "load", lambda *args, **flags: pytest.fail("numpy read the file"))


@pytest.mark.parametrize("name", ARRAYS)
def test_a_file_is_what_numpy_writes(name: str, tmp_path: Path) -> None:
    arrays = {"image": ARRAYS[name], "label": LABEL, "source": "img0001.nii.gz"}
    write_npz(tmp_path / "ours.npz", arrays)
    np.savez(tmp_path / "numpy.npz", **arrays)
    assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_are_what_numpy_reads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, image=ARRAYS[name], label=LABEL, spacing=np.ones(3))
    expected = by_numpy(path)
    monkeypatch.setattr(np, "load", lambda *args, **flags: pytest.fail("numpy read the file"))
    assert_same(read_npz(path, KEYS), expected)


def test_a_large_array_whose_blocks_are_read_one_after_another(only_ours: None, tmp_path: Path) -> None:
    image = RNG.random((700, 801))
    write_npz(tmp_path / "a.npz", {"image": image})
    assert_same(read_npz(tmp_path / "a.npz", ("image",)), [image])


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


class Unseekable(io.RawIOBase):
    """A pipe, to which zipfile writes a member's checksum behind the member."""

    def __init__(self) -> None:
        self.written = b""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self.written += bytes(content)
        return len(content)


def zipped(packing: int = zipfile.ZIP_STORED, image: str = "image.npy", stream: Any = None, version: Any = None, comment: bytes = b"") -> bytes:
    stream = stream or io.BytesIO()
    with zipfile.ZipFile(stream, "w", packing) as archive:
        archive.writestr(image, npy(IMAGE, version))
        archive.writestr("label.npy", npy(LABEL))
        archive.comment = comment
    return stream.written if isinstance(stream, Unseekable) else stream.getvalue()


def with_extra_field() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in (("image.npy", IMAGE), ("label.npy", LABEL)):
            member = zipfile.ZipInfo(name)
            member.extra = struct.pack("<2H4s", 0xCAFE, 4, b"abcd")
            archive.writestr(member, npy(array))
    return stream.getvalue()


OF_OTHERS = {
    "deflate": lambda: zipped(zipfile.ZIP_DEFLATED),
    "bzip2": lambda: zipped(zipfile.ZIP_BZIP2),
    "lzma": lambda: zipped(zipfile.ZIP_LZMA),
    "through a pipe": lambda: zipped(stream=Unseekable()),
    "a comment": lambda: zipped(comment=b"made by a scanner"),
    "an extra field": with_extra_field,
    "npy 2.0": lambda: zipped(version=(2, 0)),
    "npy 3.0": lambda: zipped(version=(3, 0)),
    "plain zip, no longer fields": zipped,
}


@pytest.mark.parametrize("kind", OF_OTHERS)
def test_files_of_other_programs(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(OF_OTHERS[kind]())
    found = read_npz(path, KEYS)
    assert_same(found, by_numpy(path))
    np.testing.assert_array_equal(found[0], IMAGE)


def test_a_member_without_suffix_and_an_absent_one(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(zipped(image="image"))
    assert_same(read_npz(path, KEYS), by_numpy(path))
    with pytest.raises(KeyError, match="depth is not a file"):
        read_npz(path, ("image", "depth"))


# --- damage -------------------------------------------------------------------------------------------------------------------------------


def outcome(read: Any, path: Path) -> Any:
    """What was read, or the error in its words."""
    try:
        return [(array.dtype.str, array.shape, array.tobytes()) for array in read(path, KEYS)]
    except (*DAMAGE, MemoryError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flipped_bit_or_a_lost_end_is_what_it_is_to_numpy(packing: int, tmp_path: Path) -> None:
    raw, path = zipped(packing), tmp_path / "a.npz"
    files = [raw[:place] + bytes([raw[place] ^ (1 << place // 2 % 8)]) + raw[place + 1 :] for place in range(0, len(raw), 2)]
    files += [raw[:length] for length in range(0, len(raw), 9)]
    refused = 0
    for content in files:
        path.write_bytes(content)
        found = outcome(read_npz, path)
        if isinstance(found, tuple):
            refused += 1
            assert found == outcome(by_numpy, path)
        else:
            assert [pixels for *_, pixels in found] == [IMAGE.tobytes(), LABEL.tobytes()]
    assert refused > len(files) // 2


def test_a_wrong_checksum_is_found_in_every_block(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, image=RNG.random((300, 300)), label=LABEL)
    raw = path.read_bytes()
    for place in (200, 300_000, 720_000):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        with pytest.raises(zipfile.BadZipFile, match=r"Bad CRC-32 for file 'image\.npy'"):
            read_npz(path, KEYS)


def test_objects_are_neither_read_nor_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npz"
    np.savez(path, image=np.array([Trap()], dtype=object), label=LABEL)
    with pytest.raises(ValueError, match="allow_pickle=False"):
        read_npz(path, KEYS)
    with pytest.raises(ValueError, match="never pickled"):
        write_npz(tmp_path / "b.npz", {"image": np.array([Trap()], dtype=object)})
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
