"""A model behind an OpenAI-compatible endpoint: one question at a time, asked again where it was only busy.

The key stands in an environment variable, goes to the endpoint that was named and nowhere else, and is in no message.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from megatron_rmipo.errors import ConfigError, JudgeError

_LONGEST_WAIT_SECONDS = 60.0
_SHOWN_CHARACTERS = 300


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a judge said.

    Attributes:
        text: its answer.
        input_tokens, output_tokens: as the endpoint counts them; None where it does not.
    """

    text: str
    input_tokens: int | None
    output_tokens: int | None


class _Again(Exception):
    """The endpoint may answer the same question later."""

    def __init__(self, problem: str, after_seconds: float | None = None) -> None:
        super().__init__(problem)
        self.after_seconds = after_seconds


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_arguments: Any, **_names: Any) -> None:
        """Refuse: the key would go to another host."""


class Endpoint:
    """Asks a model; may be used by several threads at once.

    Args:
        base_url: address up to ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: name that the endpoint knows it by.
        key: secret of the endpoint; None where it wants none.
        fields: of the body, beside model and messages.
        timeout_seconds: for each attempt.
        num_retries: attempts after the first.
        first_wait_seconds: before the second attempt; doubled each time, and up to half as long again by chance.
        sleep: waits; tests wait otherwise.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        key: str | None,
        fields: Mapping[str, Any],
        timeout_seconds: float,
        num_retries: int,
        first_wait_seconds: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise ConfigError(f"--base-url {base_url}: an address such as http://localhost:8000/v1 is needed.")
        self._address = base_url.rstrip("/") + "/chat/completions"
        self._model, self._key, self._fields = model, key, fields
        self._timeout, self._num_retries = timeout_seconds, num_retries
        self._first_wait, self._sleep = first_wait_seconds, sleep
        self._opener = urllib.request.build_opener(_NoRedirects)

    def ask(self, prompt: str) -> Reply:
        """The model's answer to one message of the user.

        Raises:
            ConfigError: the endpoint refuses the request, as for a wrong key or name.
            JudgeError: it was busy, failed or answered nonsense each time.
        """
        for attempt in range(self._num_retries + 1):
            try:
                return self._attempt(prompt)
            except _Again as again:
                problem = again
            if attempt < self._num_retries:
                usual = self._first_wait * 2**attempt * (1 + random.random() / 2)
                wait = usual if problem.after_seconds is None else max(problem.after_seconds, usual)
                self._sleep(min(wait, _LONGEST_WAIT_SECONDS))
        raise JudgeError(f"{self._address}: {problem}, {self._num_retries + 1} times in a row")

    def _attempt(self, prompt: str) -> Reply:
        body = {"model": self._model, "messages": [{"role": "user", "content": prompt}], **self._fields}
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from None
        except TimeoutError:
            raise _Again(f"no answer within {self._timeout:g} seconds (--timeout)") from None
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            problem = (
                f"no answer within {self._timeout:g} seconds (--timeout)" if isinstance(reason, TimeoutError) else str(reason)
            )
            raise _Again(problem) from None
        return _read_reply(content)

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        with error:
            try:
                told = error.read(10_000).decode(errors="replace")
            except (OSError, http.client.HTTPException):
                told = ""
        # What an endpoint tells of a wrong key may repeat it.
        told = told.replace(self._key, "...") if self._key else told
        problem = f"status {error.code} ({error.reason}) {' '.join(told.split())[:_SHOWN_CHARACTERS]}".rstrip()
        if error.code == 429 or error.code >= 500:
            return _Again(problem, _seconds(error.headers.get("Retry-After")))
        return ConfigError(f"{self._address} refuses: {problem}. Look at --base-url, --judge-model, --extra-body and the key.")


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:  # a date
        return None


def _read_reply(content: bytes) -> Reply:
    try:
        found = json.loads(content)
        text = found["choices"][0]["message"]["content"]
        usage = found.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise _Again(f"not an answer of a chat model: {content[:_SHOWN_CHARACTERS]!r}") from None
    if text is None:
        # Nothing was said, as by a model that used all its tokens to think.
        text = ""
    if not isinstance(text, str):
        raise _Again(f"not a text: {str(text)[:_SHOWN_CHARACTERS]}")
    input_tokens, output_tokens = (count if isinstance(count, int) else None for count in counts)
    return Reply(text, input_tokens, output_tokens)
