"""What these tests share with those of the HTTP interface."""

from tests.integration.api.conftest import serve, serve_process

__all__ = ["serve", "serve_process"]
