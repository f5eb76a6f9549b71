"""Triton's cache carried from one machine to another, and how much of it a run hits.

This was read in the source of Triton 3.6.0. What is compiled for a launch lies in a folder named by sha256 of these,
joined:
- Triton itself: its version and the contents of libtriton.so, of the compiler, the backends and the language (each
  Python's build has a libtriton.so of its own);
- the launch: source and first line of the kernel and of all it calls, the types of its arguments, what is known of
  their values, and everything known at compile time;
- the target: `ptxas --version` and the architecture;
- the options (warps, stages, registers, ...), with the contents, not the path, of libdevice;
- the variables of the environment that change what is compiled (TRITON_DISABLE_LINE_INFO, DISABLE_LLVM_OPT, ...),
  where they are set.
No path is among them, and nothing of torch, of the driver or of the GPU but its architecture. A hit reads the group
file, which names the others by absolute paths, the metadata and the cubin. So those three are carried, and the paths in
the group file are written where the cache is put down.

Two more kinds of entry are modules in C: one that loads cubins, and one launcher for each signature. Their names are
sha256 of their source and of platform.architecture(), which says "ELF" where the command `file` is installed, and
nothing where it is not. They need no GPU to be compiled: whatever libcuda they were linked against, the loader takes
the driver's.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GROUP = "__grp__"
# an empty file in each entry that a kit brought
MARK = "from-a-kit"


def strip(cache: Path, entries: Iterable[str], target: Path) -> None:
    """Copies what a hit needs of these entries, with the names of a group's files in place of their paths."""
    for name in entries:
        (target / name).mkdir(parents=True)
        kept = [file for file in (cache / name).iterdir() if file.suffix in (".cubin", ".json", ".so")]
        for file in kept:
            if not file.name.startswith(GROUP):
                shutil.copyfile(file, target / name / file.name)
                continue
            group = json.loads(file.read_text())
            group["child_paths"] = {child: child for child in group["child_paths"] if cache / name / child in kept}
            (target / name / file.name).write_text(json.dumps(group))


def place(stripped: Path, cache: Path) -> int:
    """Puts stripped entries into a cache, over what it may have of them; returns how many."""
    count = 0
    for entry in sorted(path for path in stripped.iterdir() if path.is_dir()):
        folder = (cache / entry.name).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        # the group file last: with it the entry counts
        for file in sorted(entry.iterdir(), key=lambda file: file.name.startswith(GROUP)):
            content = file.read_bytes()
            if file.name.startswith(GROUP):
                group = json.loads(content)
                group["child_paths"] = {child: str(folder / child) for child in group["child_paths"]}
                content = json.dumps(group).encode()
            fresh = folder / f"{file.name}.new"
            fresh.write_bytes(content)
            fresh.replace(folder / file.name)
        (folder / MARK).touch()
        count += 1
    return count


@dataclasses.dataclass
class Hits:
    """What this process asked Triton for, of clipfast's kernels: each different launch once."""

    listening: bool = False
    brought: int = 0  # found, and a kit brought them
    found: int = 0  # found, and an earlier process compiled them
    compiled: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.brought + self.found + sum(self.compiled.values())

    def line(self) -> str:
        if not self.listening:
            return "this Triton does not tell what it compiles"
        text = f"{self.brought} of {self.total} launches were in the kit's cache"
        if self.found:
            text += f", {self.found} compiled earlier on this machine"
        if self.compiled:
            text += "; compiled: " + ", ".join(f"{name} ({count})" for name, count in self.compiled.most_common())
        return text


def count() -> Hits:
    """From now on counts what Triton compiles or finds in its cache; nothing before Triton 3.5 or without Triton."""
    hits = Hits()
    try:
        from triton import knobs
    except ImportError:
        return hits
    if not hasattr(getattr(knobs, "compilation", None), "listener"):
        return hits
    before = knobs.compilation.listener

    def listen(*, src: Any, metadata_group: dict[str, str], cache_hit: bool, **others: Any) -> None:
        if before is not None:
            before(src=src, metadata_group=metadata_group, cache_hit=cache_hit, **others)
        # Inductor compiles its own, in processes of its own
        if not getattr(getattr(src, "fn", None), "__module__", "").startswith("clipfast."):
            return
        if not cache_hit:
            hits.compiled[src.fn.__name__] += 1
        elif any((Path(path).parent / MARK).exists() for path in metadata_group.values()):
            hits.brought += 1
        else:
            hits.found += 1

    knobs.compilation.listener = listen
    hits.listening = True
    return hits
