"""Pictures and questions to a model behind an endpoint that speaks the OpenAI chat protocol.

The ``openai`` client carries the request where it is installed (extra ``judge``); otherwise the standard
library does, with the same request and the same limits.  The key is read from the environment at every request
and stands nowhere else: not in settings, protocols, messages or errors.  It never leaves the machine unencrypted,
and redirects are not followed, so that key and picture go to no other host than the named one.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..errors import JudgeError, SettingError

__all__ = ["Endpoint", "Refused", "png_bytes", "png_url", "question_key"]

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)
"""Answers of a server after which asking again may help."""
MOST_BYTES = 8 * 2**20
"""Of an answer; a longer one is no answer to a question about a picture."""
LOCAL = ("localhost", "127.0.0.1", "::1")
ACCOUNT = ("OpenAI-Organization", "OpenAI-Project")
"""What the client tells from the environment beside the key; it is not sent."""


class Refused(Exception):
    """One request failed; ``again`` says whether another try may help, ``wait`` how long the server asks for."""

    def __init__(self, reason: str, again: bool, wait: float | None = None) -> None:
        super().__init__(reason)
        self.again, self.wait = again, wait


def question_key(question: str, picture: np.ndarray) -> str:
    """Names a question about a picture, for answers that are kept.

    By the shape too: two flat pictures, one upright and one lying, have the same bytes.
    """
    named = f"{question}|{picture.shape}|".encode()
    return hashlib.sha256(named + picture.tobytes()).hexdigest()


def png_bytes(picture: np.ndarray) -> bytes:
    """A picture (uint8 ``(h, w, 3)``) as PNG, which loses nothing."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG")
    return buffer.getvalue()


