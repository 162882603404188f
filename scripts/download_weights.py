"""Fetches Meta's official SAM files, checked by their sha256.

    python scripts/download_weights.py                     # vit_b, 0.4 GB, to checkpoints/, where train.py looks for it
    python scripts/download_weights.py vit_l vit_h         # 1.2 GB and 2.6 GB
    python scripts/download_weights.py all --output /data/sam --base_url https://mirror.example.org/sam

A broken connection is taken up again where it broke, also by the next run: what has come is in `<file>.part` until all of it is there and has the
right sha256. A file that is there already is checked and left alone.

The sums come from public repositories that agree on them; Meta's pages state none. The file names carry the first six digits of the md5, which
is named when a sum does not fit.
"""

import argparse
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from pgsam.errors import Parser, UserError, reports_user_errors

BASE_URL = "https://dl.fbaipublicfiles.com/segment_anything"
SHA256 = {
    "vit_b": "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
    "vit_l": "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
    "vit_h": "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
}
_CHUNK = 1 << 20
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers that may be others in a moment
# What a connection that breaks raises; disk errors are OSErrors too and are told apart by where they come from.
_BROKEN = (http.client.HTTPException, OSError)


class _Interrupted(Exception):
    """The transfer stopped before its end and may be taken up again."""


@dataclass(frozen=True)
class Patience:
    """How long to go on: attempts in a row that bring nothing new, seconds without an answer, seconds before the second attempt (then doubled)."""

    attempts: int = 6
    timeout_s: float = 30.0
    wait_s: float = 1.0


@dataclass
class Origin:
    """What a `.part` file is a part of, as the server said; it stands beside it as JSON."""

    url: str
    etag: str | None = None
    last_modified: str | None = None
    size: int | None = None

    @property
    def validator(self) -> str | None:
        """What If-Range may carry: a strong ETag, else the date."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified


def download(url: str, target: Path, sha256: str, *, overwrite: bool = False, patience: Patience | None = None) -> bool:
    """Brings the file at `url` to `target`; it appears there whole and with the right sum, or not at all.

    Returns:
        False if it was there already.

    Raises:
        UserError: another file is at `target` (without `overwrite`), the address has no such file, the server does not deliver, the content
            has another sum, or the disk is full.
    """
    patience = patience or Patience()
    if target.is_dir():
        raise UserError(f"{target}: expected a file or nothing, found a folder; give another --output")
    if target.exists():
        found = _sum(target, "sha256")
        if found == sha256:
            return False
        if not overwrite:
            raise UserError(f"{target}: expected sha256 {sha256}, found {_what(target, found)}; --overwrite fetches it anew")
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, sha256, patience)
        found = _sum(part, "sha256")
        if found != sha256:
            what = _what(part, found)
            _remove(part)
            raise UserError(f"{url}: expected a file with sha256 {sha256}, found {what}; it was removed, try again later or give another --base_url")
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except OSError as error:
        why = "the disk is full" if error.errno == errno.ENOSPC else f"cannot be written ({error})"
        raise UserError(f"{target}: {why}; free some space or give another --output, then run it again to go on") from error
    _remove(part)
    return True


def _fetch(url: str, part: Path, sha256: str, patience: Patience) -> None:
    """Fills `part`, in as many connections as it takes."""
    failures, furthest = 0, _size(part)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=part.stem, disable=None) as bar:
        while True:
            try:
                _fetch_once(url, part, patience.timeout_s, bar)
                return
            except _Interrupted as error:
                reached = _size(part)
                failures = 0 if reached > furthest else failures + 1
                furthest = max(furthest, reached)
                # Nothing more comes: the server may have promised more than there is.
                if failures == 1 and reached and _sum(part, "sha256") == sha256:
                    return
                if failures >= patience.attempts:
                    kept = f"; {reached} bytes are kept, run it again to go on" if reached else ""
                    raise UserError(f"{url}: gave up after {failures} attempts that brought nothing new ({error}){kept}") from error
                time.sleep(patience.wait_s * 2 ** max(failures - 1, 0))


def _fetch_once(url: str, part: Path, timeout_s: float, bar: "tqdm[object]") -> None:
    """One connection: appends to `part` what is missing, or begins it anew where the server's file is another one."""
    origin = _read_origin(part)
    if origin is None or origin.url != url:
        _remove(part)
        origin = None
    offset = _size(part)
    headers = {"User-Agent": "pg-sam", "Accept-Encoding": "identity"}
    if offset and origin is not None:
        headers["Range"] = f"bytes={offset}-"
        if origin.validator:
            headers["If-Range"] = origin.validator
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    except urllib.error.HTTPError as error:
        _refused(url, part, error, offset)
        return
    except urllib.error.URLError as error:
        raise _Interrupted(f"no connection: {error.reason}") from error
    except _BROKEN as error:
        raise _Interrupted(f"no answer: {error or type(error).__name__}") from error
    with response:
        _receive(url, part, response, offset, origin, bar)


