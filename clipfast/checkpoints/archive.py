"""Reads checkpoint files into tensors, without ever running code that came with them.

Three containers: zip archives (torch.save, and TorchScript as OpenAI published it), safetensors, and the
pickle stream that torch.save wrote before 1.6. What the tensors mean is the business of `layouts`.
"""

from __future__ import annotations

import errno
import json
import pickle
import re
import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch

_HUGGINGFACE_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

_NEVER_RUNS = "clipfast never runs code from a checkpoint"
# the first thing in a file by torch.save before 1.6: a pickled number that stands for "torch"
_LEGACY_MAGIC = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be used. The message names the file, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Contents:
    """What a file held. `values` is the unpickled object (normally a dictionary of tensors)."""

    values: Any
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_torchscript: bool = False
    uses_gelu: bool = False  # only known of a TorchScript archive, whose source text says so


def read_file(path: Path) -> Contents:
    """Read one checkpoint file on the CPU.

    Raises: CheckpointError if it is damaged, is not a checkpoint, or asks for code to be run.
    """
    container = _recognise(path)
    if container == "safetensors":
        return _read_safetensors(path)
    if container == "pickle":
        return Contents(_torch_load(path))
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            root = names[0].split("/")[0] if names else ""
            if f"{root}/data.pkl" not in names:
                raise CheckpointError(f"{path} is a zip archive, but not a checkpoint: it has no data.pkl")
            if f"{root}/constants.pkl" in names:
                return _read_torchscript(archive, root, path)
            _check_crc(archive, path)
    except CheckpointError:
        raise
    # a flipped bit in the zip's own headers: "encrypted" (RuntimeError), a name that is no text (ValueError), a place
    # before the file's start (EINVAL)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes) is a truncated or damaged zip archive ({error}); "
            "delete it and download or copy it again"
        ) from error
    return Contents(_torch_load(path))


def explain_impostor(head: bytes) -> str | None:
    """Say what a file is if its first bytes show one of the things people get in place of a checkpoint."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "an HTML or XML page, probably the error or login page of a failed download; download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file it stands for; run `git lfs pull` in its repository"
    return None


def _recognise(path: Path) -> str:
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); download or copy it again")
    with open(path, "rb") as file:
        head = file.read(512)
    if head.startswith(b"PK"):
        return "zip"
    # safetensors: 8 bytes of header length, then the header, a JSON object
    if head[8:9] == b"{":
        return "safetensors"
    if _LEGACY_MAGIC in head[:40]:
        return "pickle"
    if head.startswith(b"\x80"):
        raise CheckpointError(f"{path} is a plain pickle, not written by torch.save; refused: {_NEVER_RUNS}")
    what = explain_impostor(head) or f"not a checkpoint: it starts with the bytes {head[:12]!r}"
    raise CheckpointError(f"{path} is {what}")


def _check_crc(archive: zipfile.ZipFile, path: Path) -> None:
    # torch.load does not compare checksums, so a flipped bit would become a weight. torch can be told to
    # write none (torch.serialization.set_crc32_options(False)); they are then all zero.
    if not any(info.CRC for info in archive.infolist()):
        return
    damaged = archive.testzip()
    if damaged is not None:
        raise CheckpointError(f"{path} is corrupt: record {damaged} fails its CRC; download or copy it again")


def _read_safetensors(path: Path) -> Contents:
    safe_open = require_safetensors(path).safe_open
    try:
        with safe_open(str(path), framework="pt") as file:
            names = file.keys()
            return Contents({name: file.get_tensor(name) for name in names}, file.metadata() or {})
    except Exception as error:  # safetensors' own error type, OSError, or torch's on a strange dtype
        raise CheckpointError(
            f"{path} is a truncated or damaged safetensors file ({error}); download or copy it again"
        ) from error


def require_safetensors(path: Path) -> Any:
    """The safetensors package, or CheckpointError with the command that installs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise CheckpointError(f"{path} needs the safetensors package: pip install safetensors") from error
    return safetensors


def _torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_explain_refusal(path, str(error))) from error
    except Exception as error:  # a damaged pickle fails in almost any way
        raise CheckpointError(
            f"{path} is truncated or damaged ({type(error).__name__}: {error}); download or copy it again"
        ) from error


def _explain_refusal(path: Path, reason: str) -> str:
    wanted = re.search(r"GLOBAL (\S+)", reason)
    if wanted is None:
        detail = re.split(r"WeightsUnpickler error:\s*", reason)[-1].strip().partition("\n")[0]
        return f"{path} was refused by torch's weights-only reader ({detail}); {_NEVER_RUNS}"
    name = wanted[1]
    # classes are capitalised, functions are not: tells torch.save(model) from a pickle that calls something
    if name.rpartition(".")[2][:1].isupper():
        return (
            f"{path} holds a pickled object of class {name}, not plain weights, and {_NEVER_RUNS}; "
            "load it where its class is known and trusted, and save model.state_dict() in its place"
        )
    return f"{path} asks for {name} to be called while it is read; refused: {_NEVER_RUNS}"


# ---- folders ----