def png_url(picture: np.ndarray) -> str:
    """A picture (uint8 ``(h, w, 3)``) as a ``data:`` address of its PNG."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(picture)).decode("ascii")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A chat model behind an address.

    Attributes:
        url: Base address up to and with the version, for example ``http://127.0.0.1:8000/v1``.
        model: The name the server knows the model by.
        key_variable: Environment variable that holds the key; a server that wants none needs none.
        timeout: Seconds a request may take.
        retries: Further tries after time-outs, lost connections and answers that say to come again.
        max_tokens: Longest answer.
        sleep: Waits between tries; a test puts its own here.

    Raises:
        SettingError: The address is no http(s) address, or holds a user name or password.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 4
    max_tokens: int = 200
    sleep: Callable[[float], None] = dataclasses.field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingError(f"endpoint url {self.url!r} is no http or https address")
        if parts.username or parts.password:
            raise SettingError(
                f"the endpoint url holds a user name or password; put the key into ${self.key_variable}"
            )
        if not self.model:
            raise SettingError("an endpoint needs the name of its model")
        if self.timeout <= 0 or self.retries < 0:
            raise SettingError(
                "an endpoint needs a timeout above 0 and no negative number of retries"
            )

    @property
    def host(self) -> str:
        """The host, for messages."""
        return urllib.parse.urlsplit(self.url).hostname or ""

    def ask(self, question: str, picture: np.ndarray | None = None, system: str = "") -> str:
        """The text the model answers to a question about a picture (uint8 ``(h, w, 3)``).

        Raises:
            JudgeError: The endpoint refused, could not be reached in all tries, or gave no text.
        """
        content: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if picture is not None:
            content.insert(0, {"type": "image_url", "image_url": {"url": png_url(picture)}})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        body = {
            "model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": self.max_tokens,
        }  # fmt: skip
        return self._text(self._asked(body))

    def _asked(self, body: Mapping[str, Any]) -> Any:
        send = _by_client if _client() is not None else _by_hand
        for tried in range(self.retries + 1):
            try:
                return send(self, body, self._key())
            except Refused as error:
                if not error.again or tried == self.retries:
                    times = f" after {tried + 1} tries" if tried else ""
                    raise JudgeError(
                        f"{self.model} at {self.host} could not be asked{times}: {error}"
                    ) from None
                # Twice as long each time; what the server asks for wins, up to a minute.
                self.sleep(min(60.0, 0.5 * 2**tried if error.wait is None else error.wait))
        raise AssertionError("unreachable")

    def _key(self) -> str | None:
        key = os.environ.get(self.key_variable, "").strip() or None  # files end in a line feed
        secure = self.url.startswith("https:") or self.host in LOCAL
        if key is not None and not secure:
            raise JudgeError(
                f"the key in ${self.key_variable} would go to {self.host} unencrypted; use https, or unset it"
            )
        if key is not None and not (key.isascii() and key.isprintable()):
            raise JudgeError(
                f"the key in ${self.key_variable} holds characters that no request can carry; allowed are printable "
                "ASCII characters"
            )
        return key

    def _text(self, found: Any) -> str:
        try:
            text = found["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if isinstance(text, list):  # some servers answer in parts
            text = "".join(str(part.get("text", "")) for part in text if isinstance(part, dict))
        if not isinstance(text, str) or not text.strip():
            raise JudgeError(f"{self.model} at {self.host} answered without any text")
        return text


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """No redirect is followed: the key is meant for one host."""
        return None


def _by_hand(endpoint: Endpoint, body: Mapping[str, Any], key: str | None) -> Any:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(
        endpoint.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers
    )
    # A server on this machine is not asked through a proxy.
    proxies = [urllib.request.ProxyHandler({})] if endpoint.host in LOCAL else []
    opener = urllib.request.build_opener(_Stay, *proxies)
    try:
        with opener.open(request, timeout=endpoint.timeout) as answer:
            raw = answer.read(MOST_BYTES + 1)
            left = (
                answer.length if len(raw) <= MOST_BYTES else 0
            )  # bytes it spoke of and did not send
    except urllib.error.HTTPError as error:
        wait = _seconds(error.headers.get("Retry-After"))
        raise Refused(f"it answered {error.code}", error.code in AGAIN, wait) from None
    except TimeoutError:
        raise Refused(f"no answer within {endpoint.timeout:g} seconds", True) from None
    except (OSError, urllib.error.URLError) as error:
        if isinstance(getattr(error, "reason", None), TimeoutError):  # while it connected
            raise Refused(f"no answer within {endpoint.timeout:g} seconds", True) from None
        raise Refused(f"no connection ({getattr(error, 'reason', error)})", True) from None
    except http.client.HTTPException:
        raise Refused("its answer broke off", True) from None
    if left:
        raise Refused("its answer broke off", True)
    return _read(raw)


def _read(raw: bytes) -> Any:
    if len(raw) > MOST_BYTES:
        raise Refused("its answer is too long", False)
    try:
        return json.loads(raw)
    except ValueError:
        raise Refused("its answer is not JSON", False) from None


def _client() -> Any:
    """The ``openai`` package, or ``None``."""
    try:
        import openai
    except ImportError:
        return None
    return openai


def _by_client(endpoint: Endpoint, body: Mapping[str, Any], key: str | None) -> Any:
    openai = _client()

    def plain(request: Any) -> None:
        # The client wants some key, and names the account that the environment names, to whoever is asked.
        for name in ("Authorization", *ACCOUNT)[key is not None :]:
            request.headers.pop(name, None)

    # Left to itself, the client follows redirects and asks a server on this machine through a proxy.
    line = openai.DefaultHttpxClient(
        follow_redirects=False, trust_env=endpoint.host not in LOCAL, timeout=endpoint.timeout,
        event_hooks={"request": [plain]},
    )  # fmt: skip
    # Retries are counted here; the answer is read as it comes, because some servers answer in another form.
    with openai.OpenAI(
        base_url=endpoint.url, api_key=key or "none", max_retries=0, http_client=line
    ) as made:
        try:
            with made.chat.completions.with_streaming_response.create(
                **body, timeout=endpoint.timeout
            ) as answer:
                return _read(_start(answer.iter_bytes()))
        except (openai.APIError, Refused) as error:
            raise _refused(openai, endpoint, error) from None
        except (
            Exception
        ) as error:  # of the library that the client reads with, which depends on its version
            if "Timeout" in type(error).__name__:
                raise Refused(f"no answer within {endpoint.timeout:g} seconds", True) from None
            raise Refused("its answer broke off", True) from None


def _start(pieces: Iterable[bytes]) -> bytes:
    """An answer, or as much of it as shows that it is too long."""
    raw = bytearray()
    for piece in pieces:
        raw += piece
        if len(raw) > MOST_BYTES:
            break
    return bytes(raw)


def _refused(openai: Any, endpoint: Endpoint, error: Exception) -> Refused:
    """An error of the client in our words; its own may show the request."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, openai.APITimeoutError):
        return Refused(f"no answer within {endpoint.timeout:g} seconds", True)
    if isinstance(error, openai.APIStatusError):
        wait = _seconds(error.response.headers.get("Retry-After"))
        return Refused(f"it answered {error.status_code}", error.status_code in AGAIN, wait)
    return Refused("no connection", True)


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:  # a date
        return None
