"""libclipfast_cpu: when its operators run, what it says when they cannot, and an interface that both sides know."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import clipfast
from clipfast import dispatch, doctor, ops, tuning
from clipfast.kernels import cpu_attention, cpu_linear
from clipfast.kernels import cpu_library as library
from clipfast.packing import Rows

from . import csrc
from .cpus import CPUS, assume

pytestmark = pytest.mark.usefixtures("cpu_library")
HEADER = (csrc.ROOT / "csrc" / "clipfast_cpu.h").read_text()
PRODUCTS = ("linear", "mlp", "patch_embed", "project")


def runs_on(operator: str, dtype: torch.dtype = torch.float32, **facts) -> tuple[str, dict[str, str]]:
    decision = dispatch.decide(operator, None, dispatch.Call("cpu", dtype, **facts))
    return decision.backend, dict(decision.others)


@pytest.fixture
def on(monkeypatch):
    """on(cpu): dispatch decides as on that CPU, one of CPUS by its name."""
    return lambda cpu: assume(monkeypatch, CPUS.get(cpu, cpu))


def test_attention_runs_without_gradients_only():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert runs_on("attention", dtype)[0] == "cpu"
    backend, others = runs_on("attention", grad=True)
    assert backend == "torch" and "a gradient is wanted" in others["cpu"]
    assert runs_on("attention", torch.float64)[1]["cpu"] == "has no float64 kernel"


@pytest.mark.parametrize("operator", PRODUCTS)
def test_where_products_run(operator, on):
    for cpu in ("avx2", "avx512", "avx512_bf16", "amx"):
        on(cpu)
        for rows in (0, 16, 1024, 1 << 20):
            assert runs_on(operator, rows=rows)[0] == "cpu"
    for cpu in ("avx2", "avx512", "avx512_bf16"):  # nobody widens bfloat16 faster, or multiplies it
        on(cpu)
        assert runs_on(operator, torch.bfloat16, rows=1024)[0] == "cpu"
    assert runs_on(operator, grad=True)[0] == "torch"
    assert runs_on(operator, torch.float16)[1]["cpu"] == "has no float16 products"
    assert runs_on(operator, torch.float64)[1]["cpu"] == "has no float64 kernel"
    assert runs_on(operator, shape=(False,))[1]["cpu"] == "the operands differ in dtype"
    assert runs_on(operator, shape=(True,))[0] == "cpu"


def test_many_rows_of_bfloat16_are_left_to_amx(on):
    on("amx")
    for rows in (16, 32, 256, 512):
        assert runs_on("linear", torch.bfloat16, rows=rows)[0] == ("cpu" if rows <= 16 else "onednn"), rows
    assert "bfloat16 beyond 16 rows" in runs_on("linear", torch.bfloat16)[1]["cpu"]
    on(CPUS["amx"]._replace(instructions="avx2"))
    assert runs_on("linear", torch.bfloat16)[0] == "cpu", "held to less than the CPU has"
    on("baseline")
    assert runs_on("linear")[0] == "onednn" and "rule of thumb, not measured" in runs_on("linear")[1]["cpu"]
    with pytest.raises(RuntimeError, match="inference only"):
        dispatch.decide("linear", "cpu", dispatch.Call("cpu", torch.bfloat16, grad=True))
    assert dispatch.decide("linear", "cpu", dispatch.Call("cpu", torch.float32)).backend == "cpu", "a preference"


def test_rows_are_counted(on):
    """Of x; for a patch embedding, the patches of all images."""
    on("avx2")
    with torch.no_grad():
        for rows in (64, 65):
            clipfast.ops.linear(torch.randn(rows, 8).bfloat16(), torch.randn(8, 8).bfloat16())
        images, weight = torch.randn(2, 3, 16, 24).bfloat16(), torch.randn(8, 3, 4, 4).bfloat16()
        clipfast.ops.patch_embed(images, weight, torch.zeros(8), torch.zeros(25, 8))
    rows = {(operator, call.rows) for operator, call, _, _ in clipfast.explain()}
    assert rows == {("linear", 64), ("linear", 128), ("patch_embed", tuning.rows_bucket(2 * 24))}


def test_a_missing_library_leaves_its_operators_to_others_and_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(dispatch.compat, "onednn_missing", lambda: None)
    ours = library.LIBRARY
    monkeypatch.setattr(ours, "loaded", ours.load(tmp_path / "libclipfast_cpu.so"))
    for operator in ("attention", *PRODUCTS):
        backend, others = runs_on(operator)
        assert backend == ("onednn" if operator in dispatch._ONEDNN else "torch")
        assert "not built" in others["cpu"] and "CLIPFAST_CPU=1 pip install" in others["cpu"]
    with pytest.raises(RuntimeError, match="the CPU library is not built"):
        cpu_attention.attention(torch.zeros(1, 3, 1, 1), Rows((1,)), True, None)
    with pytest.raises(RuntimeError, match="the CPU library is not built"):
        cpu_linear.linear(torch.zeros(1, 1), torch.zeros(1, 1), None, None, None)


def test_other_versions_and_broken_files(cpu_library_file, tmp_path):
    csrc.assert_says_why_it_is_missing(library.LIBRARY, cpu_library_file, tmp_path, "clipfast_cpu_of_tomorrow")


@pytest.mark.parametrize(
    "struct",
    [
        library.AttentionArgs,
        library.AttentionPoolArgs,
        library.BlockArgs,
        library.BlocksArgs,
        library.LinearArgs,
        library.PackArgs,
        library.PatchEmbedArgs,
        library.PeakArgs,
        library.ReadArgs,
    ],
)
def test_header_and_python_agree(struct):
    csrc.assert_header_agrees(HEADER, library.LIBRARY, struct)
    assert f"#define CLIPFAST_CPU_READ_BLOCK {library.READ_BLOCK}\n" in HEADER
    csrc.assert_codes_agree(HEADER, "CLIPFAST_CPU", library.INSTRUCTIONS)
    csrc.assert_codes_agree(HEADER, "CLIPFAST_CPU", library.ACTIVATIONS)
    csrc.assert_codes_agree(HEADER, "CLIPFAST_CPU", library.LAYOUTS)
    csrc.assert_codes_agree(HEADER, "CLIPFAST_CPU", {str(d)[6:]: code for d, code in library.DTYPES.items()})


# as addresses: offsets of a sequence without rows, and nothing else is read from them
NOTHING = (ctypes.c_int32 * 2)()
SOMEWHERE = ctypes.addressof(NOTHING)


def attention_args(**changes) -> library.AttentionArgs:
    """Correct arguments for no sequences at all, but for the changes."""
    values = {"struct_size": ctypes.sizeof(library.AttentionArgs), "heads": 1, "width": 64, "threads": 1}
    return library.AttentionArgs(**(values | changes))


def pool_args(**changes) -> library.AttentionPoolArgs:
    """Correct arguments for no sequences at all, but for the changes."""
    sizes = {"terms": 4, "inner": 4, "heads": 2, "threads": 1}
    return library.AttentionPoolArgs(**({"struct_size": ctypes.sizeof(library.AttentionPoolArgs)} | sizes | changes))


def blocks_args(**changes) -> library.BlocksArgs:
    """Correct arguments for two blocks of no sequences, but for the changes: theirs, or the second one's."""
    sizes = {"struct_size": ctypes.sizeof(library.BlockArgs), "hidden": 8, "heads": 1}
    of_block = {name.removeprefix("second_"): changes.pop(name) for name in [*changes] if name.startswith("second_")}
    both = (library.BlockArgs * 2)(library.BlockArgs(**sizes), library.BlockArgs(**(sizes | of_block)))
    values = {"struct_size": ctypes.sizeof(library.BlocksArgs), "count": 2, "width": 64, "threads": 1}
    args = library.BlocksArgs(**(values | {"blocks": ctypes.addressof(both)} | changes))
    args.alive = both
    return args


