"""Downloads from a server on this machine that misbehaves in the ways real ones do."""

from __future__ import annotations

import hashlib
import importlib
import io
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from clipfast.checkpoints import download

# by name: the package may export a function called like the module
module = importlib.import_module("clipfast.checkpoints.download")

BODY = bytes(range(256)) * 1024  # 256 KiB
DIGEST = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `body`. Each entry of `faults` spoils one request, the first the first; then all goes well."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.resumes, self.says_length, self.delay = BODY, True, True, 0.0
        self.faults: list[dict] = []
        self.ranges: list[str | None] = []
        self.url = f"http://127.0.0.1:{self.server_port}/models/{DIGEST}/ViT-x.pt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        fault = server.faults.pop(0) if server.faults else {}
        server.ranges.append(wanted)
        time.sleep(server.delay)
        if fault.get("drop"):
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body, status = fault.get("body", server.body), fault.get("status", 200)
        start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        if status != 200:
            self.send_error(status)
            return
        if server.resumes and start >= len(body) > 0 and wanted:
            self.send_error(416)
            return
        if server.resumes and wanted:
            start += fault.get("shift", 0)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            body = body[start:]
        else:
            self.send_response(200)
        self.send_header("Content-Type", fault.get("type", "application/octet-stream"))
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: fault.get("cut", len(body))])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "_BACKOFF", 0.001)
    monkeypatch.setattr(module, "_TIMEOUT", 5.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def fetch(server, root):
    path = download(server.url, str(root), progress=False)
    assert path == str(root / "ViT-x.pt")
    assert (root / "ViT-x.pt").read_bytes() == BODY
    assert os.listdir(root) == ["ViT-x.pt"]


def test_download_into_a_new_folder_then_without_the_network(server, tmp_path):
    fetch(server, tmp_path / "a" / "b")
    assert server.ranges == [None]
    fetch(server, tmp_path / "a" / "b")
    assert server.ranges == [None]


def test_server_without_a_length(server, tmp_path):
    server.says_length = False
    fetch(server, tmp_path)


def test_truncated_body_is_resumed(server, tmp_path):
    server.faults = [{"cut": 100_000}, {"cut": 50_000}]
    fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_truncated_body_starts_again_where_the_server_cannot_resume(server, tmp_path):
    server.resumes = False
    server.faults = [{"cut": 100_000}]
    fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=100000-"]


def test_wrong_range_starts_again(server, tmp_path):
    server.faults = [{"cut": 1000}, {"shift": 7}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # found before its bytes are taken, not by the SHA256
        fetch(server, tmp_path)
    assert server.ranges == [None, "bytes=1000-", None]


@pytest.mark.parametrize("faults", [[{"status": 500}], [{"status": 503}, {"status": 429}], [{"drop": True}]])
def test_passing_failures_are_retried(server, faults, tmp_path):
    server.faults = faults
    fetch(server, tmp_path)


def test_stalled_connection_is_given_up_and_resumed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_TIMEOUT", 0.2)
    release = threading.Event()
    write = Handler.do_GET

    def stall(self):
        if not self.server.ranges:
            self.server.ranges.append(None)
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:4096])
            release.wait(5)
        else:
            write(self)

    monkeypatch.setattr(Handler, "do_GET", stall)
    fetch(server, tmp_path)
    release.set()
    assert server.ranges == [None, "bytes=4096-"]


def test_permanent_failure_keeps_the_part_and_the_next_call_goes_on(server, tmp_path):
    server.faults = [{"cut": 1000}, *[{"drop": True}] * 4]
    with pytest.raises(RuntimeError, match="gave up after 5 attempts.* 1000 bytes are kept in .*ViT-x.pt.part"):
        download(server.url, tmp_path, progress=False)
    assert (tmp_path / "ViT-x.pt.part").read_bytes() == BODY[:1000]
    server.ranges.clear()
    fetch(server, tmp_path)
    assert server.ranges == ["bytes=1000-"]


