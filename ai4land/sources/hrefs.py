"""Limit where the hrefs of an untrusted catalogue may lead.

By default a local catalogue reaches only files below the parent of its folder, and a remote one reaches any host but no
local file. :class:`Reach` is that rule. :class:`CatalogIO` reads a catalogue's documents by it, with retries, limits on
their size and number, and the user's headers sent only to the catalogue's origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlparse
from urllib.request import url2pathname

import requests
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from urllib3 import Retry

from ai4land.errors import DataError

Beyond = Literal["none", "hosts", "all"]
"""How far a catalogue may reach beyond the default: no further, to other hosts, or also to any local file."""

LARGEST_DOCUMENT = 2**26
"""Most bytes in one JSON document."""
MOST_DOCUMENTS = 200_000
"""Most documents read from one catalogue."""
RETRIES = Retry(
    total=5,
    backoff_factor=0.5,
    backoff_max=30,
    status_forcelist=(429, 500, 502, 503, 504),
    allowed_methods=None,
    raise_on_status=False,
)
"""Retries of a request, including searches by POST, which change nothing."""

_WEB = ("http", "https")
_REMOTE = (*_WEB, "s3", "gs")


@dataclass(frozen=True)
class Reach:
    """What a catalogue may point to.

    ``root`` is the folder that a local catalogue must stay in, None for a remote one. ``origin`` is the scheme, host and
    port of a remote catalogue, empty for a local one. ``catalog`` is its path or URL, for messages.
    """

    catalog: str
    root: Path | None
    origin: str
    beyond: Beyond = "none"

    @classmethod
    def of(cls, catalog: str | Path, *, beyond: Beyond = "none") -> Reach:
        """Derive the rule from a catalogue's path or URL; a local one may reach the parent of its folder.

        That folder holds its JSON file, or for a collection.json the catalog.json one level up if there is one.
        """
        href = str(catalog)
        path = local_path(href)
        if path is None:
            return cls(href, None, origin(href), beyond)
        folder = path.resolve().parent
        if path.name != "catalog.json" and (folder.parent / "catalog.json").is_file():
            folder = folder.parent
        return cls(href, folder.parent, "", beyond)

    def check(self, href: str, *, what: str) -> None:
        """Raise DataError, naming the href and ``what`` it is, if an absolute href leads out of reach."""
        scheme = urlparse(href).scheme if "://" in href else ""
        if href.startswith("/vsi") or scheme not in ("", "file", *_REMOTE):
            raise self._refusal(href, what, f"a URL with one of {', '.join(_REMOTE)} or a file; correct the catalogue")
        if scheme in _REMOTE:
            if self.root is not None and self.beyond == "none":
                raise self._refusal(
                    href,
                    what,
                    f'a file below {self.root}; fetch it to a mirror (ai4land fetch), or give beyond="hosts" if you trust it',
                )
            return
        if self.beyond == "all":
            return
        if self.root is None:
            raise self._refusal(
                href, what, 'a URL, since the catalogue is remote; correct it, or give beyond="all" if you trust it'
            )
        for path in {local_path(href), local_path(unquote(href))}:
            if path is None or not _inside(path, self.root):
                raise self._refusal(
                    href, what, f'a file below {self.root}; correct the catalogue, or give beyond="all" if you trust it'
                )

    def _refusal(self, href: str, what: str, expected: str) -> DataError:
        return DataError(f"{what} of catalogue {self.catalog} is {href!r}, expected {expected}")


def local_path(href: str) -> Path | None:
    """Return the path of a bare path or a ``file://`` URL; None for other URLs.

    >>> local_path("file:///a/b%20c.tif").as_posix(), local_path("https://a/b.tif")
    ('/a/b c.tif', None)
    """
    if href.startswith("file://"):
        return Path(url2pathname(urlparse(href).path))
    return None if "://" in href else Path(href)


def origin(href: str) -> str:
    """Return scheme, host and port of a URL, to which a token is bound.

    >>> origin("https://a.org:8443/stac/catalog.json")
    'https://a.org:8443'
    """
    parts = urlparse(href)
    return f"{parts.scheme}://{parts.netloc}"


def _inside(path: Path, root: Path) -> bool:
    try:
        return path.resolve().is_relative_to(root)
    except (OSError, ValueError, RuntimeError):
        return False


class CatalogIO(StacApiIO):
    """Reads the documents of one catalogue or API.

    ``headers`` go only to the catalogue's origin; ``timeout`` is in seconds per request.
    """

    def __init__(self, reach: Reach, *, headers: Mapping[str, str] | None = None, timeout: float | None = 60.0) -> None:
        super().__init__(timeout=timeout, max_retries=RETRIES)
        self.reach = reach
        self._own = dict(headers or {})
        self._read = 0

    def read_text(self, source: Any, *args: Any, **kwargs: Any) -> str:
        """Read a local or remote document; raise DataError if it is out of reach or too large."""
        if not isinstance(source, str):
            return super().read_text(source, *args, **kwargs)
        if urlparse(source).scheme in _WEB:
            return self.request(source, *args, **kwargs)
        self.reach.check(source, what="link")
        path = local_path(source)
        if path is None:
            raise DataError(f"link of catalogue {self.reach.catalog} is {source!r}, expected http, https or a file; correct it")
        self._count()
        if path.stat().st_size > LARGEST_DOCUMENT:
            raise _too_large(source)
        return path.read_text(encoding="utf-8")

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """Request a document, retrying after a status of 429 or 5xx with growing pauses; raise APIError if it fails."""
        self.reach.check(href, what="link")
        self._count()
        verb = (method or "GET").upper()
        json, params = (parameters, None) if verb in ("POST", "PUT", "PATCH") else (None, parameters)
        own = self._own if origin(href) == self.reach.origin else {}
        try:
            with self.session.request(
                verb, href, headers={**own, **(headers or {})}, timeout=self.timeout, stream=True, json=json, params=params
            ) as answer:
                if not answer.ok:
                    raise APIError.from_response(answer)
                text = bytearray()
                for part in answer.iter_content(2**16):
                    text += part
                    if len(text) > LARGEST_DOCUMENT:
                        raise _too_large(href)
                return text.decode("utf-8")
        except (requests.RequestException, UnicodeDecodeError) as error:
            raise APIError(str(error)) from error

    def _count(self) -> None:
        self._read += 1
        if self._read > MOST_DOCUMENTS:
            raise DataError(
                f"catalogue {self.reach.catalog} has more than {MOST_DOCUMENTS} documents, expected fewer; search an API instead"
            )


def _too_large(href: str) -> DataError:
    return DataError(
        f"STAC document {href} is larger than {LARGEST_DOCUMENT // 2**20} MiB, expected less; split the catalogue, or page the search"
    )