def linear_args(**changes) -> library.LinearArgs:
    """Correct arguments for no rows, but for the changes."""
    values = {"struct_size": ctypes.sizeof(library.LinearArgs), "columns": 4, "terms": 8, "threads": 1}
    return library.LinearArgs(**(values | changes))


def pack_args(**changes) -> library.PackArgs:
    """Correct arguments for no columns, but for the changes."""
    values = {"struct_size": ctypes.sizeof(library.PackArgs), "bytes": SOMEWHERE, "terms": 8, "threads": 1}
    return library.PackArgs(**(values | changes))


def patch_embed_args(**changes) -> library.PatchEmbedArgs:
    """Correct arguments for no images, but for the changes."""
    sizes = {"channels": 3, "height": 4, "width": 4, "patch": 2, "features": 4, "threads": 1}
    return library.PatchEmbedArgs(**({"struct_size": ctypes.sizeof(library.PatchEmbedArgs)} | sizes | changes))


def somewhere(*names: str) -> dict[str, int]:
    return dict.fromkeys(names, SOMEWHERE)


ONE_SEQUENCE = {"sequences": 1, **somewhere("qkv", "out", "offsets")}
ONE_ROW = {"rows": 1, **somewhere("x", "weight", "out")}
ONE_POOLED = {"sequences": 1, **somewhere("query", "tokens", "offsets", "q_weight", "k_weight", "v_weight", "out")}
ONE_EMBEDDED = {
    "sequences": 1,
    **somewhere("x", "offsets", "index", "norm_weight", "norm_bias", "projection"),
    "between": SOMEWHERE + 4,
    "out": SOMEWHERE + 8,
}
ONE_IMAGE = {"batch": 1, **somewhere("images", "weight", "class_embedding", "positional_embedding", "out")}
REFUSED = [
    *(("attention", changes) for changes in ({"struct_size": 8}, {"heads": 0}, {"width": 0}, {"threads": 0})),
    *(("attention", changes) for changes in ({"dtype": 7}, {"dtype": -1}, {**ONE_SEQUENCE, "sequences": -1})),
    *(("attention", {**ONE_SEQUENCE, name: None}) for name in ("qkv", "out", "offsets")),
    *(("attention_pool", changes) for changes in ({"struct_size": 8}, {"dtype": 7}, {"heads": 3}, {"sequences": -1})),
    *(("attention_pool", {name: 0}) for name in ("terms", "inner", "heads", "threads")),
    *(("attention_pool", {**ONE_POOLED, name: None}) for name in ONE_POOLED if name != "sequences"),
    ("attention_pool", ONE_POOLED),  # of a sequence without rows
    *(("blocks", changes) for changes in ({"struct_size": 8}, {"count": 0}, {"dtype": 7}, {"second_heads": 3})),
    *(("blocks", {name: 0}) for name in ("width", "second_hidden", "second_heads", "second_struct_size", "threads")),
    *(("blocks", changes) for changes in ({**ONE_EMBEDDED, "sequences": -1}, {"columns": -1}, {"blocks": None})),
    *(
        ("blocks", {**ONE_EMBEDDED, name: None})
        for name in ("x", "between", "out", "offsets", "norm_weight", "norm_bias")
    ),
    *(("blocks", {**ONE_EMBEDDED, name: SOMEWHERE}) for name in ("between", "out")),  # over x
    ("blocks", {**ONE_EMBEDDED, "index": None}),  # and a projection
    ("blocks", {**ONE_EMBEDDED, "second_qkv_layout": library.LAYOUTS["packed"]}),
    *(("linear", changes) for changes in ({"struct_size": 8}, {"threads": 0}, {"dtype": 7})),
    *(("linear", {name: -1}) for name in ("rows", "columns", "terms", "activation")),
    ("linear", {"activation": 3}),
    *(("linear", {**ONE_ROW, name: None}) for name in ("x", "weight", "out")),
    *(("pack", changes) for changes in ({"struct_size": 8}, {"threads": 0}, {"dtype": 7}, {"bytes": None})),
    *(("pack", {name: -1}) for name in ("columns", "terms")),
    *(
        ("patch_embed", changes)
        for changes in ({"struct_size": 8}, {"dtype": 7}, {**ONE_IMAGE, "batch": -1}, {"height": -1}, {"width": -1})
    ),
    *(("patch_embed", {name: 0}) for name in ("channels", "patch", "features", "threads")),
    *(("patch_embed", {name: SOMEWHERE}) for name in ("mean", "std", "norm_weight", "norm_bias")),
    *(("patch_embed", {**ONE_IMAGE, name: None}) for name in ONE_IMAGE if name != "batch"),
    ("pack", {"columns": 1, "packed": SOMEWHERE, "weight": None}),
]


