# make demo   two agents on loopback, 25 questions, one table
# make test   lint, types, generated code and all tests
# make eval   every table: accuracy against bytes
# make faults links that break, peers that lie or stop, load: a quarter of an hour, one JSON object at the end
# make fuzz   every parser under a coverage-guided fuzzer, SECONDS=120 in all; then MESSAGES=100000 random ones for
#             each service of running agents, SEED=0
# make sweep every model family that can be built small, through every kind of recipe, into docs/models.md
# All create .venv when it is missing.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test lint types tests proto eval faults fuzz sweep train clean

demo: $(READY)
	$(BIN)/kvlink demo

test: lint types tests

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

tests: $(READY)
	$(BIN)/pytest

# Regenerate kvlink/v1 from proto/; a test compares the two.
proto: $(READY)
	$(BIN)/python scripts/generate_proto.py

# Every table of docs/evaluation.md, n = 200 (about a quarter of an hour on two CPU cores).
eval: $(READY)
	$(BIN)/kvlink eval all

# A quarter of an hour on two CPU cores; the last line is a JSON object.
faults: $(READY)
	$(BIN)/python -m tests.faults

# Every family that transformers can build small, through every kind of recipe: the table of docs/models.md.
sweep: $(READY)
	$(BIN)/python -m tests.sweep --write

SECONDS ?= 120
MESSAGES ?= 100000
SEED ?= 0
fuzz: $(READY)
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)
	$(BIN)/python -m tests.fuzz.services --messages $(MESSAGES) --seed $(SEED)

# Train the embedded model again (about two hours on two CPU cores).
train: $(READY)
	$(BIN)/python scripts/train_tiny.py --out kvlink/model/tiny

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
