"""Addresses of shards that are not files: which are opened, and how.

What dataset.json calls a shard is not trusted: only addresses of the schemes that `data.schemes` names are opened.
Schemes that run commands (`pipe:` runs a shell) are opened only where the user's own configuration names them.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.parse
import urllib.request
from contextlib import closing
from http.client import HTTPException, InvalidURL
from typing import Any, Protocol, cast, runtime_checkable

from webdataset.gopen import gopen

from mwt.config import SAFE_SCHEMES
from mwt.errors import InputError

TIMEOUT = 60.0
"""Seconds without an answer after which a connection counts as broken."""
_MAX_INFO = 2**28  # bytes of a dataset.json


@runtime_checkable
class ByteStream(Protocol):
    """What is asked of an open file or connection."""

    def read(self, size: int = -1, /) -> bytes:
        """Up to so many bytes; none at the end."""

    def close(self) -> None:
        """Give it back."""


def scheme_of(address: str) -> str | None:
    """The scheme of a URL; None for a path."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", address)
    return found[1].lower() if found else None


def shown(address: str) -> str:
    """An address as messages may show it: without password and query, where signatures and tokens stand."""
    if scheme_of(address) == "pipe":
        return address
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:  # http://[
        return f"{scheme_of(address)}:…"
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def joined(base: str, name: str) -> str:
    """The address of the file `name` in the folder `base`, whose query (a signature) is kept."""
    try:
        parts = urllib.parse.urlsplit(base)
    except ValueError as error:
        raise InputError(f"{shown(base)} cannot be opened: it is no valid address.") from error
    return urllib.parse.urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{urllib.parse.quote(name)}"))


def check_scheme(address: str, schemes: tuple[str, ...]) -> str:
    """The scheme of a URL.

    Raises:
        InputError: it is not among `schemes`.
    """
    scheme = scheme_of(address)
    if scheme is None or scheme not in schemes:
        runs = " It runs a command on this machine." if scheme == "pipe" else ""
        raise InputError(
            f"{shown(address)} is not opened: {scheme}: is not among data.schemes ({', '.join(schemes)}).{runs} "
            f"If you trust it, name it: data.schemes=[{','.join((*schemes, str(scheme)))}]."
        )
    return scheme


class _Redirections(urllib.request.HTTPRedirectHandler):
    """Follows a server to addresses that the configuration allows, and no others."""

    def __init__(self, schemes: tuple[str, ...]) -> None:
        self._schemes = schemes

    def redirect_request(self, request: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """As of the base class."""
        check_scheme(newurl, self._schemes)
        return super().redirect_request(request, fp, code, msg, headers, newurl)


def open_url(address: str, schemes: tuple[str, ...] = SAFE_SCHEMES) -> ByteStream:
    """A stream of the bytes at a URL: http(s) by the standard library, `pipe:` by webdataset, others by fsspec.

    Raises:
        InputError: a scheme that is not among `schemes`, or one for which a package is missing; or nothing is there.
        OSError: the connection failed; trying again may help.
    """
    scheme = check_scheme(address, schemes)
    if scheme == "pipe":
        return cast(ByteStream, gopen(address))
    if scheme in ("http", "https"):
        try:
            opener = urllib.request.build_opener(_Redirections(schemes))
            return cast(ByteStream, opener.open(address, timeout=TIMEOUT))
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (408, 425, 429) or error.code >= 500:
                raise OSError(f"the server answered {error.code} {error.reason}") from error
            raise InputError(
                f"{shown(address)} cannot be read: the server answered {error.code} {error.reason}."
            ) from error
        except (InvalidURL, ValueError) as error:  # what they say may show a token
            if isinstance(error, InputError):
                raise
            raise InputError(f"{shown(address)} cannot be opened: it is no valid address.") from error
        except HTTPException as error:
            raise OSError(f"the server gave no proper answer ({type(error).__name__})") from error
    return _open_by_fsspec(address, scheme)


def _open_by_fsspec(address: str, scheme: str) -> ByteStream:
    import fsspec  # it comes with torch; what it needs for a scheme is for the user to install

    try:
        opened: Any = fsspec.open(address, "rb").open()
    except ImportError as error:
        raise InputError(f"{shown(address)} cannot be opened: {error}.") from error
    except FileNotFoundError as error:
        raise InputError(f"{shown(address)} is missing.") from error
    except ValueError as error:
        raise InputError(f"{shown(address)} cannot be opened: {error}.") from error
    return cast(ByteStream, opened)


def fetch(address: str, schemes: tuple[str, ...] = SAFE_SCHEMES) -> bytes:
    """All bytes of a small file.

    Raises:
        InputError: it cannot be had, or is not small.
    """
    try:
        with closing(open_url(address, schemes)) as stream:
            data = stream.read(_MAX_INFO + 1)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"{shown(address)} cannot be read: {reason}.") from error
    if len(data) > _MAX_INFO:
        raise InputError(f"{shown(address)} is larger than {_MAX_INFO} bytes.")
    return data
