"""What of an address may be shown: neither user and password nor the query, which may be a signature.

Only the standard library is imported: the form's checks use this each time Airflow parses the DAG.
"""

from __future__ import annotations

import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")


def without_login(uri: str) -> str:
    """The address without user and password; what has no scheme is returned as it is."""
    scheme = _SCHEME.match(uri)
    if scheme is None:
        return uri
    rest = uri[scheme.end() :]
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        rest = rest[authority.rindex("@") + 1 :]
    elif not _HOST.fullmatch(authority):  # a password with one of /?#, or an address that ends within its password
        rest = rest.rpartition("@")[2] if "@" in rest else "…"
    return scheme[0] + rest


def redact_uri(uri: str) -> str:
    """The address without user and password, query and fragment; what has no scheme is returned as it is."""
    if not _SCHEME.match(uri):
        return uri
    address = without_login(uri)
    shown = re.split(r"[?#]", address, maxsplit=1)[0]
    return f"{shown}?…" if address[len(shown) :].startswith("?") else shown


def redact_text(text: str) -> str:
    """Text with an address somewhere in it: that is redacted, and cut off where another one follows."""
    first = _SCHEME.search(text)
    if first is None:
        return text
    address = redact_uri(text[first.start() :])
    second = _SCHEME.search(address, first.end() - first.start())
    return text[: first.start()] + (f"{address[: second.start()]}…" if second else address)


_ENTRY = re.compile(r"[^=@]+(=(\w+|/[^@]*|models:/.*|[A-Za-z][A-Za-z0-9+.-]*://.*))?")
_CHECKSUM = re.compile(r"#sha256=[0-9a-fA-F]{64}$")


def redact_models(text: str) -> str:
    """A list of models with their weights, each address of which is redacted but for its checksum."""
    entries = [entry.strip() for entry in text.split(",")]
    if not all(map(_ENTRY.fullmatch, entries)):  # a comma within an address, perhaps
        return redact_text(text)
    return ",".join(map(_redact_entry, entries))


def redact_address(text: str) -> str:
    """An address, redacted but for its checksum."""
    shown, checksum = redact_text(text), _CHECKSUM.search(text)
    return shown if checksum is None or shown.endswith(checksum[0]) else shown + checksum[0]


def _redact_entry(entry: str) -> str:
    name, equals, weights = entry.partition("=")
    return name + equals + redact_address(weights)
