"""Reports written by a language model: over HTTP from an endpoint that speaks OpenAI's chat completions, or by a local transformers model.

A generator gives one answer to one prompt, with or without the picture of a slice. `Writer` asks it until the answer can be a report: requests
are spaced, failures of the server are waited out, and what is no report (a refusal, a cut-off text, a web page) is asked for again. Labels
have no way in: a generator gets the prompt and the image, and nothing else.
"""

import base64
import email.utils
import http.client
import io
import json
import random
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from pgsam.errors import UserError
from pgsam.prior.provenance import read_text

# What is asked for under the names that the built-in reports use (prior/data/organs.json).
WORDINGS = {
    "long": "one paragraph of 60 to 100 words on place, neighbours, shape, size, brightness, and what it is confused with.",
    "report": "one paragraph of 60 to 100 words in the style of a radiologist's dictated report of a normal finding.",
    "short": "one or two sentences, 20 to 40 words.",
    "sentence": "one sentence of at most 20 words.",
    "terms": "five to eight other names, Latin or English, separated by semicolons; nothing else.",
    "location": "one or two sentences on its place and neighbours only.",
    "appearance": "one or two sentences on its shape, size and brightness only.",
    "clinical": "three or four sentences in plain words, as one would explain it to a patient.",
    "sketch": "telegraphic notes in half sentences, about 40 words.",
}

_BACKOFF_S = (1.0, 60.0)  # first and longest wait before another attempt
_LONGEST_WAIT_S = 600.0  # a server that wants more (a daily quota) ends the run: it can be resumed
_MOST_BYTES = 16 << 20  # of an answer
_TRANSIENT = (408, 425, 429)  # besides 5xx
_REFUSAL = re.compile(
    r"\bI(?:'m| am) (?:very |really |so )?(?:sorry|unable|not able|afraid)\b|\bI (?:cannot|can't|can not|won't|will not|do not|don't)\b|\bas an AI\b"
    r"|\bI(?:'m| am) an? (?:AI|language model|assistant)\b|\bI apologi[sz]e\b|\blanguage model\b|^sorry\b",
    re.IGNORECASE,
)
_THOUGHTS = re.compile(r"\s*<think>.*?</think>", re.DOTALL)  # reasoning models write it before the answer


class Unusable(Exception):
    """An answer that is no report; the message says why."""


class Unavailable(Exception):
    """The server did not answer, or asked to come back later: after `retry_after_s` seconds, if it said so."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Answer(NamedTuple):
    """What a model said and why it stopped ("stop", "length", ...; None if it does not say)."""

    text: str
    finish_reason: str | None


class Generator(Protocol):
    """Something that answers prompts. `label` names it in the reports; it holds no key, no path and no user name."""

    label: str

    def ask(self, prompt: str, image: np.ndarray | None, attempt: int) -> Answer:
        """One answer to a prompt and, perhaps, a slice [H, W] in [0, 1]; `attempt` counts from 0.

        Raises:
            Unavailable, Unusable: asking again may help.
            UserError: it will not.
        """
        ...


# --- prompts and pictures ---------------------------------------------------------------------------------------------------------------


def read_prompt(path: str | Path, names: tuple[str, ...]) -> str:
    """The text of a prompt file, known to hold every placeholder `{name}` of `names` and no other.

    Raises:
        UserError: no such file, no UTF-8 text, empty, or other placeholders.
    """
    text = read_text(Path(path)).strip()
    if not text:
        raise UserError(f"{path}: expected a prompt, found an empty file; write one")
    found = set(_PLACEHOLDER.findall(text))
    if found != set(names):
        wanted, written = (", ".join(f"{{{name}}}" for name in some) for some in (names, sorted(found)))
        raise UserError(f"{path}: expected the placeholders {wanted}, found {written or 'none'}; correct the prompt")
    return text


_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def fill_prompt(template: str, values: Mapping[str, str]) -> str:
    """`template` with each `{name}` replaced by its value; nothing in a value is replaced again."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def to_png(image: np.ndarray) -> bytes:
    """A slice [H, W] as an 8-bit grey PNG: 0 is black, 1 is white, what lies outside is clipped."""
    file = io.BytesIO()
    Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)).save(file, format="PNG")
    return file.getvalue()


