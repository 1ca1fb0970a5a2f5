PYTHON ?= python3
BEHAVIOUR ?= power
LAYER ?= 3
DEVICE ?= cpu
DATA ?=

PY := .venv/bin/python

# See it work: train a vector on the small model in tests/tiny, then measure what it does.
demo: .venv/run
	$(PY) bipo.py --model tests/tiny --data tests/tiny/$(BEHAVIOUR).train.jsonl --val tests/tiny/$(BEHAVIOUR).test.jsonl --layer $(LAYER) --out runs/$(BEHAVIOUR) --overwrite
	$(PY) eval.py --model tests/tiny --vector runs/$(BEHAVIOUR) --data tests/tiny/$(BEHAVIOUR).test.jsonl
	$(PY) tests/make_tiny.py --judge runs/$(BEHAVIOUR)

# Before you trust it, and after you change it: the tests, in a minute on two cores, and style.
test: .venv/dev
	$(PY) -m pytest -q tests -m "not slow" -n 2 --dist worksteal
	.venv/bin/ruff check
	.venv/bin/ruff format --check

# When you changed what these guard (long pairs, a full disk, copying files out): the other tests.
test-slow: .venv/dev
	$(PY) -m pytest -q tests -m slow

# How fast and small it is here, beside the usual ways; on an idle machine, DEVICE=cuda on a GPU.
bench: .venv/dev
	$(PY) tests/bench.py --device $(DEVICE)

# The paper's experiments on the small model: writes tests/RESULTS.md and the picture, six minutes.
reproduce: .venv/dev
	$(PY) tests/reproduce.py

# See it on a real chat model, SmolLM2-135M; DATA=... is the folder data of a clone of CaoYuanpu/BiPO.
real: .venv/dev
	DATA="$(DATA)" $(PY) tests/real.py personas hallucination parity

# All experiments on that model; what is done is not done again, see tests/REAL.md.
real-all: .venv/dev
	DATA="$(DATA)" $(PY) tests/real.py

# Do llama.cpp and vLLM, steered by the vector of `make real`, give our answers? Installs both.
engines: .venv/dev
	$(PY) tests/engines.py

# When you changed tests/make_tiny.py: train the small model again, a quarter of an hour.
tiny: .venv/run
	$(PY) tests/make_tiny.py

# Leave nothing behind but the sources.
clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis __pycache__ tests/__pycache__

.venv/run: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo test test-slow bench reproduce real real-all engines tiny clean
