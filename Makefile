# Nothing but Python (>= 3.11) and make is needed; every target installs what it uses into .venv, once.
#
#   make demo     train a small model and its dense twin, evaluate both        (base package only)
#   make test     the tests, without a few that take minutes                   (also torch, TensorFlow, linters)
#   make test-slow  those few
#   make test-newest  the tests that touch other projects, with the newest releases of everything
#   make check    format, lint, types, layers
#
# Settings, for example `make test PYTHON=python3.13`:

PYTHON ?= python3
VENV   ?= .venv
# Workers of the test run.
JOBS   ?= 2
# The tested releases of everything, for every supported Python (`make lock`). LOCK= takes the newest ones.
LOCK   ?= constraints.txt
# One release of torch that is tested and is small where a CPU build is at hand; a newer one may bring gigabytes of
# CUDA with it. May carry pip options.
TORCH  ?= torch==2.13.0
# More arguments for pytest: `make test TESTS='tests/ttt -k chunk'`.
TESTS  ?=

# A virtual environment that happens to be active has no say here.
unexport VIRTUAL_ENV PYTHONHOME PYTHONPATH

.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-newest check check-plan golden lock clean

python := $(VENV)/bin/python
base   := $(VENV)/.installed-base
full   := $(VENV)/.installed-full
log    := $(VENV)/pip.log
newest := .venv-newest
# Where a new release of another project is felt first.
touching := tests/interop tests/data tests/train/test_checkpoint*.py tests/evals/test_harness.py tests/app/test_bucket.py \
            tests/model/test_residuals.py
# A variable, because a comma would end the argument of $(call).
everything := '.[code,dev,gcs,harness,hf,ruler,tf,tpu,wandb]'

help:
	@echo "make demo     train a small model and its dense twin on this machine and compare them"
	@echo "make test     run the tests, without a few that take minutes"
	@echo "make test-slow  run those few"
	@echo "make test-newest  run the tests that touch other projects, with the newest releases of everything"
	@echo "make check    format, lint, types, layers"
	@echo "make check-plan  compile one shipped plan again and compare it with docs/plans.json"
	@echo "make lock     write the newest releases of everything into constraints.txt; run all tests afterwards"
	@echo "make golden   rewrite the golden files of the tests; read the diff afterwards"
	@echo "make clean    remove everything that make created"

demo: $(base)
	@PATH="$(abspath $(VENV))/bin:$$PATH" sh launch/demo.sh

test: $(full)
	$(python) -m pytest -n $(JOBS) --dist worksteal $(TESTS)

test-slow: $(full)
	$(python) -m pytest -n $(JOBS) --dist loadfile -m slow

# A fresh environment each time: the newest releases are those of today.
test-newest:
	rm -rf $(newest)
	$(MAKE) test VENV=$(newest) LOCK= TESTS='$(touching)'

check: $(full)
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
	PATH="$(abspath $(VENV))/bin:$$PATH" lint-imports --no-logo

# Compiles one of the shipped plans again, the cheapest, and compares it with its record.
check-plan: $(full)
	$(python) -m tests.benchmarks.record_plans --check "paper:500m_dense v6e:8x8"

golden: $(full)
	$(python) -m pytest -n $(JOBS) --update-golden $(TESTS)
	@echo "Now read the difference: git diff tests/golden"

# torch's libraries of CUDA stay out: a build for the CPU has none, and torch names their releases exactly anyway.
lock: $(full)
	echo '$(TORCH)' | $(python) -m uv pip compile pyproject.toml - --all-extras --universal --python-version 3.11 \
	  --upgrade --no-annotate --custom-compile-command 'make lock' --output-file constraints.txt --quiet
	sed -E '/^(cuda-|nvidia-(cu|nc|nv)|triton)/d' constraints.txt >constraints.txt.new
	mv constraints.txt.new constraints.txt

clean:
	rm -rf $(VENV) $(newest) .cache .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info build dist

# --- installation ------------------------------------------------------------------------------------------------

# The variables reach the environments that pip makes for building, too; pip 25.3 and newer reads the second one there.
locked := $(if $(LOCK),PIP_CONSTRAINT=$(LOCK) PIP_BUILD_CONSTRAINT=$(LOCK))

# $(call install,ARGUMENTS): all of pip's output goes to the log, the screen shows the large packages as they come,
# and the end of the log when pip fails.
install = { $(locked) $(python) -m pip install --no-input --disable-pip-version-check --progress-bar off $(1) 2>&1; \
	echo "pip exits with $$?"; } | awk -v log_file=$(log) '\
	{ print >> log_file; last[NR % 20] = $$0 } \
	/^ *(Downloading|Using cached) .*\([0-9.]+ [MG]B\)/ { size = $$(NF - 1); sub(/\(/, "", size); \
	  if (size + 0 >= 10 || $$NF ~ /^GB/) { n = split($$(NF - 2), part, "/"); \
	    print "  " part[n] " " $$(NF - 1) " " $$NF; fflush() } } \
	/^Installing collected packages/ { print "  unpacking"; fflush() } \
	/^pip exits with/ { status = $$4 } \
	END { if (status != 0) { for (i = NR + 1; i <= NR + 20; i++) if (i % 20 in last) print last[i % 20]; \
	  print "Installation failed; the whole output is in " log_file } exit status }'

$(python):
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"intttrain needs Python 3.11 or newer, $(PYTHON) is {v[0]}.{v[1]}; name another one with: make PYTHON=python3.12")'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(base): pyproject.toml $(LOCK) | $(python)
	@echo "Installing intttrain and what it needs (about 250 MB to fetch, a minute or two)"
	@$(call install,-e .)
	@touch $@

# torch first and by itself, so that the release above is what the rest finds.
$(full): pyproject.toml $(LOCK) | $(python)
	@echo "Installing intttrain with torch, TensorFlow, libtpu and the test tools (about 1.4 GB to fetch, several minutes)"
	@$(call install,$(TORCH))
	@$(call install,-e $(everything))
	@touch $(base) $@