@pytest.mark.parametrize(
    ("operator", "changes"),
    REFUSED,
    # addresses differ from worker to worker
    ids=lambda value: (
        value
        if isinstance(value, str)
        else ", ".join(f"{name} {number}" for name, number in value.items() if number is None or abs(number) < 10)
    ),
)
def test_refusals_have_a_text(cpu_library, operator, changes):
    makers = {
        "attention": attention_args,
        "attention_pool": pool_args,
        "blocks": blocks_args,
        "linear": linear_args,
        "pack": pack_args,
        "patch_embed": patch_embed_args,
    }
    arguments = makers[operator](**changes)
    code = getattr(cpu_library, f"clipfast_cpu_{operator}")(arguments)
    assert code == -1
    with pytest.raises(RuntimeError, match="libclipfast_cpu: a null pointer, a size out of range"):
        library.LIBRARY.check(code)


ROW = (ctypes.c_int32 * 2)(0, 1)
INCOMPLETE = [(), ("index",), ("query", "index"), ("query", "norm_weight"), ("query", "norm_bias")]


@pytest.mark.parametrize("missing", INCOMPLETE, ids=lambda names: " ".join(("no", *names)))
def test_queries_are_handed_in_or_normalised_with_their_rows(cpu_library, missing):
    """All of an index and a LayerNorm, or a query: with both, or with a part, nothing is computed."""
    every = dict.fromkeys(("query", "index", "norm_weight", "norm_bias"), SOMEWHERE)
    changes = {**ONE_POOLED, **every, "offsets": ctypes.addressof(ROW), **dict.fromkeys(missing)}
    assert cpu_library.clipfast_cpu_attention_pool(pool_args(**changes)) == -1