def files_of_folder(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face or open_clip folder; several if its index says they are sharded.

    Raises: CheckpointError if it is neither, or lacks a file.
    """
    candidates: tuple[str, ...] = ()
    if (folder / "config.json").is_file():
        candidates += _HUGGINGFACE_FILES
    if (folder / OPEN_CLIP_CONFIG).is_file():
        candidates += _OPEN_CLIP_FILES
    if not candidates:
        raise CheckpointError(
            f"{folder} is a folder without config.json (Hugging Face) or {OPEN_CLIP_CONFIG} (open_clip); "
            "give the checkpoint file itself"
        )
    found = next((folder / name for name in candidates if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(f"{folder} has a config but none of the weight files {', '.join(candidates)}")
    if not found.name.endswith(".index.json"):
        return [found]
    shards = sorted(set(read_json(found).get("weight_map", {}).values()))
    missing = [name for name in shards if Path(name).name != name or not (folder / name).is_file()]
    if missing or not shards:
        listed = ", ".join(missing) or "none at all"
        raise CheckpointError(f"{found} lists weight files that are not in its folder: {listed}")
    return [folder / name for name in shards]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds settings. Raises CheckpointError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download or copy it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not the settings of a model")
    return content


# ---- TorchScript ----


class _Module:
    """Stands in for every class an archive names. It only holds attributes."""

    def __init__(self, *args: object) -> None:
        pass


class _TensorRecord:
    """What the stream says of one tensor; the tensor itself is made after unpickling has ended."""

    def __init__(self, storage: tuple, offset: int, size: tuple, stride: tuple, *_: object) -> None:
        self.storage, self.offset, self.size, self.stride = storage, offset, size, stride


class _RecordUnpickler(pickle.Unpickler):
    """Builds attribute holders and tensor records, and knows nothing that acts.

    Everything `find_class` hands out is inert and made here, per reader: a hostile stream can set attributes
    on what it is given, and call it with what it likes, so it is given nothing that anybody else uses.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        super().__init__(file)
        self._path = path
        self._classes = {
            ("collections", "OrderedDict"): type("Dict", (dict,), {}),
            ("torch._utils", "_rebuild_tensor_v2"): type("TensorRecord", (_TensorRecord,), {}),
        }
        self._module_class = type("Module", (_Module,), {})

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return self._module_class
        if module == "torch" and name in _STORAGE_DTYPES:
            return name
        # typed lists and tags: the value comes first, what follows describes its type
        if module == "torch.jit._pickle":
            return lambda value, *_: value
        if (module, name) not in self._classes:
            raise CheckpointError(f"{self._path} asks for {module}.{name} while it is read; refused: {_NEVER_RUNS}")
        return self._classes[module, name]

    def persistent_load(self, pid: Any) -> Any:
        return pid


def _read_torchscript(archive: zipfile.ZipFile, root: str, path: Path) -> Contents:
    order = f"{root}/byteorder"
    if order in archive.namelist() and archive.read(order).decode() != sys.byteorder:
        raise CheckpointError(f"{path} was written on a machine of the other byte order; save it on this kind")
    try:
        with archive.open(f"{root}/data.pkl") as file:
            module = _RecordUnpickler(file, path).load()
        tensors = _make_tensors(_collect(module), archive, root)
    except (CheckpointError, zipfile.BadZipFile):
        raise
    except Exception as error:  # a damaged pickle fails in almost any way
        raise CheckpointError(
            f"{path} is a damaged TorchScript archive ({type(error).__name__}: {error}); download it again"
        ) from error
    # read, never run: an archive traced from a GELU model says so in its source text
    code = (n for n in archive.namelist() if n.startswith(f"{root}/code/") and n.endswith(".py"))
    uses_gelu = any(b"torch.gelu" in archive.read(name) for name in code)
    return Contents(tensors, is_torchscript=True, uses_gelu=uses_gelu)


def _collect(module: object) -> dict[str, _TensorRecord]:
    records: dict[str, _TensorRecord] = {}
    seen: set[int] = set()
    pending = [("", module)]
    while pending:
        prefix, holder = pending.pop()
        # once each: a hostile archive can nest modules in circles or share them without end
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        for name, value in vars(holder).items():
            if isinstance(value, _TensorRecord):
                records[prefix + name] = value
            elif isinstance(value, _Module):
                pending.append((f"{prefix}{name}.", value))
    return records


def _make_tensors(records: dict[str, _TensorRecord], archive: zipfile.ZipFile, root: str) -> dict[str, torch.Tensor]:
    storages: dict[str, torch.Tensor] = {}
    tensors = {}
    for name, record in records.items():
        _, storage_type, key, _, numel = record.storage[:5]
        if key not in storages:
            storages[key] = _read_storage(archive, f"{root}/data/{key}", _STORAGE_DTYPES[storage_type], numel)
        # as_strided checks that the view lies within the storage
        tensors[name] = storages[key].as_strided(record.size, record.stride, record.offset)
    return tensors


def _read_storage(archive: zipfile.ZipFile, name: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
    info = archive.getinfo(name)
    # torch stores tensors uncompressed; refusing the rest keeps a small file from unpacking to a huge one
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != numel * dtype.itemsize:
        raise ValueError(f"record {name} does not hold {numel} elements of {dtype}")
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    buffer = bytearray(info.file_size)
    free = memoryview(buffer)
    with archive.open(info) as file:
        # in pieces that fit the cache, for fewer copies of the whole; the last one compares the CRC
        while piece := file.read(1 << 20):
            free[: len(piece)] = piece
            free = free[len(piece) :]
    return torch.frombuffer(buffer, dtype=dtype)
