"""`python -m app.api.health`: exit code 0 while the API in this container answers."""

import os
import sys
from http.client import HTTPConnection

if __name__ == "__main__":
    connection = HTTPConnection("127.0.0.1", int(os.environ.get("PORT") or 8000), timeout=5)
    try:
        connection.request("GET", "/health/live")
        status = connection.getresponse().status
    except OSError as error:
        sys.exit(f"the API does not answer: {error}")
    sys.exit(0 if status == 200 else f"the API answers {status}")
