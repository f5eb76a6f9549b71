"""A library of our own that is loaded through ctypes: found, checked and asked what its error codes mean."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


class SharedLibrary:
    """Loaded at the first use; `missing` says why it cannot be, and what to do.

    file:    its name, in FOLDER.
    prefix:  what its functions' names start with; `<prefix>_abi_version` and `<prefix>_error_text` are among them.
    version: of the interface that we know.
    symbols: function -> (restype, argtypes).
    switch:  the variable that makes setup.py build it.
    needs:   with what.
    kind:    what it is, in words.
    """

    def __init__(
        self,
        file: str,
        prefix: str,
        version: int,
        symbols: Mapping[str, tuple[Any, Sequence[Any]]],
        switch: str,
        needs: str,
        kind: str,
    ):
        self.path = FOLDER / file
        self.prefix, self.version, self.kind = prefix, version, kind
        self.switch, self.needs = switch, needs
        own = {f"{prefix}_abi_version": (ctypes.c_int, ()), f"{prefix}_error_text": (ctypes.c_char_p, (ctypes.c_int,))}
        self.symbols = {**own, **symbols}

    @property
    def build(self) -> str:
        """How to build it, in words and with the command."""
        # a checkout that is imported in place gets its library in place; pip brings cmake for the build
        where = "-e ." if (FOLDER.parents[1] / "setup.py").exists() else "."
        return f"in the folder of clipfast's source, with {self.needs}: {self.switch}=1 pip install {where}"

    def load(self, path: Path) -> ctypes.CDLL | str:
        """The library with its symbols declared, or why it cannot be used."""
        if not path.exists():
            # what setup.py left there instead
            note = path.with_suffix(".txt")
            why = f" ({note.read_text().strip()})" if note.exists() else ""
            return f"the {self.kind} is not built{why}; {self.build}"
        try:
            built = ctypes.CDLL(str(path))
            for name, (restype, argtypes) in self.symbols.items():
                function = getattr(built, name)
                function.restype, function.argtypes = restype, argtypes
                if name == f"{self.prefix}_abi_version" and function() != self.version:
                    return (
                        f"{path.name} has interface version {function()}, this clipfast needs {self.version}: "
                        f"build it again {self.build}"
                    )
        except (OSError, AttributeError) as error:
            return f"{path.name} does not load: {error}. Build it again {self.build}"
        return built

    @functools.cached_property
    def loaded(self) -> ctypes.CDLL | str:
        return self.load(self.path)

    def forget(self, path: Path | None = None) -> None:
        """Load anew at the next use, from another file if one is given."""
        self.path = path or self.path
        self.__dict__.pop("loaded", None)

    def missing(self) -> str | None:
        """Why it cannot be used (not built, of another version, does not load) and what to do; None if it can."""
        return self.loaded if isinstance(self.loaded, str) else None

    def use(self) -> ctypes.CDLL:
        """The library. Raises: RuntimeError if it is missing."""
        if isinstance(self.loaded, str):
            raise RuntimeError(self.loaded)
        return self.loaded

    def check(self, code: int) -> None:
        """Raises: RuntimeError with the text of a code that is not 0."""
        if code:
            text = getattr(self.use(), f"{self.prefix}_error_text")(code).decode()
            name = self.path.name.partition(".")[0]
            raise RuntimeError(f"{name}: {text} ({'CUDA error' if code > 0 else 'error'} {code})")
