"""Which files, hosts and buckets a worker reads for whoever triggers a DAG. Its environment decides.

Not set, they allow what the worker's user may read, as suits one's own machine; docker-compose.yml sets them.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter

from mlpipe.errors import UserError

FILES = "MLPIPE_ALLOWED_FILES"
"""Folders, separated by colons, whose files may be read; empty: none."""
HOSTS = "MLPIPE_ALLOWED_HOSTS"
"""`public`, or names of hosts, separated by commas; `public` allows each whose addresses are all public."""
BUCKETS = "MLPIPE_ALLOWED_BUCKETS"
"""Names of S3 buckets, separated by commas."""
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
"""Ends in an IPv4 address (RFC 6052)."""


def check_file(path: Path, *, field: str) -> None:
    """
    Raises:
        UserError: the file, behind all links, lies in no folder that may be read.
    """
    setting = os.environ.get(FILES)
    if setting is None:
        return
    try:
        real = path.resolve()
    except (ValueError, OSError, RuntimeError) as error:  # a null byte, links in a circle
        raise UserError(f"{field}: {str(path)[:200]!r} is not a usable path ({error}); check it") from error
    if not any(real.is_relative_to(Path(folder).resolve()) for folder in setting.split(":") if folder):
        folders = setting.replace(":", ", ") or "none"
        raise UserError(
            f"{field}: {path} may not be read by workers (allowed folders: {folders}); move it there, upload it with "
            f"`mlpipe run`, or have {FILES} changed"
        )


def check_bucket(bucket: str, *, field: str) -> None:
    """
    Raises:
        UserError: the bucket is none that may be read.
    """
    setting = os.environ.get(BUCKETS)
    if setting is not None and bucket not in _names(setting):
        raise UserError(
            f"{field}: the bucket {bucket!r} may not be read by workers (allowed: {setting or 'none'}); copy the data "
            f"there, or have {BUCKETS} changed"
        )


def check_host(address: str, *, field: str) -> None:
    """
    Raises:
        UserError: the host of an `http(s)://` address is none that may be asked.
    """
    setting = os.environ.get(HOSTS)
    if setting is None:
        return
    host = (urlsplit(address).hostname or "").lower()
    names = _names(setting)
    if host in names or ("public" in names and _is_public(host, address, field)):
        return
    raise UserError(
        f"{field}: the host {host!r} may not be asked by workers (allowed: {setting or 'none'}; private and link-local "
        f"addresses are not public); have {HOSTS} changed"
    )


def _is_public(host: str, address: str, field: str) -> bool:
    """Whether all IP addresses of a host are public ones; a host that is not known will not answer anyway.

    Raises:
        UserError: it is not known here, but a proxy will be asked, which may know it as a private one.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        if requests.utils.select_proxy(address, requests.utils.get_environ_proxies(address)):
            raise UserError(
                f"{field}: the host {host!r} is not known here, so whether it is public only the proxy can tell; check "
                f"the address, or have {host!r} added to {HOSTS}"
            ) from None
        return True
    return all(_is_global(ipaddress.ip_address(str(entry[4][0]).partition("%")[0])) for entry in found)


def _is_global(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        embedded = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            embedded = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if embedded or address.is_site_local:
            return bool(embedded and embedded.is_global)
    return address.is_global


def _names(setting: str) -> set[str]:
    return {name.strip().lower() for name in setting.split(",") if name.strip()}


class _Checked(HTTPAdapter):
    """Looks at the host before each request, also those that a redirect leads to."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self._field = field

    def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
        """As `HTTPAdapter`."""
        check_host(str(request.url), field=self._field)
        return super().send(request, *args, **kwargs)


def web_session(field: str) -> requests.Session:
    """A session that asks allowed hosts alone.

    Args:
        field: the parameter that addresses come from; errors begin with it.
    """
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, _Checked(field))
    return session
