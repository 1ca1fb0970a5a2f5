PYTHON ?= python3
BEHAVIOUR ?= power
LAYER ?= 3
DEVICE ?= cpu
DATA ?=

PY := .venv/bin/python
EXPERIMENTS := tests/experiments
DEMO = --model tests/tiny --data tests/tiny/$(BEHAVIOUR).train.jsonl --val tests/tiny/$(BEHAVIOUR).test.jsonl --layer $(LAYER) --overwrite

# First of all, to see it work: measures the vectors of `demo-vectors` on the small model in
# tests/tiny, and judges by a rule what it then says.
demo: demo-vectors
	$(PY) eval.py --model tests/tiny --vector runs/$(BEHAVIOUR) --data tests/tiny/$(BEHAVIOUR).test.jsonl --multipliers -1 1
	$(PY) $(EXPERIMENTS)/make_tiny.py --judge runs/$(BEHAVIOUR) runs/$(BEHAVIOUR)-gradient --multipliers -1 0 1

# When you want only the demo's two vectors: BiPO's, by training, and that of one backward pass.
demo-vectors: .venv/run
	$(PY) bipo.py $(DEMO) --out runs/$(BEHAVIOUR)
	$(PY) bipo.py $(DEMO) --out runs/$(BEHAVIOUR)-gradient --method gradient

# Before you trust it, and after you change it: the tests, in a minute and a half on two cores, and style.
test: .venv/dev
	$(PY) -m pytest -q tests -m "not slow" -n 2 --dist worksteal
	.venv/bin/ruff check
	.venv/bin/ruff format --check

# When you changed what these guard (killed runs, several processes, long pairs, the whole demo):
# the other tests, in eight minutes.
test-slow: .venv/dev
	$(PY) -m pytest -q tests -m slow

# When you want to know how fast and small it is here, beside the usual ways. The machine must be
# idle; DEVICE=cuda measures on a GPU.
bench: .venv/dev
	$(PY) $(EXPERIMENTS)/bench.py --device $(DEVICE)

# When you doubt the tables of tests/experiments/RESULTS.md, or changed what they measure: makes
# them and their picture again, in six minutes.
reproduce: .venv/dev
	$(PY) $(EXPERIMENTS)/reproduce.py

# When you want to see it on a real chat model, SmolLM2-135M, in 19 minutes. DATA=... is the folder
# `data` of a clone of CaoYuanpu/BiPO.
real: .venv/dev
	DATA="$(DATA)" $(PY) $(EXPERIMENTS)/real.py personas hallucination parity

# When you want all experiments on that model: does those that have no result yet.
real-all: .venv/dev
	DATA="$(DATA)" $(PY) $(EXPERIMENTS)/real.py

# When you doubt that one backward pass is enough: BiPO's long training beside it on that model, for
# hours. It goes on where it stopped.
one-pass: .venv/dev
	DATA="$(DATA)" $(PY) $(EXPERIMENTS)/onepass.py

# When you want to see a new user's way on that model, from pairs of one's own to a chat: five
# minutes, after the download.
persona: .venv/dev
	$(PY) $(EXPERIMENTS)/persona.py

# When you want the vector of `make real` elsewhere: installs llama.cpp, vLLM and the libraries that
# people steer with, and shows whether they give our answers.
engines: .venv/dev
	$(PY) $(EXPERIMENTS)/engines.py
	$(PY) $(EXPERIMENTS)/peers.py

# When you changed make_tiny.py: trains the small model again, in a quarter of an hour.
tiny: .venv/run
	$(PY) $(EXPERIMENTS)/make_tiny.py

# When nothing but the sources is to be left.
clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -r {} +

# You never name these two: they install what the targets above need, when it has changed.
.venv/run: requirements.txt
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PY) -m pip install -q -r requirements-dev.txt
	touch $@

.PHONY: demo demo-vectors test test-slow bench reproduce real real-all one-pass persona engines tiny clean