def test_progress_resets_the_count_of_failures_but_a_loop_ends(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PROGRESS", 10_000)
    server.faults = [{"cut": 20_000}] * 12
    fetch(server, tmp_path)
    os.unlink(tmp_path / "ViT-x.pt")
    server.resumes = False  # many bytes each time, and never one more than the most so far
    server.faults = [{"cut": 20_000}, {"cut": 100}] * 6
    with pytest.raises(RuntimeError, match="gave up after 5"):
        download(server.url, tmp_path, progress=False)


def test_unreachable_server_is_an_error_that_names_it(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/{DIGEST}/x.pt"
        with pytest.raises(RuntimeError, match=f"{url}: no connection"):
            download(url, tmp_path, progress=False)


@pytest.mark.parametrize("status", [403, 404])
def test_refusal_is_not_retried(server, status, tmp_path):
    server.faults = [{"status": status}]
    with pytest.raises(RuntimeError, match=f"answered {status}"):
        download(server.url, tmp_path, progress=False)
    assert len(server.ranges) == 1 and not (tmp_path / "ViT-x.pt").exists()


def test_wrong_content_is_fetched_once_more(server, tmp_path):
    server.faults = [{"body": b"x" * 1000}]
    with pytest.warns(UserWarning, match="once more"):
        fetch(server, tmp_path)
    assert server.ranges == [None, None]


def test_wrong_content_twice_names_both_digests(server, tmp_path):
    server.body = b"<!DOCTYPE html> not it"
    got = hashlib.sha256(server.body).hexdigest()
    with (
        pytest.warns(UserWarning, match="once more"),
        pytest.raises(RuntimeError, match=f"expected {DIGEST}, got {got}; the server sent an HTML"),
    ):
        download(server.url, tmp_path, progress=False)
    assert len(server.ranges) == 2 and os.listdir(tmp_path) == []


def test_html_page_does_not_cost_the_part(server, tmp_path):
    (tmp_path / "ViT-x.pt.part").write_bytes(BODY[:5000])
    server.resumes = False
    server.faults = [{"body": b"<html>log in</html>", "type": "text/html; charset=utf-8"}]
    with pytest.raises(RuntimeError, match="HTML page"):
        download(server.url, tmp_path, progress=False)
    assert (tmp_path / "ViT-x.pt.part").read_bytes() == BODY[:5000]
    server.resumes = True
    fetch(server, tmp_path)
    assert server.ranges == ["bytes=5000-", "bytes=5000-"]


@pytest.mark.parametrize("part", [BODY, BODY + b"more", b"another file" + BODY])
def test_part_that_is_whole_or_too_long(server, part, tmp_path):
    (tmp_path / "ViT-x.pt.part").write_bytes(part)
    fetch(server, tmp_path)
    assert server.ranges == ([] if part == BODY else [f"bytes={len(part)}-", None])


def test_part_of_another_file_is_replaced(server, tmp_path):
    (tmp_path / "ViT-x.pt.part").write_bytes(b"z" * 1000)
    with pytest.warns(UserWarning, match="once more"):
        fetch(server, tmp_path)
    assert server.ranges == ["bytes=1000-", None]


def test_damaged_existing_file_is_replaced_only_when_the_new_one_is_whole(server, tmp_path):
    (tmp_path / "ViT-x.pt").write_bytes(b"damaged")
    server.faults = [{"status": 404}]
    with pytest.warns(UserWarning, match="SHA256"), pytest.raises(RuntimeError, match="404"):
        download(server.url, tmp_path, progress=False)
    assert (tmp_path / "ViT-x.pt").read_bytes() == b"damaged"
    with pytest.warns(UserWarning, match="SHA256"):
        fetch(server, tmp_path)


def test_a_folder_in_the_way(server, tmp_path):
    (tmp_path / "ViT-x.pt").mkdir()
    with pytest.raises(RuntimeError, match="is not a regular file"):
        download(server.url, tmp_path, progress=False)


@pytest.mark.parametrize("url", ["http://127.0.0.1/x.pt", "http://127.0.0.1/abc/x.pt", f"http://127.0.0.1/{DIGEST}/"])
def test_address_without_a_digest(url, tmp_path):
    with pytest.raises(ValueError, match="sha256"):
        download(url, tmp_path)


def test_full_disk_is_not_taken_for_a_network_failure(server, tmp_path, monkeypatch):
    def full(file, chunk):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_all", full)
    with pytest.raises(OSError, match=f"No space left on device: {len(BODY):,} bytes were wanted") as caught:
        download(server.url, tmp_path, progress=False)
    assert caught.value.filename.startswith(str(tmp_path)) and caught.value.filename.endswith(".part")
    assert len(server.ranges) == 1


def test_threads_at_the_same_time_fetch_once(server, tmp_path):
    server.delay = 0.1
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download(server.url, tmp_path, progress=False), range(4)))
    fetch(server, tmp_path)
    assert server.ranges == [None]


