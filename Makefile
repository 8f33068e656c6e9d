# Two commands do everything, installation included:  make demo  |  make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint types sanitize emulate clean

demo: $(STAMP)
	$(BIN)/dqbart demo --out demo-out

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses logical --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror kernels/dqbart_kernels/cpu/src/* tests/native/*.cpp tests/native/simde/*

types: $(STAMP)
	$(BIN)/mypy

# The native library under address and undefined-behaviour sanitizers; afterwards it is built again without.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
sanitize: $(STAMP)
	CFLAGS="$(SANITIZE)" CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest tests/test_cpu_products.py tests/test_cpu_engine.py tests/test_cpu_encoder.py
	$(BIN)/python setup.py -q build_ext --inplace --force

# Instruction sets that this processor lacks, in emulation.
emulate:
	tests/native/emulate.sh

# torch first and by itself: a CPU build that is at hand stays the one that is used.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(STAMP)

clean:
	rm -rf $(VENV) demo-out demo-out.training build *.egg-info
