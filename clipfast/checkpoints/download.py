"""Fetches checkpoints over HTTP: resumed, verified as they stream, safe when several processes fetch at once.

A download grows in `<file>.part`, under a lock that dies with its process, and takes its name only when its
sha256 is right. So the file under the final name is always whole, whoever was killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..files import naming_full_disk, write_all
from .archive import explain_impostor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_AT = "https://openaipublic.azureedge.net/clip/models"
_SHA256 = {
    "RN50": "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
    "RN101": "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
    "RN50x4": "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
    "RN50x16": "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
    "RN50x64": "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
    "ViT-B/32": "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
    "ViT-B/16": "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
    "ViT-L/14": "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
    "ViT-L/14@336px": "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
}
# the file of ViT-L/14@336px is ViT-L-14-336px.pt
MODELS: dict[str, str] = {name: f"{_AT}/{sha256}/{re.sub('[/@]', '-', name)}.pt" for name, sha256 in _SHA256.items()}

_CHUNK = 1 << 18
_TIMEOUT = 30.0  # seconds without a byte
_ATTEMPTS = 5  # in a row without progress
_PROGRESS = 1 << 20  # bytes that count as progress
_BACKOFF = 1.0  # seconds before the second attempt; doubled each time


def available_models() -> list[str]:
    """Names of the models that OpenAI published, in openai/CLIP's order."""
    return list(MODELS)


def download(url: str, root: str | os.PathLike[str], *, progress: bool | str = True) -> str:
    """Fetch a file whose sha256 is the second to last component of its address.

    root:     folder for the file; made if missing.
    progress: True shows a bar on stderr if that is a terminal, "always" shows it anyway, False never.
    Returns:  path of the file. One that is there already, whole, is used without the network.
    Raises:   RuntimeError if the path is not a regular file, the server refuses, the connection keeps
              breaking (what came is kept for the next try), or the content is wrong twice;
              ValueError if the address has no sha256; OSError if the disk does not take the file.
    """
    parts = urllib.parse.urlsplit(url).path.split("/")
    expected = parts[-2].lower() if len(parts) > 1 else ""
    if not re.fullmatch(r"[0-9a-f]{64}", expected) or not parts[-1]:
        raise ValueError(f"the second to last component of the address must be a sha256, got {url}")
    os.makedirs(root, exist_ok=True)
    target = os.path.join(root, urllib.parse.unquote(parts[-1]))
    if _is_whole(target, expected):
        return target
    if os.path.exists(target):
        warnings.warn(f"{target} exists, but its SHA256 is wrong; downloading it again", stacklevel=2)

    with _open_part(target) as part:
        # whoever held the lock before may have finished the very same file
        if _is_whole(target, expected):
            part.discard()
            return target
        digest = _fetch(url, part, expected, progress)
        if digest != expected:
            warnings.warn(f"{url}: the download has a wrong SHA256; fetching it once more", stacklevel=2)
            part.restart()
            digest = _fetch(url, part, expected, progress)
        if digest != expected:
            hint = explain_impostor(part.head()) or "another file than the address promises"
            part.discard()
            raise RuntimeError(
                f"{url} came twice with a wrong SHA256: expected {expected}, got {digest}; the server sent {hint}"
            )
        part.publish(target)
    return target


def _is_whole(path: str, expected: str) -> bool:
    if not os.path.lexists(path):
        return False
    if not os.path.isfile(path):
        raise RuntimeError(f"{path} exists and is not a regular file")
    with open(path, "rb") as file:
        return _sha256(file)[0].hexdigest() == expected