# --- answers ----------------------------------------------------------------------------------------------------------------------------


def report_of(answer: Answer, min_words: int, max_words: int) -> str:
    """The report that an answer is, on one line.

    Raises:
        Unusable: it was cut off or filtered, is empty, too short or too long, holds HTML, or declines the task.
    """
    if answer.finish_reason in ("length", "content_filter"):
        hint = "; raise --max_tokens" if answer.finish_reason == "length" else ""
        raise Unusable(f"the answer was cut off (finish_reason {answer.finish_reason}){hint}")
    text = _one_line(_THOUGHTS.sub("", answer.text, count=1))
    if not text:
        raise Unusable("the answer is empty")
    if re.search(r"<!doctype|</?(?:html|body|think)\b", text, re.IGNORECASE):
        raise Unusable(f"the answer is not plain text: {excerpt(text)}")
    if _REFUSAL.search(text.replace("\u2019", "'")):
        raise Unusable(f"the answer declines or speaks of itself: {excerpt(text)}")
    words = sum(any(letter.isalnum() for letter in word) for word in text.split())
    if not min_words <= words <= max_words:
        raise Unusable(f"the answer has {words} words, expected {min_words} to {max_words} (--min_words, --max_words): {excerpt(text)}")
    return text


def _one_line(text: str) -> str:
    """White space, control characters and lone surrogates (which no file can hold) as single spaces."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def excerpt(text: str, length: int = 160) -> str:
    """The beginning of a text on one line, fit for a message."""
    line = _one_line(text)
    return line if len(line) <= length else line[: length - 3] + "..."


@dataclass
class Writer:
    """Asks a generator until the answer can be a report.

    Args:
        retries: attempts after the first.
        interval_s: least time between the starts of two requests, the repeated ones too.
        min_words, max_words: of a report.
    """

    generator: Generator
    retries: int
    interval_s: float
    min_words: int
    max_words: int
    _next_start_s: float = float("-inf")

    def report(self, prompt: str, image: np.ndarray | None = None) -> str:
        """The text of one report.

        Raises:
            Unusable, Unavailable: the last attempt's failure.
            UserError: the server refuses, or wants to be left alone for longer than this is worth waiting.
        """
        for attempt in range(self.retries + 1):
            self._wait_for_turn()
            try:
                return report_of(self.generator.ask(prompt, image, attempt), self.min_words, self.max_words)
            except (Unusable, Unavailable) as error:
                if attempt == self.retries:
                    raise
                wait_s = min(_BACKOFF_S[0] * 2**attempt, _BACKOFF_S[1]) * random.uniform(0.5, 1)
                asked_s = (error.retry_after_s or 0.0) if isinstance(error, Unavailable) else 0.0
                if asked_s > _LONGEST_WAIT_S:
                    raise UserError(f"{error}: the server asks to come back in {asked_s:.0f} s; run the same command again then") from error
                time.sleep(asked_s + wait_s)
        raise AssertionError("unreachable")

    def _wait_for_turn(self) -> None:
        now = time.monotonic()
        if now < self._next_start_s:
            time.sleep(self._next_start_s - now)
        self._next_start_s = max(now, self._next_start_s) + self.interval_s


# --- an endpoint over HTTP --------------------------------------------------------------------------------------------------------------


def check_base_url(base_url: str) -> str:
    """The URL without its trailing slash.

    Raises:
        UserError: it is not http or https, has no host, or carries a user, a password, a query or the path of the call itself.
    """
    try:
        parts = urlsplit(base_url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise UserError(f"--base_url: expected a URL such as http://127.0.0.1:8000/v1, found one that cannot be read ({error})") from error
    if "@" in parts.netloc:
        raise UserError("--base_url: expected no user or password in the URL; put the key into a variable and name that with --api_key_env")
    if parts.query or parts.fragment:
        raise UserError("--base_url: expected no ? or # in the URL; it is what precedes /chat/completions")
    if parts.scheme not in ("http", "https") or not host or re.search(r"[^!-~]", base_url):
        raise UserError(f"--base_url {excerpt(base_url)}: expected http://... or https://..., such as http://127.0.0.1:8000/v1")
    url = base_url.rstrip("/")
    if url.endswith("/chat/completions"):
        raise UserError(f"--base_url {base_url}: expected what precedes /chat/completions; leave that off")
    return url


def check_key(key: str, variable: str) -> str:
    """The key without white space around it; a UserError names the variable, never the key, if there is none or it cannot stand in a header."""
    key = key.strip()
    if not key:
        raise UserError(f"--api_key_env {variable}: expected a key in that environment variable, found it unset or empty; export it first")
    if re.search(r"[^!-~]", key):
        raise UserError(f"--api_key_env {variable}: expected a key of plain characters without spaces in that variable, found others")
    return key


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Following one would send the key and the image wherever the answer points to."""

    def redirect_request(self, *_: Any) -> None:
        return None