def test_blocks_are_refused_for_nothing_else(cpu_library):
    """What `REFUSED` changes is right: an index is looked at next, and here it is of a sequence without rows."""
    assert cpu_library.clipfast_cpu_blocks(blocks_args(**ONE_EMBEDDED)) == -4


def test_memory_between_blocks_may_be_x_where_it_is_not_used(cpu_library):
    """With one block, and without an index."""
    over_x = {**ONE_EMBEDDED, "between": SOMEWHERE}
    assert cpu_library.clipfast_cpu_blocks(blocks_args(**over_x, count=1)) == -4
    assert cpu_library.clipfast_cpu_blocks(blocks_args(**over_x | {"index": None, "projection": None})) == 0


def test_a_patch_embedding_is_refused_for_nothing_else(cpu_library):
    """What `REFUSED` changes is right: with memory at these addresses it is computed."""
    names = [name for name in ONE_IMAGE if name != "batch"]
    memory = {name: (ctypes.c_float * 64)() for name in names}  # the most of them: the weight, [4, 3, 2, 2]
    memory["class_embedding"][:4] = 1, 2, 3, 4
    args = patch_embed_args(batch=1, **{name: ctypes.addressof(memory[name]) for name in names})
    assert cpu_library.clipfast_cpu_patch_embed(args) == 0
    assert memory["out"][:5] == [1, 2, 3, 4, 0]


def test_codes_without_a_meaning(cpu_library):
    assert cpu_library.clipfast_cpu_attention(None) == cpu_library.clipfast_cpu_linear(None) == -1
    assert cpu_library.clipfast_cpu_attention(attention_args()) == cpu_library.clipfast_cpu_linear(linear_args()) == 0
    assert cpu_library.clipfast_cpu_attention(attention_args(**ONE_SEQUENCE)) == 0
    for number in (9, -1):
        assert cpu_library.clipfast_cpu_attention(attention_args(instructions=number)) == -2
        assert cpu_library.clipfast_cpu_linear(linear_args(instructions=number)) == -2
    assert cpu_library.clipfast_cpu_error_text(0) == b"no error"
    assert b"has not the instructions" in cpu_library.clipfast_cpu_error_text(-2)
    assert b"no memory" in cpu_library.clipfast_cpu_error_text(-3)
    assert b"unknown" in cpu_library.clipfast_cpu_error_text(-1000)


