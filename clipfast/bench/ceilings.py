"""What this machine gives at best, measured before anything else: every floor is computed from it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from ctypes import addressof, c_int64, sizeof
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast import compat, ops, roofline
from clipfast.bench import environment
from clipfast.kernels import cpu_library
from clipfast.timing import on_device

COPY, READ = "copy", "read"
# what the ceiling of a dtype was measured by
PEAK, PRODUCT = "peak of fused multiply-adds", "fastest product measured"
PLAIN, FUSED, OURS = "F.linear", "oneDNN fused", "clipfast.ops.linear"
# for one dtype on a CPU
SECONDS = 6.0
# of the square product and of the copied buffer; the second for a look whether everything runs
SIZES = {"cuda": 8192, "cpu": 4096}
BYTES = {"cuda": 2 << 30, "cpu": 256 << 20}
QUICK_SIZE, QUICK_BYTES = 512, 1 << 22
# Of the buffer that is read, far more than caches hold; less if that is more than this share of the free memory. No
# power of two: threads that read so far apart meet in the same banks of memory (512 MiB 43 GB/s, 487 MiB 47, Zen 4)
READ_BYTES, READ_SHARE = 487 << 20, 0.25
# how far ahead of the reading memory is asked for: which is best depends on the CPU, and on who else reads
AHEAD = (0, 512, 4096)


class Ceilings(NamedTuple):
    """What was measured.

    rates:    "copy" in bytes/s, read and written; on a CPU "read" in bytes/s; a dtype's name in FLOP/s.
    by:       of each dtype, PEAK or PRODUCT.
    products: of each dtype, FLOP/s of the fastest product.
    single:   of each dtype, FLOP/s of one thread's multiply-adds; on a CPU with the library.
    cached:   bytes that the CPU's last caches hold together.
    """

    rates: dict[str, float]
    by: dict[str, str]
    products: dict[str, float]
    single: dict[str, float] = {}
    cached: int = 0

    def floor(self, works: Iterable[roofline.Work], dtype: str) -> float:
        """Seconds below which these launches cannot run: on a CPU all together, on a GPU one after another."""
        if READ in self.rates:
            return roofline.whole(works, self.rates[dtype], self.rates[READ], self.rates[COPY], self.cached)
        return roofline.seconds(works, self.rates[dtype], self.rates[COPY])


def measure(device: torch.device, dtypes: Iterable[str], *, quick: bool = False) -> Ceilings:
    """A copy, and for each dtype's name a large square product; on a CPU also what it reads and multiplies at best.

    A library's product is no ceiling: another product can be faster. Multiply-adds in registers are one, unless the CPU
    has instructions that the loop does not know (AMX): then the product is faster, and is taken.
    Large, so that everything else is a smaller share: 4096 (a GPU: 8192) each way. quick: small, and worth nothing.
    """
    rates = {COPY: copy_bytes_per_s(device, QUICK_BYTES if quick else BYTES[device.type])}
    found = Ceilings(rates, {}, {}, {}, environment.cache_bytes())
    if device.type == "cpu" and (reading := fastest_reading(QUICK_BYTES if quick else READ_BYTES)):
        found.rates[READ] = reading.bytes_per_s
    for name in dtypes:
        size, dtype = QUICK_SIZE if quick else SIZES[device.type], getattr(torch, name)
        product, peak = product_flops_per_s(device, dtype, size), 0.0
        if device.type == "cpu":
            loop = 0.002 if quick else 0.05
            if single := multiply_adds_per_s(dtype, loop, 1):
                found.single[name] = single
            # no less than one thread: somebody else may have a core
            peak = max(single, multiply_adds_per_s(dtype, loop, torch.get_num_threads()))
        found.products[name] = product
        found.rates[name], found.by[name] = max((peak, PEAK), (product, PRODUCT))
    return found


class Reading(NamedTuple):
    """A way to read memory, of libclipfast_cpu.

    bytes_per_s: what was measured.   form: whose instructions.   ahead: bytes ahead of the reading are asked for.
    """

    bytes_per_s: float
    form: int
    ahead: int

    def __call__(self, tensor: Tensor) -> None:
        """Read a tensor, contiguous and on the CPU, once, with PyTorch's threads, up to its last whole READ_BLOCK."""
        n_bytes = tensor.nbytes - tensor.nbytes % cpu_library.READ_BLOCK
        args = (tensor.data_ptr(), n_bytes, self.ahead, torch.get_num_threads(), self.form)
        cpu_library.run("read", cpu_library.ReadArgs(sizeof(cpu_library.ReadArgs), *args))


