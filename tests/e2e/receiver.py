"""Somebody else's API: refuses the first call of each path, takes the second, and prints what it got, a line a call.

Calls under /taken/ are taken at once, and answered two seconds later: so long has a test to hold up the caller's end.
GET shows all calls.
"""

import json
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SEEN: Counter[str] = Counter()
CALLS: list[dict[str, Any]] = []


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        SEEN[self.path] += 1
        key = self.headers["Idempotency-Key"]
        status = 503 if SEEN[self.path] == 1 and not self.path.startswith("/taken/") else 200
        if self.path.startswith("/taken/"):
            time.sleep(2)
        CALLS.append({"path": self.path, "key": key, "at": time.time(), "status": status})
        print(json.dumps({"path": self.path, "key": key, "body": json.loads(body)}), flush=True)
        self._answer(status, b"thanks")

    def do_GET(self) -> None:
        self._answer(200, json.dumps(CALLS).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


ThreadingHTTPServer(("", 8080), Handler).serve_forever()
