"""The script against a real server on this machine that speaks the chat-completions API, and against tiny local models."""

import base64
import datetime
import functools
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image

from datasets.labels import SYNAPSE8_NAMES
from pgsam.prior import generate
from pgsam.prior.organ_reports import read_organ_reports
from pgsam.prior.slice_reports import read_slice_reports
from scripts import generate_reports
from tests.chat_server import (
    GOOD,
    FakeTime,
    Handler,
    Server,
    drips,
    hangs,
    hangs_up,
    hangs_up_between_chunks,
    in_an_hour,
    raw,
    says,
    speaks_no_http,
    status,
)

KEY = "sk-sesame-0123456789"
TRAIN = [f"case0005_slice{i:03d}" for i in range(3)]
TEST = [f"case0008_slice{i:03d}" for i in range(3)]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """No test waits, and none asks a proxy."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    fake = FakeTime()
    monkeypatch.setattr(generate, "time", fake)
    return fake


# --- data and calls ---------------------------------------------------------------------------------------------------------------------


def write_data(folder: Path, label_seed: int = 0) -> dict[str, np.ndarray]:
    """A prepared folder in TransUNet's layout without a manifest; the images [H, W] by key."""
    images = np.random.default_rng(7).random((2, 3, 20, 24)).astype(np.float32)
    labels = np.random.default_rng(label_seed).integers(0, 9, images.shape).astype(np.float32)
    for name in ("train_npz", "test_vol_h5", "lists"):
        (folder / name).mkdir(parents=True)
    for i, name in enumerate(TRAIN):
        np.savez(folder / "train_npz" / f"{name}.npz", image=images[0, i], label=labels[0, i])
    with h5py.File(folder / "test_vol_h5" / "case0008.npy.h5", "w") as file:
        file["image"], file["label"] = images[1], labels[1]
    (folder / "lists" / "train.txt").write_text("\n".join(TRAIN))
    (folder / "lists" / "test_vol.txt").write_text("case0008")
    return dict(zip(TRAIN + TEST, images.reshape(6, 20, 24), strict=True))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_data(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def run(call: Callable[..., Any]) -> Callable[..., Any]:
    """`run("--organs", ...)` gives exit code, stdout and stderr."""
    return functools.partial(call, "scripts.generate_reports")


@pytest.fixture
def slices(run: Callable[..., Any], server: Server, data: Path, tmp_path: Path) -> Callable[..., Any]:
    """Reports of the three training slices into out.jsonl."""
    return lambda *more: run("--root_path", data, "--output", tmp_path / "out.jsonl", "--base_url", server.url, "--model", "m", *more)


def asked(server: Server) -> list[dict[str, Any]]:
    return [json.loads(request.body) for request in server.requests]


def picture(body: dict[str, Any]) -> np.ndarray:
    """The pixels that a request carries."""
    (message,) = body["messages"]
    text, image = message["content"]
    assert (message["role"], text["type"], image["type"]) == ("user", "text", "image_url")
    head, encoded = image["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as png:
        assert (png.format, png.mode) == ("PNG", "L")
        return np.asarray(png)


def as_sent(image: np.ndarray) -> np.ndarray:
    """A slice stored as LAS: its rows grow to anterior, which belongs on top."""
    return np.round(image[::-1].astype(np.float64) * 255).astype(np.uint8)


# --- what is asked and what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "keys"), [("--root_path", TRAIN), ("--volume_path", TEST)])
def test_every_slice_is_sent_as_a_picture_and_its_report_written(run, server, tmp_path, monkeypatch, flag, keys) -> None:
    images = write_data(tmp_path / "data")
    server.behaviours = [says(f"{GOOD} Slice {i}.") for i in range(3)]
    monkeypatch.setenv("SESAME", KEY)
    outcome = run(flag, tmp_path / "data", "--output", tmp_path / "r.jsonl", "--base_url", server.url, "--model", "org/m", "--api_key_env", "SESAME")
    assert outcome.code == 0, outcome
    for request in server.requests:
        assert (request.method, request.path) == ("POST", "/v1/chat/completions")
        assert request.headers["Authorization"] == f"Bearer {KEY}"
        assert request.headers["Content-Type"] == "application/json"
    for body, key in zip(asked(server), keys, strict=True):
        assert set(body) == {"model", "messages", "max_tokens"}
        assert body["model"] == "org/m"
        assert np.array_equal(picture(body), as_sent(images[key]))
    reports = read_slice_reports(tmp_path / "r.jsonl")
    assert {key: reports.text(key) for key in keys} == {key: f"{GOOD} Slice {i}." for i, key in enumerate(keys)}
    for report in reports.reports.values():
        origin = report.provenance
        assert (origin.generator, origin.saw_labels) == ("org/m @ 127.0.0.1", False)
        assert origin.prompt == asked(server)[0]["messages"][0]["content"][0]["text"]
        assert abs((datetime.date.fromisoformat(origin.created) - datetime.datetime.now(datetime.UTC).date()).days) <= 1
    assert KEY not in outcome.out + outcome.err + (tmp_path / "r.jsonl").read_text()


def test_what_is_sent_does_not_depend_on_the_labels(run, server, tmp_path) -> None:
    for seed in (0, 1):
        write_data(tmp_path / f"data{seed}", label_seed=seed)
        for flag in ("--root_path", "--volume_path"):
            files = ("--output", tmp_path / f"{seed}.jsonl", flag, tmp_path / f"data{seed}")
            assert run(*files, "--base_url", server.url, "--model", "m").code == 0
    bodies = [request.body for request in server.requests]
    assert len(bodies) == 12
    assert bodies[:6] == bodies[6:]
    assert (tmp_path / "0.jsonl").read_text() == (tmp_path / "1.jsonl").read_text()
    assert read_slice_reports(tmp_path / "0.jsonl").missing(TRAIN + TEST) == []


@pytest.mark.parametrize(("axes", "stored"), [("LAS", np.s_[::-1, :]), ("LPS", np.s_[:, :]), ("RAS", np.s_[::-1, ::-1]), ("RPI", np.s_[:, ::-1])])
def test_the_manifest_says_what_is_up(slices, server, data, axes, stored) -> None:
    cases = {"case0005": {"orientation": axes}}
    (data / "manifest.json").write_text(json.dumps({"class_names": ["a"], "cases": cases}))
    assert slices().code == 0
    image = np.load(data / "train_npz" / f"{TRAIN[0]}.npz")["image"]
    assert np.array_equal(picture(asked(server)[0]), np.round(image[stored].astype(np.float64) * 255))
    slices("--orientation", "RPS").refused("--orientation RPS", axes)


def test_a_scan_in_hounsfield_units_is_windowed_and_shown_as_radiologists_do(run, server, tmp_path) -> None:
    """The marker is placed by nibabel's affine: 100 HU, at the patient's left, anterior, in the upper slice."""
    scan = np.full((8, 10, 2), -1000, np.int16)  # (i, j, k) of an RPI file: left is i = 7, anterior j = 9, superior k = 0
    scan[6, 7, 0] = 100
    affine = np.array([[-1, 0, 0, 5], [0, 1, 0, -5], [0, 0, -5, 9], [0, 0, 0, 1.0]])
    assert nibabel.aff2axcodes(affine) == ("L", "A", "I")
    nibabel.save(nibabel.Nifti1Image(scan, affine), tmp_path / "a scan.nii.gz")
    out = tmp_path / "r.jsonl"
    assert run("-i", tmp_path / "a scan.nii.gz", "--window", -100, 300, "--output", out, "--base_url", server.url, "--model", "m").code == 0
    assert list(read_slice_reports(out).reports) == ["a scan_slice000", "a scan_slice001"]
    lower, upper = (picture(body) for body in asked(server))
    assert not lower.any()
    assert np.argwhere(upper).tolist() == [[10 - 1 - 7, 6]]  # near the top, on the right
    assert upper.max() == 128  # (100 + 100) / 400 of 255, rounded


def test_organ_reports_are_what_the_reader_of_organ_reports_takes(run, server, tmp_path) -> None:
    out = tmp_path / "organs.json"
    server.otherwise = lambda h: says(f"{GOOD} Answer number {len(h.server.requests)} of the server.")(h)
    flags = ("--output", out, "--base_url", server.url + "/", "--model", "m", "--modality", "MR of the {liver}")
    assert run("--dataset", "Synapse", "--wordings", "short", *flags).code == 0
    reports = read_organ_reports(out, SYNAPSE8_NAMES)
    assert tuple(reports.organs) == SYNAPSE8_NAMES
    assert reports.wordings() == ("short",)
    for number, (organ, body) in enumerate(zip(SYNAPSE8_NAMES, asked(server), strict=True), start=1):
        prompt = body["messages"][0]["content"]
        assert organ in prompt
        assert "MR of the {liver}" in prompt
        report = reports.organs[organ]["short"]
        assert report.text == f"{GOOD} Answer number {number} of the server."
        assert (report.provenance.prompt, report.provenance.generator, report.provenance.saw_labels) == (prompt, "m @ 127.0.0.1", False)
    assert {r.path for r in server.requests} == {"/v1/chat/completions"}
    assert all("Authorization" not in r.headers for r in server.requests)
    # More organs and wordings later, by another model: what is there stays as it was.
    again = run("--organs", "Oesophagus", "liver", "esophagus", "--wordings", "long", "short", *flags[:4], "--model", "other")
    assert again.code == 0, again
    assert len(server.requests) == 8 + 3
    more = read_organ_reports(out)
    assert {organ: more.organs[organ]["short"] for organ in SYNAPSE8_NAMES} == {organ: reports.organs[organ]["short"] for organ in SYNAPSE8_NAMES}
    assert set(more.organs["liver"]) == set(more.organs["esophagus"]) == {"long", "short"}
    assert more.organs["liver"]["long"].provenance.generator == "other @ 127.0.0.1"
    prompts = {body["messages"][0]["content"] for body in asked(server)}
    assert len(prompts) == 11, "each organ and wording is asked for in its own words"


# --- trouble that passes ----------------------------------------------------------------------------------------------------------------


def assert_complete(outcome: Any, server: Server, tmp_path: Path, requests: int) -> None:
    assert outcome.code == 0, outcome
    assert len(server.requests) == requests
    reports = read_slice_reports(tmp_path / "out.jsonl")
    assert reports.missing(TRAIN) == []
    assert {report.text for report in reports.reports.values()} == {GOOD}
    assert len(reports) == len(TRAIN)


def test_a_rate_limit_is_waited_out(slices, server, tmp_path, clock) -> None:
    server.behaviours = [status(429, Retry_After="7"), says(GOOD), status(429, Retry_After=in_an_hour(-3600 + 40))]
    assert_complete(slices(), server, tmp_path, 5)
    first, second = (wait for wait in clock.slept if wait)
    assert 7 <= first <= 8
    assert 38 <= second <= 41


def test_a_server_that_wants_a_day_of_rest_gets_it(slices, server, tmp_path, clock) -> None:
    server.behaviours = [says(GOOD), status(429, "quota of the day", Retry_After="86400")]
    slices().refused("quota of the day", "86400 s", "run the same command again")
    assert clock.slept == [0.0]
    assert len(read_slice_reports(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize("code", [408, 500, 502, 503, 529])
def test_a_server_error_is_tried_again_after_a_growing_wait(slices, server, tmp_path, clock, code) -> None:
    server.behaviours = [status(code)] * 4
    assert_complete(slices(), server, tmp_path, 7)
    waits = [wait for wait in clock.slept if wait]
    assert [2**n / 2 <= wait <= 2**n for n, wait in enumerate(waits)] == [True] * 4
    assert waits != [round(wait) for wait in waits], "no jitter"


@pytest.mark.parametrize("behaviour", [hangs, drips, hangs_up, hangs_up_between_chunks, speaks_no_http, lambda handler: None])
def test_silence_and_torn_connections_are_tried_again(slices, server, tmp_path, monkeypatch, behaviour) -> None:
    monkeypatch.setattr(generate, "time", SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=lambda seconds: None))
    server.behaviours = [behaviour]
    started = time.monotonic()
    assert_complete(slices("--timeout", 0.3), server, tmp_path, 4)
    assert time.monotonic() - started < 5


GARBAGE = {
    "HTML": raw("<html><body>Bad gateway</body></html>", "text/html"),
    "nothing": raw(""),
    "not JSON": raw("{'choices': []}"),
    "binary": raw(b"\xff\xfe\x00\x01"),
    "a list": raw("[1, 2]"),
    "a string": raw('"choices"'),
    "no choices": raw('{"id": "1"}'),
    "empty choices": raw('{"choices": []}'),
    "choices null": raw('{"choices": null}'),
    "no message": raw('{"choices": [{"text": "old API"}]}'),
    "content null": says(None),
    "content number": says(3),
    "content parts": says([{"type": "text", "text": GOOD}]),
    "empty": says(" \n "),
    "cut off": says(GOOD, "length"),
    "filtered": says(GOOD, "content_filter"),
    "refusal field": says(GOOD, refusal="I will not."),
    "sorry": says("I'm sorry, but I can't assist with medical pictures of this kind."),
    "curly": says("I\u2019m unable to look at pictures, but I can help with other questions."),
    "of itself": says("As an AI language model, nothing can be said about the picture by me."),
    "HTML content": says("<!DOCTYPE html><p>The liver lies at the right side of it.</p>"),
    "only thoughts": says("<think>The user wants a report about the liver.</think>"),
    "unfinished thoughts": says("<think>The user wants a report about the liver. Let me see."),
    "too short": says("Liver, bright, right."),
    "no words": says("- - * * ... --- ### ___ 。 !"),
    "too long": says("liver " * 400),
    "deep": raw("[" * 100_000),
}


@pytest.mark.parametrize("kind", list(GARBAGE))
def test_garbage_is_asked_for_again_and_never_written(slices, server, tmp_path, kind) -> None:
    server.behaviours = [says(GOOD), *[GARBAGE[kind]] * 3, says(GOOD)]
    outcome = slices("--retries", 2)
    outcome.refused("1 of 3 reports failed", tmp_path / "out.jsonl", "run the same command again")
    assert f"failed: {TRAIN[1]}: " in outcome.out
    assert len(server.requests) == 5
    reports = read_slice_reports(tmp_path / "out.jsonl")
    assert reports.missing(TRAIN) == [TRAIN[1]]
    assert {report.text for report in reports.reports.values()} == {GOOD}
    server.behaviours = [GARBAGE[kind]]
    assert_complete(slices("--retries", 2), server, tmp_path, 7)
    assert np.array_equal(picture(asked(server)[5]), picture(asked(server)[1])), "only the missing one is asked for"


# --- trouble that stays -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [400, 401, 403, 404, 422])
def test_a_refusal_of_the_server_ends_the_run_at_once_without_the_key(slices, server, tmp_path, monkeypatch, code) -> None:
    monkeypatch.setenv("SESAME", f" {KEY}\n")  # as `export SESAME=$(cat file)` may leave it
    message = f"Incorrect API key provided: {KEY}.\n\x1b[31mWhat now? " + "blah " * 200
    server.behaviours = [says(GOOD), status(code, message)]
    outcome = slices("--api_key_env", "SESAME")
    line = outcome.refused(f"HTTP {code}", "Incorrect API key provided: ***.", "...")
    assert len(line) < 600
    assert KEY not in outcome.out + line
    assert "\x1b" not in line
    assert len(server.requests) == 2
    assert server.requests[1].headers["Authorization"] == f"Bearer {KEY}"
    assert len(read_slice_reports(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize("body", ["<html><style>p {}</style><p>Who are you?</p></html>", '{"detail": "Who are you?"}', '{"error": "Who are you?"}'])
def test_the_servers_words_are_found_in_any_form(slices, server, body) -> None:
    server.behaviours = [lambda handler: handler.answer(403, body)]
    assert slices().refused("HTTP 403").count("Who are you?") == 1


def test_an_answer_that_holds_the_key_is_not_written(slices, server, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("SESAME", KEY)
    server.otherwise = says(f"{GOOD} Your key is {KEY}.")
    outcome = slices("--api_key_env", "SESAME", "--retries", 0)
    assert KEY not in outcome.out + outcome.refused("3 of 3")
    assert not (tmp_path / "out.jsonl").exists()


def test_redirects_are_not_followed(slices, server, monkeypatch) -> None:
    """The key would go along."""
    monkeypatch.setenv("SESAME", KEY)
    for code in (301, 302, 303, 307, 308):
        server.requests.clear()
        server.behaviours = [status(code, Location=f"{server.url}/elsewhere")]
        slices("--api_key_env", "SESAME").refused(f"HTTP {code}", "redirects are not followed")
        assert len(server.requests) == 1


def test_a_run_that_loses_its_server_is_resumed_where_it_stopped(run, server, data, tmp_path) -> None:
    """Six slices of which one is done; then the server fails for good: the rest are not tried one by one for hours."""
    names = [f"case0005_slice{i:03d}" for i in range(6)]
    for i, name in enumerate(names):
        np.savez(data / "train_npz" / f"{name}.npz", image=np.full((4, 5), i / 10, np.float32), label=np.zeros((4, 5)))
    (data / "lists" / "train.txt").write_text("\n".join(names))
    flags = ("--root_path", data, "--output", tmp_path / "out.jsonl", "--base_url", server.url, "--model", "m", "--retries", 1)
    server.behaviours, server.otherwise = [says(GOOD)], status(503, "out of memory")
    outcome = run(*flags)
    outcome.refused("3 of 6 reports failed", "given up", "2 not tried")
    assert "out of memory" in outcome.out
    assert len(server.requests) == 1 + 3 * 2
    assert list(read_slice_reports(tmp_path / "out.jsonl").reports) == names[:1]
    with (tmp_path / "out.jsonl").open("a") as file:
        file.write('{"key": "case0005_slice001", "text": "The li')  # as a kill would leave it
    server.otherwise = says(GOOD)
    server.requests.clear()
    assert run(*flags, "--limit", 2).code == 0
    assert len(server.requests) == 2
    assert run(*flags).code == 0
    assert [int(picture(body)[0, 0]) for body in asked(server)] == [round(255 * i / 10) for i in range(1, 6)]
    assert list(read_slice_reports(tmp_path / "out.jsonl").reports) == names
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(*flags).code == 0
    assert len(server.requests) == 5
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_failures_here_and_there_do_not_end_a_run(run, server, tmp_path) -> None:
    down, empty, good = status(503), says(""), says(GOOD)
    server.behaviours = [down, down, good, down, down, empty, empty, empty, down, down, good]
    organs = [f"organ{i}" for i in range(len(server.behaviours))]
    flags = ("--wordings", "short", "--output", tmp_path / "o.json", "--base_url", server.url, "--model", "m", "--retries", 0)
    assert "given up" not in run("--organs", *organs, *flags).refused("9 of 11 reports failed")
    assert list(read_organ_reports(tmp_path / "o.json").organs) == ["organ2", "organ10"]


def test_a_server_that_is_not_there(run, data, tmp_path) -> None:
    with Server() as gone:
        url = gone.url
    outcome = run("--root_path", data, "--output", tmp_path / "o.jsonl", "--base_url", url, "--model", "m", "--retries", 1)
    outcome.refused("3 of 3 reports failed")
    assert "refused" in outcome.out


def test_ctrl_c_keeps_what_is_done(slices, server, tmp_path) -> None:
    main_thread = threading.main_thread().ident

    def interrupts(handler: Handler) -> None:
        signal.pthread_kill(main_thread, signal.SIGINT)
        hangs(handler)

    server.behaviours = [says(GOOD), interrupts]
    outcome = slices()
    assert outcome.code == 130
    assert len(outcome.err.splitlines()) == 1
    assert "run the same command again" in outcome.err
    assert list(read_slice_reports(tmp_path / "out.jsonl").reports) == TRAIN[:1]
    server.released.set()
    assert_complete(slices(), server, tmp_path, 4)


def test_organ_reports_survive_a_failure_and_are_completed(run, server, tmp_path) -> None:
    flags = ("--organs", "liver", "spleen", "--output", tmp_path / "o.json", "--base_url", server.url, "--model", "m", "--retries", 0)
    server.behaviours = [says(GOOD), says("no"), says(GOOD), says("no")]
    run(*flags).refused("2 of 4 reports failed")
    assert {organ: list(w) for organ, w in read_organ_reports(tmp_path / "o.json").organs.items()} == {"liver": ["long"], "spleen": ["long"]}
    assert run(*flags).code == 0
    assert len(server.requests) == 6
    assert read_organ_reports(tmp_path / "o.json").wordings() == ("long", "short")


# --- pace -------------------------------------------------------------------------------------------------------------------------------


def test_requests_per_minute(slices, server, clock) -> None:
    started = clock.now
    assert slices("--requests_per_minute", 12).code == 0
    assert clock.now - started == pytest.approx(10)
    assert slices("--requests_per_minute", 0).refused("--requests_per_minute 0")


# --- errors before the first request ----------------------------------------------------------------------------------------------------


def test_dry_run_shows_what_would_be_done_and_does_nothing(slices, server, tmp_path) -> None:
    outcome = slices("--dry_run", "--modality", "abdominal MR of a cat")
    assert outcome.code == 0
    for words in ("3 reports, 0 there, 3 to make", TRAIN[0], "20 x 24", "one axial slice of abdominal MR of a cat"):
        assert words in outcome.out
    assert not server.requests
    assert not (tmp_path / "out.jsonl").exists()


def test_bad_flags_are_refused_before_anything_is_sent(run, server, data, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("EMPTY", " ")
    monkeypatch.setenv("BROKEN", "sk-se\nsame")
    good = {"--root_path": data, "--output": tmp_path / "o.jsonl", "--base_url": server.url, "--model": "m"}
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "other.jsonl").write_text("hello\n")
    (tmp_path / "plain.txt").write_text("Describe the slice.")
    (tmp_path / "organ.txt").write_text("Describe the {organ} on {modality}.")
    (tmp_path / "empty.txt").write_text("")
    cases: list[tuple[dict[str, object], tuple[str, ...]]] = [
        ({"--base_url": None, "--model": None}, ("--base_url", "--local_model")),
        ({"--local_model": "x"}, ("one of --base_url",)),
        ({"--model": None}, ("--model",)),
        ({"--base_url": "ftp://127.0.0.1/v1"}, ("http",)),
        ({"--base_url": "file:///etc/passwd"}, ("http",)),
        ({"--base_url": "127.0.0.1:8000/v1"}, ("http",)),
        ({"--base_url": "http:///v1"}, ("http",)),
        ({"--base_url": "http://127.0.0.1:port/v1"}, ("--base_url",)),
        ({"--base_url": f"{server.url}/chat/completions"}, ("leave that off",)),
        ({"--base_url": server.url + "?api-version=1"}, ("? or #",)),
        ({"--base_url": server.url + "\r\nX: y"}, ("--base_url",)),
        ({"--base_url": f"http://me:{KEY}@127.0.0.1/v1"}, ("--api_key_env",)),
        ({"--api_key_env": "NOT_SET_ANYWHERE"}, ("NOT_SET_ANYWHERE", "unset")),
        ({"--api_key_env": "EMPTY"}, ("EMPTY", "unset or empty")),
        ({"--api_key_env": "BROKEN"}, ("BROKEN", "plain characters")),
        ({"--output": tmp_path / "o.json"}, (".jsonl",)),
        ({"--output": tmp_path / "folder.jsonl"}, ("found a folder",)),
        ({"--output": tmp_path / "none" / "o.jsonl"}, ("its folder",)),
        ({"--output": tmp_path / "other.jsonl"}, ("other.jsonl", "line 1")),
        ({"--prompt_file": tmp_path / "plain.txt"}, ("{modality}", "found none")),
        ({"--prompt_file": tmp_path / "organ.txt"}, ("expected the placeholders {modality}, found {modality}, {organ}",)),
        ({"--prompt_file": tmp_path / "empty.txt"}, ("empty",)),
        ({"--prompt_file": tmp_path / "absent.txt"}, ("absent.txt",)),
        ({"--root_path": tmp_path / "absent"}, ("absent",)),
        ({"--list_dir": tmp_path}, ("train.txt",)),
        ({"--wordings": "long"}, ("--wordings", "--organs")),
        ({"--window": (0, 1)}, ("--window", "--input")),
        ({"--device": "cpu"}, ("--device", "--local_model")),
        ({"--orientation": "SAL"}, ("axial",)),
        ({"--min_words": 9, "--max_words": 8}, ("--max_words 8",)),
        ({"--retries": -1}, ("--retries",)),
        ({"--timeout": 0}, ("--timeout",)),
        ({"--timeout": "nan"}, ("--timeout",)),
        ({"--limit": 0}, ("--limit",)),
        ({"--organs": "liver"}, ("not allowed with",)),
        ({"--root_path": None}, ("required",)),
        ({"--root_path": None, "--organs": "", "--output": tmp_path / "o.json"}, ("--organs",)),
        ({"--root_path": None, "--input": tmp_path / "absent.nii.gz"}, ("absent.nii.gz",)),
        ({"--root_path": None, "--organs": "liver", "--list_dir": tmp_path, "--output": tmp_path / "o.json"}, ("--list_dir",)),
        ({"--api_key": KEY}, ("unrecognized",)),
    ]
    for change, needles in cases:
        flags = {name: value for name, value in (good | change).items() if value is not None}
        argv = [part for name, value in flags.items() for part in (name, *(value if isinstance(value, tuple) else (value,)))]
        line = run(*argv).refused(*needles)
        assert "sk-se" not in line or "--api_key" in change, "a key stands in a message"
    assert not server.requests


@pytest.mark.parametrize("damage", ["absent", "garbage", "hounsfield"])
def test_damaged_data_are_named(slices, server, data, tmp_path, damage) -> None:
    """Headers are checked before the first request; pixels when their turn comes, and what is done stays."""
    path = data / "train_npz" / f"{TRAIN[1]}.npz"
    if damage == "absent":
        path.unlink()
    elif damage == "garbage":
        path.write_bytes(b"PK" + bytes(100))
    else:
        np.savez(path, image=np.full((4, 4), 300.0), label=np.zeros((4, 4)))
    slices().refused(TRAIN[1], "raw HU" if damage == "hounsfield" else path)
    assert len(server.requests) == (damage == "hounsfield")
    assert (tmp_path / "out.jsonl").exists() == (damage == "hounsfield")


def test_the_slice_prompt_asks_for_what_is_visible_and_forbids_inventing() -> None:
    text = (generate_reports.PROMPTS / "slice_report.txt").read_text()
    assert "visible in this slice" in text
    assert "Do not invent" in text
    assert re.findall(r"\{\w+\}", text) == ["{modality}"]


# --- local models -----------------------------------------------------------------------------------------------------------------------


def make_tokenizer(*special: str, **more: Any) -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [*special, "[UNK]", *[f"word{i}" for i in range(60)]]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **more)


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    make_tokenizer("</s>").save_pretrained(tmp_path / "gpt")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 512, "vocab_size": 62}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.5))
    model.generation_config.forced_eos_token_id = 0  # else a random model never ends
    model.save_pretrained(tmp_path / "gpt")
    return tmp_path / "gpt"


def test_a_local_model_writes_organ_reports(run, gpt, tmp_path) -> None:
    from transformers import pipeline

    out = tmp_path / "organs.json"
    flags = ("--organs", "liver", "--output", out, "--local_model", gpt, "--device", "cpu", "--max_tokens", 12, "--min_words", 1)
    outcome = run(*flags, "--wordings", "long", "--retries", 0)
    assert outcome.code == 0, outcome
    report = read_organ_reports(out).organs["liver"]["long"]
    assert re.fullmatch(r"gpt @ transformers \S+", report.provenance.generator)
    oracle = pipeline("text-generation", model=str(gpt), device="cpu")
    (expected,) = oracle(report.provenance.prompt, do_sample=False, max_new_tokens=12, max_length=None, return_full_text=False)
    assert report.text == expected["generated_text"].strip()
    assert report.text
    assert str(tmp_path) not in out.read_text()


def test_a_local_answer_that_does_not_end_is_cut_off(run, gpt, tmp_path) -> None:
    path = gpt / "generation_config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "forced_eos_token_id"}))
    flags = ("--organs", "liver", "--output", tmp_path / "o.json", "--local_model", gpt, "--device", "cpu", "--max_tokens", 4, "--min_words", 1)
    outcome = run(*flags, "--retries", 1)
    assert outcome.code == 2
    assert "2 of 2 reports failed" in outcome.err.splitlines()[-1]
    assert "raise --max_tokens" in outcome.out


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    import torch
    from transformers import CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    torch.manual_seed(0)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %}"
    )
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        make_tokenizer("</s>", "<image>", additional_special_tokens=["<image>"]),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(tmp_path / "llava")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=28, patch_size=14, projection_dim=16, initializer_range=1.0)
    text = LlamaConfig(**sizes, vocab_size=63, eos_token_id=0, bos_token_id=0, initializer_range=1.0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=1))
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = 0
    model.save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def test_a_local_model_that_sees_writes_slice_reports(run, data, llava, tmp_path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    out = tmp_path / "o.jsonl"
    flags = ("--local_model", llava, "--device", "cpu", "--max_tokens", 8, "--min_words", 1, "--retries", 0)
    outcome = run("--root_path", data, "--output", out, *flags)
    assert outcome.code == 0, outcome
    processor, model = AutoProcessor.from_pretrained(llava), AutoModelForImageTextToText.from_pretrained(llava)
    for key, report in read_slice_reports(out).reports.items():
        pixels = as_sent(np.load(data / "train_npz" / f"{key}.npz")["image"])
        inputs = processor(images=Image.fromarray(pixels).convert("RGB"), text=f"<image> {report.provenance.prompt}", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert report.text == processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_a_local_model_of_the_wrong_kind_or_absent(run, data, gpt, tmp_path) -> None:
    flags = ("--root_path", data, "--output", tmp_path / "o.jsonl", "--device", "cpu")
    run(*flags, "--local_model", gpt).refused("image-text-to-text")
    run(*flags, "--local_model", tmp_path / "none").refused("none", "fetch it first")
    damaged = shutil.copytree(gpt, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    run("--organs", "liver", "--output", tmp_path / "o.json", "--local_model", damaged).refused("a text generation model", "cannot load it")
