"""Somebody else's API: refuses the first call of each path, takes the second, and prints what it got, a line a call."""

import json
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CALLS: Counter[str] = Counter()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        CALLS[self.path] += 1
        key = self.headers["Idempotency-Key"]
        print(json.dumps({"path": self.path, "key": key, "body": json.loads(body)}), flush=True)
        answer = b"thanks"
        self.send_response(503 if CALLS[self.path] == 1 else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


ThreadingHTTPServer(("", 8080), Handler).serve_forever()