def fastest_reading(n_bytes: int) -> Reading | None:
    """How PyTorch's threads read a buffer of so many bytes fastest, best of several; None without libclipfast_cpu.

    n_bytes: fewer are taken where memory is short, a multiple of the library's block.
    """
    if cpu_library.missing():
        return None
    n_bytes = int(min(n_bytes, READ_SHARE * environment.available_bytes(torch.device("cpu"))))
    n_bytes -= n_bytes % cpu_library.READ_BLOCK
    # written to: pages that nobody has touched are one page of zeros
    data = torch.ones(n_bytes // 4, dtype=torch.int32)

    def measured(form: int, ahead: int) -> Reading:
        start = time.perf_counter()
        Reading(0.0, form, ahead)(data)
        return Reading(n_bytes / (time.perf_counter() - start), form, ahead)

    ways = [measured(form, ahead) for _ in range(5) for form in _forms() for ahead in AHEAD]
    return max(ways, key=lambda way: way.bytes_per_s)


def _forms() -> range:
    """All that run here, not the newest alone: wide registers can slow the clock."""
    codes = cpu_library.INSTRUCTIONS
    return range(codes["baseline"], codes[cpu_library.best()] + 1)


def multiply_adds_per_s(dtype: torch.dtype, seconds: float, threads: int, instructions: str | None = None) -> float:
    """FLOP/s of fused multiply-adds in registers, on so many threads, in the best form that libclipfast_cpu has.

    A product is no faster in the form's instructions, whoever wrote it. What has no instructions for a dtype widens it
    and multiplies float32. 0 where the library is missing.
    seconds:      of one loop, at least.
    instructions: of this form alone.
    """
    if cpu_library.missing():
        return 0.0
    code = cpu_library.DTYPES.get(dtype, 0)
    forms = _forms() if instructions is None else (cpu_library.form(instructions),)
    return max(_multiply_adds_per_s(code, form, seconds, threads) for form in forms)


def _multiply_adds_per_s(dtype: int, form: int, seconds: float, threads: int) -> float:
    flops, steps = c_int64(), 1000

    def run() -> float:
        args = (steps, addressof(flops), dtype, threads, form)
        start = time.perf_counter()
        cpu_library.run("peak", cpu_library.PeakArgs(sizeof(cpu_library.PeakArgs), *args))
        return time.perf_counter() - start

    while run() < seconds:
        steps *= 2
    taken = min(run() for _ in range(5))
    return flops.value / taken


def copy_bytes_per_s(device: torch.device, n_bytes: int) -> float:
    """Copy of a large buffer within the device's memory, bytes read plus bytes written, best of several."""
    source = torch.empty(n_bytes // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * n_bytes / min(on_device(lambda: target.copy_(source), device) for _ in range(10))


def product_flops_per_s(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """A square matrix product on random data: on a GPU torch.mm, on a CPU the fastest of `products`.

    A GPU: the median of several, for clocks fall under load, and what is timed later runs under load. A CPU: the best.
    """
    if device.type != "cuda":
        ways = products(*operands(size, size, size, dtype)).values()
        start, best = time.perf_counter(), float("inf")
        with torch.no_grad():
            # a slow or busy machine must not spend minutes here; the first time of each way is its warm-up
            for number, way in itertools.product(range(5), ways):
                taken = on_device(way, device)
                best = min(best, taken) if number else best
                if number and time.perf_counter() - start > SECONDS:
                    break
        return 2 * size**3 / best
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    times = sorted(on_device(lambda: torch.mm(a, b, out=out), device) for _ in range(11))
    return 2 * size**3 / times[len(times) // 2]


def operands(rows: int, terms: int, outputs: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Input [rows, terms], weight [outputs, terms] and bias [outputs]: normal, results of about unit size."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, terms, generator=generator)
    weight = torch.randn(outputs, terms, generator=generator) * terms**-0.5
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)


def products(x: Tensor, weight: Tensor, bias: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The ways to x @ weight.T + bias that this CPU has."""
    ways: dict[str, Callable[[], Tensor]] = {PLAIN: lambda: F.linear(x, weight, bias)}
    if _fuses(x.dtype):
        ways[FUSED] = lambda: compat.linear_pointwise(x, weight, bias, "none", [], "")
    ways[OURS] = lambda: ops.linear(x, weight, bias)
    return ways


def _fuses(dtype: torch.dtype) -> bool:
    if compat.onednn_missing():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and compat.onednn_has_bfloat16())
