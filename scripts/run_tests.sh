#!/bin/sh
# run_tests.sh [PYTEST WORDS...]: set up, check style and types, run all tests.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-cache
.venv/bin/pyright --pythonpath .venv/bin/python
# Two files at a time: much of a job's time is spent waiting for its ranks to start.
exec .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
