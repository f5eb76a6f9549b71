# Every target sets itself up; `make help` lists them.
#   make PYTHON=python3.11    another interpreter (constraints.txt is for Python 3.11)
#   make VENV=/elsewhere      another place for the environment
PYTHON ?= python3
VENV   ?= .venv

PY      := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --no-input --disable-pip-version-check -c constraints.txt

# Stamps: a step runs again when what it was made from changes.
TORCH := $(VENV)/.stamp-torch
DEMO  := $(VENV)/.stamp-demo
TEST  := $(VENV)/.stamp-test
BENCH := $(VENV)/.stamp-bench

comma := ,
# $(call step,what,command): pip says nothing for minutes, so a dot every five seconds and the time at the end. No dot
# outlives this shell, whoever stops it.
step = @printf 'setting up $(VENV): %s ' '$(1)'; start=$$(date +%s); shell=$$$$; \
	(while sleep 5 && kill -0 $$shell 2>/dev/null; do printf .; done) & \
	trap "kill $$! 2>/dev/null" EXIT INT TERM; $(2) || exit; echo " $$(($$(date +%s) - start)) s"

# Peers are what parity tests compare with. One that cannot be installed costs its tests (they skip and say so),
# unless CLIPFAST_REQUIRE_PEERS=1, as in CI.
peer = { $(INSTALL) $(1) || { \
	echo "warning: not installed: $(1)"; test "$$CLIPFAST_REQUIRE_PEERS" != 1; }; }

.PHONY: help demo test test-older-cpus test-versions lint bench on-this-cpu readme gpu-kit gpu gpu-rest clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(DEMO) ## see clipfast work on real images
	$(VENV)/bin/clipfast demo

test: $(TEST) ## lint, then the whole test suite
	$(PY) -m ruff check .
	$(PY) -m pytest -n auto --maxprocesses=4 --durations=10

# What depends on the CPU, held to older ones, so that a failure on one of those shows here. Without what is the same on
# each (the interpreter, strides), what is slow without AVX-512 (float16), whole losses and most architectures.
CPU_TESTS = $(PY) -m pytest -n auto --maxprocesses=4 \
	-k "not triton and not strides and not through and not -float16 and not RN50 and not RN101 and not B/16 and not L/14" \
	$(addprefix tests/test_,$(addsuffix .py,blocks dispatch cpu_library $(addprefix cpu_,linear attention attention_pool patch_embed) \
	ops gradients model))
test-older-cpus: $(TEST) ## what depends on the CPU, held to AVX2 and to plain C++
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 CLIPFAST_CPU_INSTRUCTIONS=avx2 $(CPU_TESTS)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 \
		CLIPFAST_CPU_INSTRUCTIONS=baseline $(CPU_TESTS)

test-versions: ## a reduced set of tests on each PyTorch that is promised, oldest to newest   VERSIONS="2.6 newest"
	$(PYTHON) -m tests.versions $(VERSIONS)

lint: $(TEST) ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: $(BENCH) ## time whole models against openai/CLIP and the other peers, in ten minutes   ARGS="--models RN50"
	$(VENV)/bin/clipfast bench $(ARGS)

on-this-cpu: $(BENCH) ## all of a CPU: products and ViT-B/32, into benchmarks/results, in 20 minutes   OUT=folder
	PYTHONPATH=. $(PY) -m benchmarks.on_this_cpu $(if $(OUT),--out "$(OUT)") $(ARGS)

readme: $(TEST) ## write the README's tables from benchmarks/results, and draw their pictures
	$(PY) -m clipfast.bench.report --plots

# No environment of its own: a machine with a GPU may have no network, and brings torch and Triton (PYTHON=/path/to/it).
# What it lacks is carried there in a kit.   make gpu OUT=/elsewhere KIT=folder GPU_ARGS="--only towers"
KIT ?= .gpu-kit
GPU  = PYTHONUNBUFFERED=1 PYTHONPATH=. $(PYTHON) -m benchmarks.gpu
gpu-kit: ## with a network: what a machine with a GPU lacks, in one folder   PYTHON312=/path/to/python3.12
	PYTHONPATH=. $(PYTHON) -m benchmarks.gpu.kit --out "$(KIT)" $(if $(PYTHON312),--python "$(PYTHON312)")

gpu: ## on a machine with a GPU: the headline, checked and timed, in five and a half minutes
	$(GPU) headline --kit "$(KIT)" $(if $(OUT),--out "$(OUT)") $(GPU_ARGS)

gpu-rest: ## after it: check every kernel, and time the rest, in four minutes
	$(GPU) rest --kit "$(KIT)" $(if $(OUT),--out "$(OUT)") $(GPU_ARGS)

clean: ## remove the environment, builds and caches
	rm -rf $(VENV) "$(KIT)" "$(KIT).new" build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f clipfast/kernels/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and alone: with it in place, no other package's wish for "torch" can bring a second, larger one.
$(TORCH): constraints.txt
	@$(PYTHON) -m venv $(VENV)
	$(call step,torch,$(INSTALL) torch)
	$(call step,what builds csrc/,$(INSTALL) setuptools wheel && { command -v cmake >/dev/null || $(INSTALL) cmake || :; })
	@touch $@

# No build isolation: an isolated build would fetch its own tools past constraints.txt.
$(DEMO): $(TORCH) pyproject.toml setup.py
	$(call step,clipfast and what the demo needs,$(INSTALL) --no-build-isolation -e ".[demo]")
	@[ -t 1 ] || sed 's/^/warning: a part of csrc was not built: /' clipfast/kernels/*.txt 2>/dev/null || :
	@touch $@

# --no-deps: torchvision, timm and open_clip_torch would choose a torch and a torchvision of their own.
$(TEST): $(DEMO)
	$(call step,what the tests need,$(INSTALL) --no-build-isolation -e ".[demo$(comma)test]")
	$(call step,transformers,$(call peer,transformers))
	$(call step,open_clip,$(call peer,--no-deps torchvision) && $(call peer,--no-deps timm) && \
		$(call peer,--no-deps open_clip_torch))
	$(call step,openai-clip,$(call peer,--no-deps --no-build-isolation openai-clip))
	$(call step,onnxruntime,$(call peer,onnxruntime onnx onnxscript))
	@touch $@

# These are compared where they can be had, and missing is a note in the table.
$(BENCH): $(TEST)
	$(call step,openvino,$(INSTALL) openvino || echo "warning: not installed: openvino")
	@touch $@