def _in_process(url, root, results):
    results.put(download(url, root, progress=False))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_process_leaves_no_lock_and_another_goes_on(server, tmp_path):
    context = multiprocessing.get_context("fork")
    release = threading.Event()
    original = Handler.do_GET

    def stall(self):
        if not self.server.ranges:
            self.server.ranges.append(None)
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            self.wfile.write(BODY[:65536])
            release.wait(20)
        else:
            original(self)

    Handler.do_GET = stall
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fork beside the server's threads
            results = context.Queue()
            first = context.Process(target=_in_process, args=(server.url, tmp_path, results))
            second = context.Process(target=_in_process, args=(server.url, tmp_path, results))
            first.start()
            deadline = time.monotonic() + 20
            while not server.ranges and time.monotonic() < deadline:
                time.sleep(0.01)
            second.start()  # waits for the lock
            first.kill()
            first.join(20)
        assert results.get(timeout=20) == str(tmp_path / "ViT-x.pt")
        second.join(20)
    finally:
        Handler.do_GET = original
        release.set()
    fetch(server, tmp_path)


def test_without_locks_every_process_has_its_own_part(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "fcntl", None)
    server.faults = [{"cut": 1000}]
    fetch(server, tmp_path)
    os.unlink(tmp_path / "ViT-x.pt")
    server.faults = [{"drop": True}] * 5
    with pytest.raises(RuntimeError, match="gave up after 5 attempts in a row$"):
        download(server.url, tmp_path, progress=False)
    assert os.listdir(tmp_path) == []
    server.body = b"wrong"
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="wrong SHA256"):
        download(server.url, tmp_path, progress=False)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(True, True, True), (True, False, False), ("always", False, True), (False, True, False)],
)
def test_progress_bar(server, progress, terminal, shown, tmp_path, monkeypatch):
    pytest.importorskip("tqdm")

    class Screen(io.StringIO):
        def isatty(self):
            return terminal

    screen = Screen()
    monkeypatch.setattr("sys.stderr", screen)
    server.faults = [{"cut": 1000}]
    download(server.url, tmp_path, progress=progress)
    assert bool(screen.getvalue()) == shown
    assert not shown or ("ViT-x.pt" in screen.getvalue() and "256k" in screen.getvalue())


def test_tqdm_is_optional(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    download(server.url, tmp_path, progress="always")


def test_load_downloads_by_name(server, tmp_path, monkeypatch):
    from clipfast import checkpoints

    monkeypatch.setitem(checkpoints.MODELS, "ViT-B/32", server.url)
    # what comes is no checkpoint, and the error names it
    with pytest.raises(checkpoints.CheckpointError, match=str(tmp_path / "ViT-x.pt")):
        checkpoints.load("ViT-B/32", "cpu", download_root=str(tmp_path))
    assert (tmp_path / "ViT-x.pt").read_bytes() == BODY
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(checkpoints.CheckpointError, match="home/.cache/clip/ViT-x.pt"):
        checkpoints.load("ViT-B/32", "cpu")
