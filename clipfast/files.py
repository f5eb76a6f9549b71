"""Files that are written whole or not at all, looked at before the work, and named with their size on a full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "append",
    "check_file",
    "check_folder",
    "naming_full_disk",
    "size_of",
    "write_all",
    "write_atomically",
    "write_bytes",
    "write_picture",
]

# the disk, the user's share of it, or the size that a file may have
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


# ---- before the work ----


def check_file(path: Path) -> None:
    """Raises OSError, which names the file and the reason, if it cannot be written."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "cannot be written: it is a folder", str(path))
    if path.exists() and not path.is_file():
        # to replace it would take a device such as /dev/null away
        raise OSError(errno.EINVAL, "cannot be written: it is no regular file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"cannot be written: there is no folder {path.parent}", str(path))
    _try(path, path)


def check_folder(path: Path) -> None:
    """Make the folder if it is not there. Raises: OSError, which names it and the reason, if no file can be in it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        blocking = next(place for place in (path, *path.parents) if place.exists())
        raise NotADirectoryError(errno.ENOTDIR, "is a file, and a folder is wanted", str(blocking)) from error
    _try(path / "file", path)


def _try(file: Path, named: Path) -> None:
    # tried in earnest: permissions do not tell of a disk that is read-only, and root has all of them
    temporary = _beside(file)
    try:
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        raise type(error)(error.errno, f"cannot be written: {error.strerror}", str(named)) from error


# ---- writing ----


def write_atomically(path: Path, write: Callable[[BinaryIO], object], size: int) -> None:
    """Let write(file) fill what becomes `path`, on the disk, whole or not at all: an old file stays until then.

    write:  may also use the name, `file.name`.
    size:   bytes that it will write, roughly; told if the disk is full.
    Raises: OSError if the disk is full; what `write` raises.
    """
    temporary = _beside(path)
    with naming_full_disk(path, size) as noted, _removed_at_the_end(temporary):
        raw = _Raw(temporary, "xb")
        try:
            with io.BufferedWriter(raw) as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
        finally:
            noted.append(raw.error)
        os.replace(temporary, path)
    if os.name == "posix":
        # the new name is on the disk only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_bytes(path: Path, data: bytes) -> None:
    """`write_atomically` of bytes."""
    write_atomically(path, lambda file: file.write(data), len(data))


def write_picture(figure: Any, path: Path, **options: Any) -> None:
    """A figure of matplotlib, in the format that the suffix names.   options: of savefig."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], **options)
    write_bytes(path, picture.getvalue())


def append(path: Path, data: bytes) -> None:
    """Add to the end of a file, all of data or nothing. Raises: OSError if the disk is full."""
    with naming_full_disk(path, len(data)), path.open("ab", buffering=0) as file:
        end = os.fstat(file.fileno()).st_size
        try:
            write_all(file, data)
        except OSError:
            file.truncate(end)
            raise


def write_all(file: io.RawIOBase | BinaryIO, data: bytes) -> None:
    """Write all of data to an unbuffered file, which may take it in parts."""
    left = memoryview(data)
    while left:
        left = left[file.write(left) :]


def size_of(values: Any) -> int:
    """Bytes of the tensors and arrays in dicts, lists and tuples."""
    if isinstance(values, Mapping):
        return sum(map(size_of, values.values()))
    if isinstance(values, list | tuple):
        return sum(map(size_of, values))
    return getattr(values, "nbytes", 0)


@contextlib.contextmanager
def naming_full_disk(path: Path, size: int) -> Iterator[list[BaseException | None]]:
    """Where the disk has no room in the block, OSError with the file's name, the bytes wanted and those free.

    The list that it gives is for errors that the block's own exception may hide.
    """
    noted: list[BaseException | None] = []
    try:
        yield noted
    except Exception as error:
        codes = [code for one in (error, *noted) if (code := _full(one))]
        if not codes:
            raise
        free = shutil.disk_usage(path.parent).free
        text = f"{os.strerror(codes[0])}: {size:,} bytes were wanted and {free:,} are free"
        raise OSError(codes[0], text, str(path)) from error


def _full(error: BaseException | None) -> int | None:
    if isinstance(error, OSError):
        return error.errno if error.errno in FULL else None
    # as Rust prints it, and so safetensors
    return next((code for code in FULL if f"(os error {code})" in str(error)), None)


class _Raw(io.FileIO):
    """Notes what went wrong: torch.save turns it into a RuntimeError that does not say."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = error
            raise


@contextlib.contextmanager
def _removed_at_the_end(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
