# Two commands on a fresh machine: `make demo` and `make test`. Each first makes $(VENV).

PYTHON ?= python3
VENV ?= .venv
DEMO ?= demo
TESTS ?= tests
JOBS ?= 2
# for `make bench`, which takes hours on two cores and goes on where it was stopped
DATA ?= $(or $(POTSTILL_DATA),../shared/data)
RUNS ?= runs
DS_CONFIG ?= ds_configs/cpu_bf16.json
# folders of the public code that step.py and memory.py measure against, if they are there
MINILMV2 ?=
DISTILBERT ?=
# and of the one whose compressor knowledge_logits.py measures beside ours
DISTILLKIT ?=

# An absolute PATH: DeepSpeed's launcher starts ninja and python from whatever folder it is in.
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
export POTSTILL_DATA := $(abspath $(DATA))
# DeepSpeed's own ops are built here, not in a folder that other projects share.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions
INSTALL := "$(PYTHON)" tools/install.py "$(VENV)" \
	$(if $(TORCH),--torch "$(TORCH)") $(if $(SYSTEM_TORCH),--system_torch)
RIVALS := $(if $(MINILMV2),--minilmv2 "$(MINILMV2)") $(if $(DISTILBERT),--distilbert "$(DISTILBERT)")

.PHONY: help demo test check bench clean
.DEFAULT_GOAL := help

help:
	@echo "make demo     shard, train a teacher, distil, fine-tune, report: under 10 minutes on 2 cores"
	@echo "make test     every test (TESTS=tests/pretrain for some of them, JOBS=2 files at a time)"
	@echo "make check    formatting, lint and types"
	@echo "make bench    every benchmark, then the tables of docs/ (hours)"
	@echo "make clean    remove the environment and the demo"
	@echo
	@echo "PYTHON=python3.12   the Python that makes the environment (3.11 or newer)"
	@echo "VENV=.venv          where the environment stands"
	@echo "SYSTEM_TORCH=1      use the torch that this Python already has"
	@echo "TORCH=torch==2.13.0 what to install as torch, instead of choosing by the machine"

$(VENV)/.installed: requirements.txt pyproject.toml tools/install.py
	$(INSTALL)
	@touch $@

$(VENV)/.test-installed: requirements-test.txt $(VENV)/.installed
	python -m pip install --no-compile --no-deps -r requirements-test.txt
	@touch $@

demo: $(VENV)/.installed
	@# a build that was killed leaves a lock, at which the next start would wait for ever
	@if [ -d "$(TORCH_EXTENSIONS_DIR)" ]; then find "$(TORCH_EXTENSIONS_DIR)" -name lock -delete; fi
	python -m examples.demo --output "$(DEMO)"

test: $(VENV)/.test-installed
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
		echo "no chromium here: the tests of the report's page in a browser are skipped"
	python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder $(TESTS)

check: $(VENV)/.test-installed
	ruff format --check .
	ruff check .
	mypy

bench: $(VENV)/.test-installed
	python benchmarks/attention.py
	python benchmarks/shards.py
	python benchmarks/loader.py --json benchmarks/results/loader-cpu.json
	python benchmarks/step.py $(RIVALS) --json benchmarks/results/step-cpu.json \
		--chart docs/images/step-cpu.svg
	python benchmarks/memory.py $(RIVALS) --json benchmarks/results/memory-cpu.json
	python benchmarks/scaling.py
	python benchmarks/forecast.py --measured benchmarks/results/scaling-cpu.json \
		--between_gigabytes 1.25 --between_microseconds 50 \
		--json benchmarks/results/forecast-cpu.json
	if python -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
		python benchmarks/gpu.py --json benchmarks/results/gpu.json; \
	else echo "no GPU here: benchmarks/gpu.py is left out"; fi
	python benchmarks/real_run.py --ds_config "$(DS_CONFIG)" --output "$(RUNS)/real"
	python benchmarks/finetune_study.py --output "$(RUNS)/finetune" \
		--model student="$(RUNS)/real/att-mse-uniform/student"
	python benchmarks/task_specific_study.py --output "$(RUNS)/task-specific"
	python benchmarks/grid_overhead.py --rows 600 --output "$(RUNS)/grid-overhead"
	RAY_gcs_rpc_server_reconnect_timeout_s=5 python benchmarks/grid_chaos.py --kills 20 \
		--kinds driver,group --rows 48 --seeds 6 --life 0.35 --output "$(RUNS)/grid-chaos"
	python benchmarks/lean_forms.py
	python benchmarks/mlm_head.py --shards "$(RUNS)/real/shards" --output "$(RUNS)/head"
	python benchmarks/students.py --ds_config "$(DS_CONFIG)" --data "$(RUNS)/real/shards" \
		--teacher "$(RUNS)/head/frozen/student"
	python benchmarks/extraction_study.py --teacher "$(RUNS)/head/frozen/student" \
		--shards "$(RUNS)/real/shards" --output "$(RUNS)/extraction"
	python benchmarks/grid_study.py --rows 1000 --precision bf16 --output "$(RUNS)/grid" \
		--model att-mse-uniform="$(RUNS)/real/att-mse-uniform/student" \
		--model att-mse-random="$(RUNS)/real/att-mse-random/student" \
		--model etd-impt-3x192="$(RUNS)/extraction/seed-0/students/etd-impt/student"
	if command -v chromium || command -v chromium-browser; then \
		python benchmarks/page_screenshot.py --report benchmarks/results/grid-study.json; \
	else echo "no chromium here: the pictures of the page are left out"; fi
	python benchmarks/objective_study.py --teacher "$(RUNS)/head/frozen/student" \
		--shards "$(RUNS)/real/shards" --output "$(RUNS)/objectives"
	python benchmarks/knowledge_logits.py --teacher "$(RUNS)/head/frozen/student" \
		--data "$(RUNS)/real/shards" $(if $(DISTILLKIT),--distillkit "$(DISTILLKIT)")
	python benchmarks/knowledge_bytes.py
	python benchmarks/knowledge_deviation.py --data "$(RUNS)/real/shards" \
		--head_teacher "$(RUNS)/head/frozen/student" --trained hid-seq hid-cls att-mse kd
	python benchmarks/knowledge_speed.py --data "$(RUNS)/real/shards"
	python benchmarks/knowledge_chaos.py --output "$(RUNS)/knowledge-chaos" --kills 20
	python benchmarks/knowledge_search.py --ds_config "$(DS_CONFIG)" --output "$(RUNS)/knowledge-search"
	python benchmarks/fill_docs.py

clean:
	rm -rf "$(VENV)" "$(DEMO)"
