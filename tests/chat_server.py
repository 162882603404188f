"""A server on this machine that speaks OpenAI's chat completions, well or in all the ways in which servers fail, and a clock that does not wait."""

import datetime
import email.utils
import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

GOOD = "The liver fills the right side of the picture and is brighter than the muscle behind it."

Behaviour = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Takes down every request and answers as the next behaviour of the server says, or well."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(SimpleNamespace(method=self.command, path=self.path, headers=dict(self.headers), body=body))
        self.close_connection = True
        (self.server.behaviours.pop(0) if self.server.behaviours else self.server.otherwise)(self)

    do_GET = do_POST  # what a followed redirect would come back as

    def answer(self, status: int, body: str | bytes, *, kind: str = "application/json", length: int | None = None, **headers: str) -> None:
        body = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[SimpleNamespace] = []
        self.behaviours: list[Behaviour] = []
        self.otherwise: Behaviour = says(GOOD)
        self.released = threading.Event()  # ends what hangs
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_: Any) -> None:
        """A client that hung up is no news."""


def completion(content: object, finish_reason: object = "stop", **message: object) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return json.dumps({"id": "1", "object": "chat.completion", "model": "m", "choices": [choice], "usage": {}})


def says(content: object, finish_reason: object = "stop", **message: object) -> Behaviour:
    return lambda handler: handler.answer(200, completion(content, finish_reason, **message))


def status(code: int, message: str = "no", **headers: str) -> Behaviour:
    return lambda handler: handler.answer(code, json.dumps({"error": {"message": message}}), **headers)


def raw(body: str | bytes, kind: str = "application/json") -> Behaviour:
    return lambda handler: handler.answer(200, body, kind=kind)


def hangs(handler: Handler) -> None:
    """Says nothing until it is released."""
    handler.server.released.wait(20)


def hangs_up(handler: Handler) -> None:
    """Promises a whole answer, sends half of it."""
    body = completion(GOOD).encode()
    handler.answer(200, body[: len(body) // 2], length=len(body))


def hangs_up_between_chunks(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n" + completion(GOOD).encode()[:10])


def speaks_no_http(handler: Handler) -> None:
    handler.wfile.write(b"220 mail.example ESMTP\r\n")


def drips(handler: Handler) -> None:
    """Never silent for long, never done."""
    handler.answer(200, b"", length=1000)
    while not handler.server.released.wait(0.05):
        handler.wfile.write(b" ")


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now, self.slept = 1000.0, [0.0]

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.now += seconds
        self.slept.append(seconds)


def in_an_hour(shift_s: float = 0) -> str:
    """The HTTP date of an hour from now, and some seconds more."""
    return email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3600 + shift_s), usegmt=True)
