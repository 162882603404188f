"""Downloads from a real server on this machine that breaks off, lies about lengths, ignores ranges, or serves something else."""

import contextlib
import hashlib
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pgsam.errors import UserError
from pgsam.sam.weights import OFFICIAL_FILES
from scripts import download_weights
from scripts.download_weights import Patience, download

FILE = bytes(range(256)) * 1200  # 307,200 bytes: more than a socket's buffer
OTHER = FILE[::-1]
SHA256 = hashlib.sha256(FILE).hexdigest()
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 375042383\n"
HTML = b"<!DOCTYPE html><html><body>Sign in</body></html>"
QUICK = Patience(attempts=3, timeout_s=1.0, wait_s=0.0)


@dataclass
class Server:
    """What the server does with each request in turn (the last one goes on), and the headers of the requests it got."""

    url: str = ""
    answers: list[Callable[[BaseHTTPRequestHandler], None]] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.requests.append({**self.headers, "path": self.path})
            answer = state.answers[min(len(state.requests), len(state.answers)) - 1]
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client left
                answer(self)
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    http_server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http_server.daemon_threads = True
    thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{http_server.server_address[1]}"
    yield state
    http_server.shutdown()
    http_server.server_close()
    thread.join()


def serves(
    content: bytes = FILE,
    *,
    etag: str | None = '"one"',
    date: str | None = None,
    ranges: bool = True,
    if_range: bool = True,
    stop_after: int | None = None,
    claimed: int | None = None,
    kind: str = "application/octet-stream",
) -> Callable[[BaseHTTPRequestHandler], None]:
    """An answer with `content`, or the part of it that the request asks for.

    `stop_after` bytes of the body the connection is closed; `claimed` bytes are said to come; without `if_range` that header is not looked at.
    """

    def answer(handler: BaseHTTPRequestHandler) -> None:
        start, condition = 0, handler.headers.get("If-Range")
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and ranges and (condition in (None, etag, date) or not if_range):
            start = int(asked[1])
        if start and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.end_headers()
            return
        body = content[start:]
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) if claimed is None else claimed))
        handler.send_header("Content-Type", kind)
        for name, value in (("ETag", etag), ("Last-Modified", date)):
            if value:
                handler.send_header(name, value)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        handler.wfile.write(body[:stop_after])

    return answer


