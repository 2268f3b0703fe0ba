# Every target sets up what it needs. PYTHON=python3.12 chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
# Where Python may not write bytecode, each process would compile torch and Ray anew: 6 s of 10.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile-bytecode)

.PHONY: demo test chaos soak check bench up down setup parts lock

demo: setup  ## the whole processor on this machine, no Kafka, Redis, Java or GPU
	$(BIN)/tapeline demo

test: check  ## everything, against real Kafka, Redis, Ray and Prometheus
	@ops/parts.sh prometheus chromium
	$(BIN)/pytest --numprocesses 2 --dist loadfile

chaos: setup parts  ## the failure drills, long: CHAOS="--drill worker-kill --count 100" chooses
	PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS)

soak: setup parts  ## half an hour at a steady rate; exit 1 if something grows
	$(BIN)/python -m benchmarks.soak

check: setup  ## style, types and layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup parts  ## the figures in README
	$(BIN)/python -m benchmarks.pipeline

up: setup parts  ## a local Kafka and Redis with the lanes' topics
	$(BIN)/tapeline up

down: setup
	$(BIN)/tapeline down

parts:  ## Java, Maven and redis-server: installed by apt where that is allowed, named where not
	@ops/parts.sh

setup: .venv/ready

.venv/ready: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv pip install --quiet $(COMPILE) --require-hashes --requirement requirements.lock
	$(BIN)/python -m uv pip install --quiet --no-deps --editable .
	touch .venv/ready

lock:  ## after a change of dependencies in pyproject.toml
	$(BIN)/python -m uv pip compile --quiet --universal --extra dev --generate-hashes \
		pyproject.toml --output-file requirements.lock