def _sha256(file: BinaryIO) -> tuple[Any, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        size += len(chunk)
    return digest, size


# ---- the partial file ----


class _Part:
    """The file a download grows in, with the size and the sha256 of what it holds."""

    def __init__(self, file: BinaryIO, locked: bool) -> None:
        self._file, self.locked = file, locked
        self.name = file.name
        file.seek(0)
        self.digest, self.size = _sha256(file)

    def append(self, chunk: bytes, left: int) -> None:
        """left: bytes that the file wants from here on, told if the disk is full."""
        with naming_full_disk(Path(self.name), left):
            write_all(self._file, chunk)
        self.digest.update(chunk)
        self.size += len(chunk)

    def restart(self) -> None:
        self._file.seek(0)
        self._file.truncate()
        self.digest, self.size = hashlib.sha256(), 0

    def head(self) -> bytes:
        self._file.seek(0)
        return self._file.read(512)

    def publish(self, target: str) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._release()
        os.replace(self.name, target)

    def discard(self) -> None:
        self._release()
        os.unlink(self.name)

    def _release(self) -> None:
        # a locked file changes its name while it is locked, or a waiting process could take it in between;
        # Windows, where there is no such lock, cannot rename an open file
        if not self.locked:
            self._file.close()


@contextlib.contextmanager
def _open_part(target: str) -> Iterator[_Part]:
    file = _lock(f"{target}.part")
    if file is not None:
        with file:
            yield _Part(file, locked=True)
        return
    # no lock, so no sharing: a name of its own, gone at the end
    name = f"{target}.{os.getpid()}-{threading.get_ident()}.part"
    try:
        with open(name, "wb+", buffering=0) as file:
            yield _Part(file, locked=False)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _lock(name: str) -> BinaryIO | None:
    """Open a file under an exclusive lock, waiting for it; None where the system or the disk has no locks."""
    while fcntl is not None:
        # unbuffered, for a buffer that a full disk has no room for makes closing fail; the caller closes it
        file = open(name, "ab+", buffering=0)  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                return file
        except FileNotFoundError:
            pass
        except OSError:
            file.close()
            return None
        # it was published or discarded while we waited: what we locked has another name now
        file.close()
    return None


# ---- the network ----


def _fetch(url: str, part: _Part, expected: str, progress: bool | str) -> str:
    """Append to the partial file until the server has no more. Returns the sha256 of the whole."""
    failures, best = 0, part.size
    # an earlier process may have been killed between the last byte and the renaming
    if part.digest.hexdigest() == expected:
        return expected
    with _bar(os.path.basename(part.name).removesuffix(".part"), progress) as show:
        while (reason := _receive(url, part, show)) is not None:
            # measured against the most ever held: a server that restarts each time makes no progress
            failures = 1 if part.size >= best + _PROGRESS else failures + 1
            best = max(best, part.size)
            if failures == _ATTEMPTS:
                kept = f". {part.size} bytes are kept in {part.name}; calling again goes on from there"
                message = f"{url}: {reason}; gave up after {failures} attempts in a row"
                raise RuntimeError(message + (kept if part.locked else ""))
            time.sleep(_BACKOFF * 2 ** (failures - 1))
    return part.digest.hexdigest()


def _receive(url: str, part: _Part, show: Callable[[int, int | None], object]) -> str | None:
    """Take what one connection gives. Returns None once the file has ended, else why it has not."""
    headers = {"User-Agent": "clipfast", "Accept-Encoding": "identity"}
    if part.size:
        headers["Range"] = f"bytes={part.size}-"
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            part.restart()
            return "the server has no bytes beyond those kept, and those are not the whole file"
        if error.code in (408, 429) or error.code >= 500:
            return f"the server answered {error.code} {error.reason}"
        raise RuntimeError(f"{url}: the server answered {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        return f"no connection ({error})"
    with response:
        # before anything is thrown away: a login page must not cost what was fetched already
        if response.headers.get_content_type() == "text/html":
            raise RuntimeError(f"{url}: the server sent an HTML page (an error or login page?), not the file")
        if response.status != 206:  # the whole file: the server does not resume, or was not asked to
            part.restart()
        elif not _continues(response, part):
            part.restart()
            return "the server sent another range than the one asked for"
        length = response.headers.get("Content-Length")
        total = part.size + int(length) if length else None
        show(part.size, total)
        while True:
            try:
                chunk = response.read1(_CHUNK)
            except (OSError, http.client.HTTPException) as error:
                return f"the connection broke after {part.size} of {total or 'unknown'} bytes ({error})"
            if not chunk:
                break
            part.append(chunk, len(chunk) if total is None else total - part.size)
            show(part.size, total)
    if total is not None and part.size < total:
        return f"the connection closed after {part.size} of {total} bytes"
    return None


def _continues(response: Any, part: _Part) -> bool:
    start = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return start is not None and int(start[1]) == part.size


@contextlib.contextmanager
def _bar(name: str, progress: bool | str) -> Iterator[Callable[[int, int | None], object]]:
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda done, total: None
        return
    # None: only on a terminal
    disable = None if progress is True else not progress
    with tqdm(desc=name, unit="iB", unit_scale=True, unit_divisor=1024, disable=disable) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
