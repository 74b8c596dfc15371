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


def check_file(path: Path, *, field: str) -> None:
    """
    Raises:
        UserError: the file, behind all links, lies in no folder that may be read.
    """
    setting = os.environ.get(FILES)
    if setting is None:
        return
    real = path.resolve()
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
    if host in names or ("public" in names and _is_public(host)):
        return
    raise UserError(
        f"{field}: the host {host!r} may not be asked by workers (allowed: {setting or 'none'}; private and link-local "
        f"addresses are not public); have {HOSTS} changed"
    )


def _is_public(host: str) -> bool:
    """Whether all addresses of a host are public ones; a host that is not known will not answer anyway."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return True
    return all(ipaddress.ip_address(str(entry[4][0]).partition("%")[0]).is_global for entry in found)


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