@pytest.mark.parametrize("dtype", library.DTYPES.values())
def test_the_peak_is_of_operations_that_were_done(cpu_library, dtype):
    flops, size = ctypes.c_int64(), ctypes.sizeof(library.PeakArgs)
    for name, lanes in (("baseline", 4), ("avx2", 8), ("avx512", 16), ("avx512_bf16", 16 + 16 * dtype)):
        code, steps = library.INSTRUCTIONS[name], 1 << 20
        if code > cpu_library.clipfast_cpu_best():
            break
        start = time.perf_counter()
        args = library.PeakArgs(size, steps, ctypes.addressof(flops), dtype, 1, code)
        assert cpu_library.clipfast_cpu_peak(args) == 0
        # two operations for each of 12 sums in each lane; a loop that the compiler spared itself would take no time
        assert flops.value == 2 * 12 * lanes * steps
        assert flops.value / (time.perf_counter() - start) < 6.4e11, name
    for wrong in ({"steps": -1}, {"flops": None}, {"threads": 0}, {"struct_size": 1}):
        for field, value in wrong.items():
            args = library.PeakArgs(size, 1, ctypes.addressof(flops), dtype, 1, 1)
            setattr(args, field, value)
            assert cpu_library.clipfast_cpu_peak(args) == -1, field


