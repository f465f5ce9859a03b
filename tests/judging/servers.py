"""A stand-in for an OpenAI-compatible endpoint, on this machine, that fails as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What it does with the next requests, one each: a status, or a way to fail.
Fault = int | str


def prefer_longer(prompt: str) -> str:
    """A judge to whom length is all."""
    answers = [prompt.split(f"<answer_of_{name}>\n")[1].split(f"\n</answer_of_{name}>")[0] for name in "AB"]
    verdict = "C" if len(answers[0]) == len(answers[1]) else "A" if len(answers[0]) > len(answers[1]) else "B"
    return f"[[B]] might be, but no.\n[[{verdict}]]"


class Judge:
    """What the server has seen, and what it says."""

    def __init__(self, says: Callable[[str], str], faults: list[Fault]) -> None:
        self.says, self.faults = says, faults
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.url = ""

    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


@contextmanager
def running(says: Callable[[str], str] = prefer_longer, faults: list[Fault] | None = None) -> Iterator[Judge]:
    """A server that has its address as ``url``."""
    judge = Judge(says, list(faults or []))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with judge.lock:
                judge.bodies.append(body)
                judge.headers.append(dict(self.headers))
                fault = judge.faults.pop(0) if judge.faults else None
            if fault == "silence":
                time.sleep(1.5)
                return
            if isinstance(fault, int):
                told = f"the key {self.headers.get('Authorization')} is not to be told".encode()
                self.send_response(fault)
                if fault == 429:
                    self.send_header("Retry-After", "7")
                if fault == 302:
                    self.send_header("Location", "http://localhost:9/elsewhere")
                self._finish(told)
                return
            self.send_response(200)
            if fault == "nonsense":
                self._finish(b"<html>")
                return
            choices = [{"message": {"role": "assistant", "content": judge.says(body["messages"][0]["content"])}}]
            self._finish(json.dumps({"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 2}}).encode())

        def _finish(self, content: bytes) -> None:
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """Quiet where a client is gone before its answer."""

    server = Server(("localhost", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    judge.url = f"http://localhost:{server.server_address[1]}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
