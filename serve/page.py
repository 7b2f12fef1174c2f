"""The playground: files of `serve/playground`, read once, that any browser may have; what they do asks for a key."""

from __future__ import annotations

import functools
from pathlib import Path

from fastapi.responses import Response

FOLDER = Path(__file__).parent / "playground"
PREFIX = "/playground/"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    # nothing from elsewhere, nothing inline, no frame around it; pictures are made in the page
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",  # a new server's page is a new page
}


@functools.cache
def page_files() -> dict[str, tuple[bytes, str]]:
    """Content and type of each file by its name: a fixed list, so that no path of a request reaches the disk."""
    found = [path for path in sorted(FOLDER.iterdir()) if path.suffix in _TYPES]
    return {path.name: (path.read_bytes(), f"{_TYPES[path.suffix]}; charset=utf-8") for path in found}


def is_page(path: str) -> bool:
    """Whether a path is the page's own, which says nothing about the server."""
    return path == "/" or path.startswith(PREFIX)


def page(name: str) -> Response | None:
    """The file of that name, None where there is none."""
    content, media_type = page_files().get(name, (None, None))
    return None if content is None else Response(content, media_type=media_type, headers=_HEADERS)