def _refused(url: str, part: Path, error: urllib.error.HTTPError, offset: int) -> None:
    """Returns if `part` turns out to be all of the file; raises otherwise."""
    with error:
        if error.code == 416 and offset:
            if error.headers.get("Content-Range") == f"bytes */{offset}":
                return
            _remove(part)  # longer than the server's file: another one
            raise _Interrupted(f"HTTP {error.code}")
        if error.code in _PASSING:
            raise _Interrupted(f"HTTP {error.code} {error.reason}")
        raise UserError(f"{url}: expected the file, found HTTP {error.code} {error.reason}; check the address, or give another --base_url") from error


def _receive(url: str, part: Path, response: http.client.HTTPResponse, offset: int, origin: Origin | None, bar: "tqdm[object]") -> None:
    """Writes one answer to `part`, at `offset` if it is the rest that was asked for, else from the start."""
    kind = response.headers.get_content_type()
    if kind in ("text/html", "application/xhtml+xml"):
        raise UserError(f"{url}: expected the file, found a web page ({kind}); a login or a proxy stands before it: check the address in a browser")
    size = _length(response)
    if response.status == 206 and origin is not None:
        start, whole = _content_range(response)
        same = all(new is None or old is None or new == old for new, old in ((response.headers["ETag"], origin.etag), (whole, origin.size)))
        if start != offset or not same:
            _remove(part)
            raise _Interrupted("the file on the server has changed")
        size = whole
    else:
        offset = 0
        origin = Origin(url, response.headers["ETag"], response.headers["Last-Modified"], size)
    missing, free = (size or 0) - offset, shutil.disk_usage(part.parent).free
    if missing > free:
        raise UserError(f"{part}: expected room for {missing / 1e9:.2f} GB more, found {free / 1e9:.2f}; free some space or give another --output")
    with part.open("ab" if offset else "wb") as file:
        _write_origin(part, origin)
        bar.reset(total=size)
        bar.n = bar.initial = offset
        written = offset
        while chunk := _read(response):
            file.write(chunk)
            written += len(chunk)
            bar.update(len(chunk))
    if size is not None and written < size:
        raise _Interrupted(f"the connection broke at {written} of {size} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read1(_CHUNK)
    except _BROKEN as error:
        raise _Interrupted(f"the connection broke: {error or type(error).__name__}") from error


def _length(response: http.client.HTTPResponse) -> int | None:
    """Content-Length, where it is one."""
    value = response.headers.get("Content-Length", "")
    return int(value) if value.isascii() and value.isdigit() else None


def _content_range(response: http.client.HTTPResponse) -> tuple[int | None, int | None]:
    """Start and whole size of `Content-Range: bytes 5-9/10`; None for what it does not say."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (int(match[1]), int(match[2]) if match[2] != "*" else None) if match else (None, None)


# --- files ------------------------------------------------------------------------------------------------------------------------------


def _origin_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_origin(part: Path) -> Origin | None:
    """What `part` is a part of; None if that is not known."""
    try:
        return Origin(**json.loads(_origin_file(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write_origin(part: Path, origin: Origin) -> None:
    _origin_file(part).write_text(json.dumps(asdict(origin)) + "\n", encoding="utf-8")


def _remove(part: Path) -> None:
    for path in (part, _origin_file(part)):
        path.unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sum(path: Path, name: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, name).hexdigest()


def _what(path: Path, sha256: str) -> str:
    """What a file with the wrong sum is."""
    from pgsam.sam.weights import require_file

    try:
        require_file(path, "a SAM file")
    except UserError as error:
        return str(error).partition(", found ")[2].partition(";")[0]
    return f"{path.stat().st_size} bytes with sha256 {sha256} and md5 {_sum(path, 'md5')[:6]}..."


# --- command line -----------------------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The flags of this program."""
    parser = Parser(__doc__)
    parser.add_argument("names", nargs="*", default=["vit_b"], metavar="NAME", help=f"{', '.join(SHA256)} or all (default vit_b)")
    parser.add_argument("--output", type=Path, default=Path("checkpoints"), help="folder (default %(default)s)")
    parser.add_argument("--base_url", default=BASE_URL, help="where the files lie under Meta's names (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that has another sha256")
    return parser


@reports_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; 0 on success, 2 after an error of the user's."""
    from pgsam.sam.weights import OFFICIAL_FILES

    args = build_parser().parse_args(argv)
    unknown = [name for name in args.names if name not in (*SHA256, "all")]
    if unknown:
        raise UserError(f"{', '.join(unknown)}: expected {', '.join(SHA256)} or all")
    if urllib.parse.urlsplit(args.base_url).scheme not in ("http", "https"):
        raise UserError(f"--base_url {args.base_url}: expected an address that begins with https:// or http://")
    for name in SHA256 if "all" in args.names else dict.fromkeys(args.names):
        target = args.output / OFFICIAL_FILES[name]
        try:
            fetched = download(f"{args.base_url.rstrip('/')}/{target.name}", target, SHA256[name], overwrite=args.overwrite)
        except KeyboardInterrupt as error:
            raise UserError(f"{target}: interrupted; what has come is kept, run it again to go on") from error
        print(f"{target}: {'fetched' if fetched else 'is there already'}, sha256 {SHA256[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