class ChatEndpoint:
    """A server that speaks OpenAI's chat completions.

    Args:
        base_url: what precedes `/chat/completions`; nothing is added to it or taken from it but a trailing slash.
        model: name of the model, as the server knows it.
        key: sent as bearer token; never part of a message.
        timeout_s: longest silence of the server, and longest time for a whole answer once it began.
        max_tokens: length of an answer, sent as `token_limit_name`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None = None,
        timeout_s: float = 120.0,
        max_tokens: int = 512,
        token_limit_name: str = "max_tokens",
    ) -> None:
        self.url = check_base_url(base_url) + "/chat/completions"
        self.label = f"{_name_of(model)} @ {urlsplit(self.url).hostname}"
        self._model, self._key, self._timeout_s = model, key, timeout_s
        self._limit = {token_limit_name: max_tokens}
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ask(self, prompt: str, image: np.ndarray | None, attempt: int) -> Answer:
        """One request; see `Generator`."""
        content: str | list[dict[str, Any]] = prompt
        if image is not None:
            picture = "data:image/png;base64," + base64.b64encode(to_png(image)).decode("ascii")
            content = [{"type": "text", "text": prompt}, {"type": "image_url", "image_url": {"url": picture}}]
        body = {"model": self._model, "messages": [{"role": "user", "content": content}], **self._limit}
        answer = self._answer_of(self._post(json.dumps(body).encode("utf-8")))
        if self._key and self._key in answer.text:
            raise Unusable("the answer repeats the API key")
        return answer

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "pgsam"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return self._read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error) from None  # the cause holds the request, and that the key
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise Unavailable(f"{self.url}: no answer ({self._clean(str(reason) or type(reason).__name__)})") from None

    def _read(self, response: Any) -> bytes:
        """The body, unless it takes longer than the timeout or is no size for a text."""
        deadline, chunks, size = time.monotonic() + self._timeout_s, [], 0
        while chunk := response.read1(1 << 16):
            chunks.append(chunk)
            size += len(chunk)
            if time.monotonic() > deadline:
                raise TimeoutError(f"timed out after {self._timeout_s:g} s")
            if size > _MOST_BYTES:
                raise Unusable(f"the server sent more than {_MOST_BYTES >> 20} MiB")
        return b"".join(chunks)

    def _refused(self, error: urllib.error.HTTPError) -> Exception:
        """What an HTTP status means for the run: to be tried again, or not."""
        try:
            said = self._said(self._read(error))
        except (OSError, http.client.HTTPException, Unusable):
            said = ""
        message = f"{self.url}: HTTP {error.code} {self._clean(str(error.reason))}" + (f": {said}" if said else "")
        if error.code in _TRANSIENT or error.code >= 500:
            return Unavailable(message, retry_after_s(error.headers.get("Retry-After")))
        hints = {
            401: "; check the key (--api_key_env)",
            403: "; check the key and its rights (--api_key_env)",
            404: "; check --model, and --base_url: it is what precedes /chat/completions, often ending in /v1",
        }
        if 300 <= error.code < 400:
            return UserError(f"{message}; redirects are not followed, give the final address as --base_url")
        return UserError(message + hints.get(error.code, ""))

    def _said(self, body: bytes) -> str:
        """The message in the body of an error, shortened."""
        text = body.decode("utf-8", errors="replace")
        try:
            content = json.loads(text)
        except ValueError:
            return self._clean(re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", text, flags=re.DOTALL | re.IGNORECASE))
        inner = content.get("error", content) if isinstance(content, dict) else content
        message = inner.get("message", inner.get("detail", inner)) if isinstance(inner, dict) else inner
        return self._clean(message if isinstance(message, str) else json.dumps(message))

    def _clean(self, text: str) -> str:
        """A text from outside, fit for a message: without the key, on one line, short."""
        return excerpt(text.replace(self._key, "***") if self._key else text)

    def _answer_of(self, body: bytes) -> Answer:
        text = body.decode("utf-8", errors="replace")
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise Unusable(f"the server sent no JSON: {self._clean(text) or 'nothing'}") from None
        try:
            choice = content["choices"][0]
            message = choice["message"]
            said, reason, refusal = message["content"], choice.get("finish_reason"), message.get("refusal")
        except (KeyError, IndexError, TypeError, AttributeError):
            raise Unusable(f"the server sent no choices[0].message.content: {self._clean(text)}") from None
        if refusal:
            raise Unusable(f"the answer declines: {self._clean(str(refusal))}")
        if not isinstance(said, str | None):
            raise Unusable(f"the server sent no text as content: {self._clean(text)}")
        return Answer(said or "", reason if isinstance(reason, str) else None)


def retry_after_s(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3: a number or a date); None if there is none that can be read."""
    if value is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _name_of(model: str) -> str:
    """A model's name without the folders of the machine it lies on; `owner/name` stays."""
    path = Path(model)
    return path.resolve().name if path.is_absolute() or path.is_dir() else model