def test_what_is_read_is_all_of_it_and_nothing_else(cpu_library):
    """Whole blocks; a read that the compiler spared itself would take no time, one past the end would hit the guard."""
    size, page = ctypes.sizeof(library.ReadArgs), mmap.PAGESIZE
    memory = mmap.mmap(-1, 64 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = start + 63 * page
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    try:
        for code in range(1, cpu_library.clipfast_cpu_best() + 1):
            for ahead, threads in ((0, 1), (512, 2), (1 << 20, 3)):
                for n_bytes in (0, library.READ_BLOCK, 63 * page):
                    args = library.ReadArgs(size, guard - n_bytes, n_bytes, ahead, threads, code)
                    assert cpu_library.clipfast_cpu_read(args) == 0
        args = library.ReadArgs(size, start, 48 * page, 0, 1, 0)
        began = time.perf_counter()
        for _ in range(1000):
            assert cpu_library.clipfast_cpu_read(args) == 0
        # no core loads as much as two vectors of 64 bytes at 8 GHz
        assert 1000 * args.bytes / (time.perf_counter() - began) < 1.024e12
    finally:
        libc.mprotect(ctypes.c_void_p(guard), page, 3)
    for field, value in (
        ("bytes", 1),
        ("bytes", -1024),
        ("ahead", -1),
        ("data", None),
        ("threads", 0),
        ("struct_size", 1),
    ):
        args = library.ReadArgs(size, start, library.READ_BLOCK, 0, 1, 1)
        setattr(args, field, value)
        assert cpu_library.clipfast_cpu_read(args) == -1, field


def test_the_form_asked_for_is_the_one_that_runs(monkeypatch):
    monkeypatch.setitem(library.INSTRUCTIONS, "avx2", 9)
    with pytest.raises(RuntimeError, match="has not the instructions"):
        cpu_attention.attention(torch.zeros(1, 3, 1, 1), Rows((1,)), True, None, "avx2")
    with pytest.raises(RuntimeError, match="has not the instructions"):
        cpu_linear.linear(torch.zeros(1, 1), torch.zeros(1, 1), None, None, None, "avx2")


@pytest.fixture
def switch(monkeypatch):
    """Sets the variable, and lets it be read anew."""

    def to(name: str) -> None:
        monkeypatch.setenv(library.SWITCH, name)
        library.best.cache_clear()

    yield to
    monkeypatch.undo()
    library.best.cache_clear()


def test_the_variable_holds_every_call_to_a_form(switch, monkeypatch):
    ran = []
    monkeypatch.setattr(cpu_attention, "run", lambda operator, args: ran.append(args.instructions))
    monkeypatch.setattr(cpu_linear, "run", lambda operator, args: ran.append(args.instructions))
    for name in ("baseline", ""):  # one that every CPU has, and none
        switch(name)
        cpu_attention.attention(torch.zeros(1, 3, 1, 1), Rows((1,)), True, None)
        cpu_linear.linear(torch.zeros(1, 1), torch.zeros(1, 1), None, None, None)
        most = library.LIBRARY.use().clipfast_cpu_best()
        assert ran == [library.INSTRUCTIONS[name] if name else most] * 2
        assert library.INSTRUCTIONS[library.best()] == ran.pop() == ran.pop()
        assert (runs_on("linear")[0] == "onednn") == (library.best() == "baseline")
    switch("baseline")
    assert "run with baseline (set by CLIPFAST_CPU_INSTRUCTIONS)" in doctor.report()


@pytest.mark.parametrize(("name", "why"), [("avx3", "that is unknown"), ("avx2", "this CPU or build has not")])
def test_a_form_that_is_not_here_is_named(switch, monkeypatch, name, why):
    monkeypatch.setattr(library.LIBRARY, "loaded", SimpleNamespace(clipfast_cpu_best=lambda: 1))
    switch(name)
    for operator in (library.best, lambda: ops.linear(torch.zeros(1, 1), torch.zeros(1, 1))):
        with torch.no_grad(), pytest.raises(ValueError, match=f"CLIPFAST_CPU_INSTRUCTIONS={name}: {why}.*be baseline"):
            operator()


def test_this_cpu_runs_every_form_that_pytorch_finds_it_can(cpu_library):
    capability = torch.backends.cpu.get_cpu_capability()
    best = {"AVX2": "avx2", "AVX512": "avx512"}.get(capability, "baseline")
    assert cpu_library.clipfast_cpu_best() >= library.INSTRUCTIONS[best]
    assert library.best() in library.INSTRUCTIONS
    for code in range(1, 5):
        runs = cpu_library.clipfast_cpu_linear(linear_args(instructions=code)) == 0
        assert runs == (code <= cpu_library.clipfast_cpu_best())


BEFORE_A_GUARD = """
import ctypes, itertools, mmap, sys
from pathlib import Path
import torch
from clipfast.kernels import cpu_attention, cpu_library, cpu_linear, cpu_patch_embed
from clipfast.packing import Rows

cpu_library.LIBRARY.forget(Path(sys.argv[1]))
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
kept = []

def guarded(tensor):
    "A copy whose last byte is the last before a page that nobody may touch."
    size = -(-max(1, tensor.nbytes) // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + size), page, 0) == 0  # PROT_NONE
    kept.append(memory)
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=size - tensor.nbytes)
    return copy.view(tensor.shape).copy_(tensor)

torch.set_num_threads(2)
best = cpu_library.LIBRARY.use().clipfast_cpu_best()
forms = [name for name, code in cpu_library.INSTRUCTIONS.items() if 0 < code <= best]
for form, dtype in itertools.product(forms, (torch.float32, torch.bfloat16)):
    for rows, terms, columns in itertools.product((1, 7, 300), (1, 31, 64, 130), (1, 3, 6, 64, 67, 97)):
        x, weight, bias, residual = (
            guarded(torch.randn(shape).to(dtype))
            for shape in ((rows, terms), (columns, terms), (columns,), (rows, columns))
        )
        norm = guarded(torch.randn(terms)), guarded(torch.randn(terms))
        packed, transposed = guarded(cpu_linear.pack(weight, form)), guarded(weight.t().contiguous()).t()
        for of, read in ((weight, None), (weight, packed), (transposed, None)):
            torch.ops.clipfast.cpu_linear(x, of, read, bias, residual, *norm, "gelu", form, 1e-5)
    for width, causal in itertools.product((1, 17, 64), (True, False)):
        qkv = guarded(torch.randn(70, 3, 2, width).to(dtype))
        cpu_attention.attention(qkv, Rows((3, 50, 17)), causal, None, form)
    for size, columns, of_bytes in itertools.product((1, 3, 8), (1, 17, 64), (True, False)):
        images = torch.randn(2, 3, 3 * size, 2 * size + 1)
        images = guarded(images.byte() if of_bytes else images.to(dtype))
        shapes = ((columns, 3, size, size), (columns,), (1 + 3 * ((2 * size + 1) // size), columns))
        embedding = [guarded(torch.randn(shape).to(dtype)) for shape in shapes]
        moments = [guarded(torch.rand(3).double()) for _ in range(2)]
        norm = [guarded(torch.randn(columns)) for _ in range(2)]
        cpu_patch_embed.patch_embed(images, *embedding, *moments, *norm, 1e-5, form)
if "--read-beyond" in sys.argv:
    ctypes.string_at(qkv.data_ptr() + qkv.nbytes, 1)
print("nothing was read beyond")
"""


@pytest.mark.parametrize("beyond", [(), ("--read-beyond",)], ids=["", "the guard works"])
def test_nothing_beyond_an_argument_is_read(cpu_library_file, beyond):
    command = [sys.executable, "-c", BEFORE_A_GUARD, str(cpu_library_file), *beyond]
    done = subprocess.run(command, capture_output=True, text=True, cwd=csrc.ROOT, timeout=300, check=False)
    assert (done.returncode == 0) == (not beyond), done.stderr
    assert ("nothing was read beyond" in done.stdout) == (not beyond)
