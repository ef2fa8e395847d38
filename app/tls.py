"""Whose certificate is asked for, and by whom it must be signed. docs/security.md has the table, and what was tried."""

import ipaddress
import os
import re
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

PRIVATE_NAMES = (".internal", ".local", ".localhost")
# The authorities that this machine trusts: Debian, Fedora, Alpine and macOS.
BUNDLES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")


def is_private(host: str) -> bool:
    """Whether only a private network can have this host: `localhost`, `postgres`, `db.internal`, 10.0.0.1, a socket."""
    try:
        return not ipaddress.ip_address(host.strip("[]").partition("%")[0]).is_global
    except ValueError:
        name = host.rstrip(".").lower()
        return "." not in name or name.startswith("/") or name.endswith(PRIVATE_NAMES)


def _postgres_hosts(url: str) -> list[str]:
    parts = urlsplit(url)
    hosts = [re.sub(r":\d*$", "", host) for host in parts.netloc.rpartition("@")[2].split(",")]
    return [*hosts, *dict(parse_qsl(parts.query)).get("host", "").split(",")]


def postgres_url(url: str) -> str:
    """The same URL, which asks a server with a public name for a certificate that is valid and its own.

    libpq by itself asks nobody (`sslmode=prefer`). That is left for private networks, whose servers mostly have none;
    what the URL or PGSSLMODE says counts.
    """
    query, added = dict(parse_qsl(urlsplit(url).query)), {}
    mode = query.get("sslmode") or os.environ.get("PGSSLMODE")
    if mode is None and not all(map(is_private, _postgres_hosts(url))):
        added["sslmode"] = mode = "verify-full"
    if mode in ("verify-ca", "verify-full") and not (query.get("sslrootcert") or os.environ.get("PGSSLROOTCERT")):
        # Not `system`: the libpq in psycopg's wheels looks for that where no system has it.
        known = (os.environ.get("SSL_CERT_FILE", ""), Path.home() / ".postgresql/root.crt", *BUNDLES)
        added["sslrootcert"] = next((str(path) for path in known if path and Path(path).exists()), "system")
    if not added:
        return url
    return f"{url}{'&' if query else '?'}{urlencode(added, safe='/', quote_via=quote)}"


def unverified(name: str, url: str) -> str | None:
    """What to warn of: a connection into which somebody in between could look."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    if parts.scheme == "rediss" and query.get("ssl_cert_reqs", "").lower().endswith(("none", "optional")):
        return f"{name}: ssl_cert_reqs={query['ssl_cert_reqs']}: nobody looks whether this is the right Redis"
    if parts.scheme == "redis" and not is_private(parts.hostname or ""):
        return f"{name}: redis:// to a public name: password and messages can be read on the way; use rediss://"
    if parts.scheme.startswith("postgres"):
        mode = query.get("sslmode")
        # With a root certificate libpq takes `require` for verify-ca.
        if mode == "require" and "sslrootcert" not in query:
            return f"{name}: sslmode=require: nobody looks whether this is the right PostgreSQL"
        if mode in ("disable", "allow", "prefer") and not all(map(is_private, _postgres_hosts(url))):
            return f"{name}: sslmode={mode} to a public name: whoever stands in between can read everything"
    return None