# --- a model on this machine ------------------------------------------------------------------------------------------------------------


class LocalModel:
    """A transformers model from a folder or the local cache; nothing is downloaded, and no code that lies with a model is run.

    Args:
        name: folder, or a name in the cache: a text generation model, with `images` an image-text-to-text model.
        device: torch device.
        max_tokens: length of an answer.

    The first attempt at a prompt is greedy, so that it can be repeated; later ones are sampled.

    Raises:
        UserError: it is not there or of another kind.
    """

    def __init__(self, name: str, *, images: bool, device: str = "cpu", max_tokens: int = 512) -> None:
        import transformers

        self.label = f"{_name_of(name)} @ transformers {transformers.__version__}"
        self._max_tokens, self._images = max_tokens, images
        kinds = (transformers.AutoProcessor, transformers.AutoModelForImageTextToText)
        reader, kind = kinds if images else (transformers.AutoTokenizer, transformers.AutoModelForCausalLM)
        try:
            self._reader: Any = reader.from_pretrained(name, local_files_only=True)
            model: Any = kind.from_pretrained(name, local_files_only=True)
            self._model = model.to(device).eval()
        except Exception as error:  # whatever a damaged folder makes the library raise
            what = "an image-text-to-text" if images else "a text generation"
            raise UserError(
                f"--local_model {name}: expected {what} model of transformers in that folder or in the local cache, cannot load it "
                f"({excerpt(str(error))}); models are not downloaded here, fetch it first (hf download NAME)"
            ) from error
        if images and not getattr(self._reader, "chat_template", None):
            raise UserError(f"--local_model {name}: expected a model with a chat template, found none; take one that is tuned to follow instructions")

    def ask(self, prompt: str, image: np.ndarray | None, attempt: int) -> Answer:
        """One answer; see `Generator`."""
        import torch

        inputs = self._inputs(prompt, image).to(self._model.device)
        tokenizer = getattr(self._reader, "tokenizer", self._reader)
        ends = self._model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        try:
            with torch.inference_mode():
                tokens = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=attempt > 0, pad_token_id=padding)
        except (RuntimeError, IndexError, ValueError) as error:
            hint = "is there enough memory, and does the model take a prompt of this length?"
            raise UserError(f"{self.label}: cannot answer ({excerpt(str(error))}); {hint}") from error
        said = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        cut = len(said) >= self._max_tokens and said[-1] not in ends
        return Answer(tokenizer.decode(said, skip_special_tokens=True), "length" if cut else "stop")

    def _inputs(self, prompt: str, image: np.ndarray | None) -> Any:
        if not getattr(self._reader, "chat_template", None):
            return self._reader(prompt, return_tensors="pt")
        content: str | list[dict[str, Any]] = prompt
        if image is not None:
            picture = Image.open(io.BytesIO(to_png(image))).convert("RGB")
            content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
        return self._reader.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
