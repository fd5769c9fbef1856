# make run        install into .venv and distil on-policy, from nothing: python -m mindpangu.train recipe=kd_student
# make test       install with the test tools and run the tests, two files at a time
# make test-long  the tests that take more than a minute each
# make test-ascendc   the AscendC kernels' tests on the model of the chips, part of make test
# make test-sanitize, test-portable   the kernels' tests on a library with ASan and UBSan, or in portable C++
# make bench      speed against named peers, written to bench.json
# make bench-data    data curation against named peers, on the benchmarks' files in BENCHMARKS, written to bench_data.json
# make check      ruff

PYTHON ?= $(shell command -v python3.11 || command -v python3.10 || command -v python3)
VENV := .venv
BENCHMARKS ?= ../shared/data
BIN := $(VENV)/bin

.PHONY: run test test-long test-ascendc test-sanitize test-portable bench bench-data check clean

run: $(VENV)/.installed
	$(BIN)/python -m mindpangu.train recipe=kd_student

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-long: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m long

test-ascendc: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/ascend_kernels tests/ops/test_ascendc_host.py

test-sanitize: $(VENV)/.installed-dev
	LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 $(BIN)/python -m pytest --cpu-sanitize tests/ops

test-portable: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --cpu-level portable tests/ops

bench: $(VENV)/.installed-dev
	$(BIN)/python -m mindpangu.tools.bench

bench-data: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[bench]"
	$(BIN)/python -m mindpangu.tools.bench_curate $(BENCHMARKS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)) and "mindpangu needs Python 3.10 or 3.11; $(PYTHON) is %d.%d. Run: make PYTHON=<path of a supported one>" % sys.version_info[:2] or 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.installed-dev: setup.py pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@ $(VENV)/.installed