def status(code: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()

    return answer


@pytest.fixture
def fetch(server: Server, tmp_path: Path) -> Callable[..., bool]:
    """Downloads from answers in turn to `sam.pth`."""

    def run(*answers: Callable[[BaseHTTPRequestHandler], None], patience: Patience = QUICK, overwrite: bool = False) -> bool:
        server.answers, server.requests = list(answers), []
        return download(f"{server.url}/sam.pth", tmp_path / "sam.pth", SHA256, overwrite=overwrite, patience=patience)

    return run


def left(folder: Path) -> dict[str, bytes]:
    """Name -> content of what lies in the folder, the notes on where a part comes from left out."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}


def refused(fetch: Callable[..., bool], *answers: Callable[[BaseHTTPRequestHandler], None], **more: object) -> str:
    with pytest.raises(UserError) as error:
        fetch(*answers, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def ranges(server: Server) -> list[str | None]:
    return [request.get("Range") for request in server.requests]


# --- a file arrives ---------------------------------------------------------------------------------------------------------------------


def test_a_file_is_fetched_once(fetch, server, tmp_path) -> None:
    assert fetch(serves())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"sam.pth": FILE}
    assert fetch(serves()) is False
    assert server.requests == []


@pytest.mark.parametrize("validator", [{"etag": '"one"'}, {"etag": None, "date": "Tue, 04 Apr 2023 10:00:00 GMT"}, {"etag": None}])
def test_a_broken_connection_is_taken_up_where_it_broke(fetch, server, tmp_path, validator) -> None:
    breaks = serves(stop_after=100_000, **validator)
    assert fetch(breaks, breaks, serves(**validator))
    assert ranges(server) == [None, "bytes=100000-", "bytes=200000-"]
    assert {request.get("If-Range") for request in server.requests[1:]} == {validator["etag"] or validator.get("date")}
    assert left(tmp_path) == {"sam.pth": FILE}


def test_a_part_of_an_earlier_run_is_taken_up(fetch, server, tmp_path) -> None:
    message = refused(fetch, serves(stop_after=100_000), status(503))
    assert "gave up after 3 attempts" in message
    assert "HTTP 503" in message
    assert "100000 bytes are kept" in message
    assert left(tmp_path) == {"sam.pth.part": FILE[:100_000]}
    assert fetch(serves())
    assert ranges(server) == ["bytes=100000-"]
    assert {path.name for path in tmp_path.iterdir()} == {"sam.pth"}


def test_progress_gives_new_patience(fetch, server) -> None:
    """More breaks than attempts, each after some more bytes."""
    assert fetch(*[serves(stop_after=50_000)] * 6, serves())
    assert len(server.requests) == 7


@pytest.mark.parametrize("passing", [status(500), status(429), lambda handler: handler.connection.close()])
def test_a_server_that_is_busy_for_a_moment(fetch, passing, tmp_path) -> None:
    assert fetch(passing, passing, serves())
    assert left(tmp_path) == {"sam.pth": FILE}


def test_a_server_that_never_answers(fetch, server) -> None:
    release = threading.Event()
    message = refused(fetch, lambda handler: release.wait(5) and None, patience=Patience(2, 0.1, 0.0))
    release.set()
    assert "gave up after 2 attempts" in message
    assert "timed out" in message


def test_nobody_listens(tmp_path) -> None:
    with pytest.raises(UserError, match="gave up after 2 attempts that brought nothing new"):
        download("http://127.0.0.1:9/sam.pth", tmp_path / "sam.pth", SHA256, patience=Patience(2, 1.0, 0.0))
    assert not list(tmp_path.iterdir())


def test_the_waits_grow(fetch, monkeypatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download_weights.time, "sleep", waits.append)
    refused(fetch, status(503), patience=Patience(5, 1.0, 0.5))
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_a_server_that_ignores_ranges_sends_all_again(fetch, server, tmp_path) -> None:
    assert fetch(serves(stop_after=100_000), serves(ranges=False))
    assert ranges(server) == [None, "bytes=100000-"]
    assert left(tmp_path) == {"sam.pth": FILE}


def test_one_that_ignores_ranges_and_always_breaks_does_not_go_on_for_ever(fetch, server) -> None:
    assert "gave up after 3 attempts" in refused(fetch, serves(stop_after=100_000, ranges=False))
    assert len(server.requests) == 4


@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changes_between_two_parts_is_begun_anew(fetch, server, tmp_path, if_range) -> None:
    """Also from a server that does not look at If-Range, by the other ETag of its answer."""
    answers = serves(OTHER, etag='"old"', stop_after=100_000), serves(etag='"new"', if_range=if_range)
    assert fetch(*answers)
    assert left(tmp_path) == {"sam.pth": FILE}
    assert server.requests[1]["If-Range"] == '"old"'


def test_a_changed_file_of_another_size_is_noticed_without_validators(fetch, tmp_path) -> None:
    assert fetch(serves(OTHER + b"more", etag=None, stop_after=100_000), serves(etag=None))
    assert left(tmp_path) == {"sam.pth": FILE}


def test_a_changed_file_of_the_same_size_fails_the_sum_and_the_next_run_is_clean(fetch, tmp_path) -> None:
    message = refused(fetch, serves(OTHER, etag=None, stop_after=100_000), serves(etag=None))
    assert SHA256 in message
    assert not list(tmp_path.iterdir())
    assert fetch(serves(etag=None))


def test_a_weak_etag_is_no_condition(fetch, server) -> None:
    """RFC 9110: If-Range needs a strong validator."""
    assert fetch(serves(etag='W/"1"', date="Tue, 04 Apr 2023 10:00:00 GMT", stop_after=9), serves(etag='W/"1"'))
    assert server.requests[1]["If-Range"] == "Tue, 04 Apr 2023 10:00:00 GMT"


def test_a_wrong_place_in_the_answer(fetch, tmp_path) -> None:
    wrong = status(206, Content_Range=f"bytes 7-{len(FILE) - 1}/{len(FILE)}", Content_Length="0")
    assert fetch(serves(stop_after=100_000), wrong, serves())
    assert left(tmp_path) == {"sam.pth": FILE}


# --- lengths ----------------------------------------------------------------------------------------------------------------------------


def test_a_length_that_is_too_long(fetch, server, tmp_path) -> None:
    """Fewer bytes come than are promised: one that answers ranges says so itself, of another the sum tells that all is there."""
    assert fetch(serves(claimed=len(FILE) + 5))
    (tmp_path / "sam.pth").unlink()
    assert fetch(serves(claimed=len(FILE) + 5, ranges=False))
    assert len(server.requests) == 2


def test_a_length_that_is_too_short(fetch, tmp_path) -> None:
    message = refused(fetch, serves(claimed=1000))
    assert "found 1000 bytes with sha256" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("claimed", ["many", "", "-5"])
def test_no_usable_length(fetch, tmp_path, claimed) -> None:
    assert fetch(serves(claimed=claimed))
    assert left(tmp_path) == {"sam.pth": FILE}


def test_a_part_that_is_longer_than_the_file(fetch, server, tmp_path) -> None:
    refused(fetch, serves(OTHER * 2, etag=None, stop_after=len(FILE) + 10), status(503))
    assert fetch(serves(etag=None))
    assert ranges(server) == [f"bytes={len(FILE) + 10}-", None]


def test_a_part_that_is_all_of_the_file(fetch, server, tmp_path) -> None:
    refused(fetch, serves(claimed=len(FILE) + 5, ranges=False, stop_after=len(FILE) - 1), status(503))
    with (tmp_path / "sam.pth.part").open("ab") as file:
        file.write(FILE[-1:])
    assert fetch(serves())
    assert ranges(server) == [f"bytes={len(FILE)}-"]


# --- something else ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [(OTHER, f"sha256 {hashlib.sha256(OTHER).hexdigest()}"), (LFS, "a git-lfs pointer"), (HTML, "a web page"), (b"", "an empty file")],
)
def test_another_file(fetch, tmp_path, content, said) -> None:
    message = refused(fetch, serves(content))
    assert said in message
    assert SHA256 in message
    assert not list(tmp_path.iterdir())


def test_the_md5_is_named_since_the_file_names_carry_it(fetch) -> None:
    assert f"md5 {hashlib.md5(OTHER).hexdigest()[:6]}" in refused(fetch, serves(OTHER))


def test_a_web_page_does_not_cost_what_has_come(fetch, tmp_path) -> None:
    """The page of a captive portal, with status 200."""
    message = refused(fetch, serves(stop_after=100_000), serves(HTML, kind="text/html; charset=utf-8", ranges=False))
    assert "found a web page (text/html)" in message
    assert left(tmp_path) == {"sam.pth.part": FILE[:100_000]}


@pytest.mark.parametrize("code", [403, 404, 410])
def test_no_such_file_is_said_at_once(fetch, server, tmp_path, code) -> None:
    message = refused(fetch, status(code))
    assert f"HTTP {code}" in message
    assert "--base_url" in message
    assert len(server.requests) == 1
    assert not list(tmp_path.iterdir())


def test_a_part_of_another_address_is_not_continued(server, tmp_path) -> None:
    server.answers = [serves(OTHER, stop_after=100_000), status(404)]
    for address in ("elsewhere.pth", "sam.pth"):
        with pytest.raises(UserError, match="404"):
            download(f"{server.url}/{address}", tmp_path / "sam.pth", SHA256, patience=QUICK)
    assert ranges(server) == [None, "bytes=100000-", None]


@pytest.mark.parametrize("notes", [None, "{", "[]", '{"link": 1}'])
def test_a_part_of_unknown_origin_is_not_continued(fetch, server, tmp_path, notes) -> None:
    (tmp_path / "sam.pth.part").write_bytes(OTHER[:5000])
    if notes is not None:
        (tmp_path / "sam.pth.part.json").write_text(notes)
    assert fetch(serves())
    assert ranges(server) == [None]


# --- the disk ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("there", "said"), [(OTHER, "sha256"), (LFS, "a git-lfs pointer"), (b"", "an empty file")])
def test_a_file_that_is_there_is_not_replaced_unasked(fetch, server, tmp_path, there, said) -> None:
    (tmp_path / "sam.pth").write_bytes(there)
    message = refused(fetch, serves())
    assert said in message
    assert "--overwrite" in message
    assert server.requests == []
    assert left(tmp_path) == {"sam.pth": there}
    refused(fetch, serves(OTHER), overwrite=True)
    assert left(tmp_path) == {"sam.pth": there}  # what comes must be right first
    assert fetch(serves(), overwrite=True)
    assert left(tmp_path) == {"sam.pth": FILE}


def test_a_folder_in_the_way(fetch, tmp_path) -> None:
    (tmp_path / "sam.pth").mkdir()
    assert "found a folder" in refused(fetch, serves())


def test_more_than_the_disk_holds_is_refused_before(fetch, tmp_path) -> None:
    assert "expected room for 1000000000.00 GB more" in refused(fetch, serves(claimed=10**18))
    assert left(tmp_path) == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_disk_that_fills_up(fetch, server, tmp_path) -> None:
    (tmp_path / "sam.pth.part").symlink_to("/dev/full")
    (tmp_path / "sam.pth.part.json").write_text(json.dumps({"url": f"{server.url}/sam.pth"}))
    assert "the disk is full" in refused(fetch, serves())
    assert not (tmp_path / "sam.pth").exists()


def test_a_folder_that_cannot_be_made(server, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        download(f"{server.url}/sam.pth", tmp_path / "file" / "sam.pth", SHA256, patience=QUICK)


# --- the program ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def program(server, monkeypatch) -> Callable[..., int]:
    """The program with the phantom file in place of all three, run against the server."""
    monkeypatch.setattr(download_weights, "SHA256", dict.fromkeys(download_weights.SHA256, SHA256))
    server.answers = [serves()]
    return lambda *argv: download_weights.main([*map(str, argv), "--base_url", f"{server.url}/sam/"])


@pytest.mark.parametrize(
    ("names", "fetched"), [((), ("vit_b",)), (("vit_h", "vit_b", "vit_h"), ("vit_h", "vit_b")), (("all",), ("vit_b", "vit_l", "vit_h"))]
)
def test_files_go_where_training_looks_for_them(program, server, tmp_path, monkeypatch, capsys, names, fetched) -> None:
    monkeypatch.chdir(tmp_path)
    assert program(*names) == 0
    files = [OFFICIAL_FILES[name] for name in fetched]
    assert [request["path"] for request in server.requests] == [f"/sam/{file}" for file in files]
    assert left(tmp_path / "checkpoints") == dict.fromkeys(files, FILE)
    assert capsys.readouterr().out.splitlines() == [f"checkpoints/{file}: fetched, sha256 {SHA256}" for file in files]
    assert program(*names) == 0
    assert "is there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [(("vit_x",), "expected vit_b, vit_l, vit_h or all"), (("--base_url", "ftp://x"), "https://"), (("--base_url", "file:///x"), "https://")],
)
def test_a_bad_command_line(flags, said, capsys) -> None:
    assert download_weights.main(list(flags)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_an_interrupt_keeps_what_has_come(program, server, tmp_path, capsys) -> None:
    release = threading.Event()

    def interrupts(handler: BaseHTTPRequestHandler) -> None:
        serves(stop_after=100_000)(handler)
        handler.wfile.flush()
        part = tmp_path / f"{OFFICIAL_FILES['vit_b']}.part"
        for _ in range(200):
            if part.exists():
                break
            release.wait(0.01)
        release.wait(0.3)  # the file is made and then entered; an interrupt between the two leaves it to the garbage collector
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        release.wait(5)

    server.answers = [interrupts]
    code = program("--output", tmp_path)
    release.set()
    assert code == 2
    assert "interrupted; what has come is kept" in capsys.readouterr().err
    assert f"{OFFICIAL_FILES['vit_b']}.part" in left(tmp_path)


def test_the_known_sums() -> None:
    """Of Meta's three files; the names carry the md5, so each name has a sum of its own."""
    assert download_weights.SHA256.keys() == OFFICIAL_FILES.keys()
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in download_weights.SHA256.values())
    assert [value[:8] for value in download_weights.SHA256.values()] == ["ec2df627", "3adcc431", "a7bf3b02"]
    assert download_weights.BASE_URL == "https://dl.fbaipublicfiles.com/segment_anything"
    assert os.path.basename(OFFICIAL_FILES["vit_b"]) == "sam_vit_b_01ec64.pth"
