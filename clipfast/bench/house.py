"""The house of all seats: who sits in it, what they share, and that nobody and nothing is left when it is closed."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.bench.peers import Batch, Peer, Spec
from clipfast.bench.seats import Here, Seat, Worker

# how many are built and prepared at a time, each in its process: exporters use one core
AT_ONCE = 2


class Prepared(NamedTuple):
    """What `House.prepare` did for a peer.

    built:   whether its model is there.
    names:   of its contestants.   seconds: of preparing them.   error: why there are none.
    """

    peer: Peer
    seat: Seat
    built: bool
    names: Sequence[str] = ()
    seconds: float = 0.0
    error: Exception | None = None


def apart(device: torch.device) -> bool:
    """Whether each peer has a process of its own: not on a GPU, where each would have a context, and memory for it."""
    return device.type == "cpu"


class House:
    """All seats of one model at a time, and the folder of what they share.

    apart: each in a process of its own.
    """

    def __init__(self, apart: bool):
        self.apart = apart
        self.seats: dict[str, Seat] = {}  # by peer
        self._temporary = tempfile.TemporaryDirectory(prefix="clipfast-bench-", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)

    def weights(self, drawn: Mapping[str, Tensor], device: torch.device) -> Mapping[str, Tensor]:
        """A model's weights, from now on where every seat finds them. Raises OSError if there is no room for them."""
        self._empty()
        if not self.apart:
            return {name: tensor.to(device) for name, tensor in drawn.items()}
        try:
            torch.save(dict(drawn), self._file)
        except RuntimeError as error:
            raise OSError(f"no room for the weights in {self._folder.parent}: {error}") from error
        # all processes read the same memory
        return torch.load(self._file, mmap=True)

    @property
    def _file(self) -> Path:
        return self._folder / "weights.pt"

    def prepare(self, asked: Iterable[Peer], spec: Spec, tower: str, batch: Batch) -> Iterator[Prepared]:
        """Everybody's contestants, in this order; who has no seat is built first. Who fails says so in `error`."""
        asked, spec = list(asked), spec._replace(folder=self._folder)
        for peer in asked:
            if peer.name not in self.seats:
                self.seats[peer.name] = Worker(peer, spec, self._file) if self.apart else Here(peer, spec)

        def prepared(peer: Peer) -> Prepared:
            seat, start, built = self.seats[peer.name], 0.0, False
            try:
                seat.build()
                start, built = time.perf_counter(), True
                names = seat.prepare(tower, batch)
            except Exception as error:
                return Prepared(peer, seat, built, error=error)
            return Prepared(peer, seat, built, names, time.perf_counter() - start)

        if not self.apart:
            yield from map(prepared, asked)
            return
        with ThreadPoolExecutor(AT_ONCE) as pool:
            try:
                yield from pool.map(prepared, asked)
            except BaseException:
                # threads wait for their answers
                self.forget()
                raise

    def forget(self, keep: Callable[[Seat], bool] = lambda seat: False) -> None:
        """Leave only those to keep; the others are built again when they are asked for."""
        for name, seat in list(self.seats.items()):
            if not keep(seat):
                seat.close()
                del self.seats[name]

    def _empty(self) -> None:
        self.forget()
        for path in self._folder.iterdir():
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def close(self) -> None:
        self.forget()
        self._temporary.cleanup()


@contextlib.contextmanager
def ended_properly() -> Iterator[None]:
    """Inside, SIGTERM ends the program as an exception does: processes and temporary files go."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
