#!/bin/sh
# run_tests.sh [PYTEST WORDS...]: set up, check style and types, run all tests.
set -eu
cd "$(dirname "$0")/.."
sh scripts/setup.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-cache
.venv/bin/pyright --pythonpath .venv/bin/python
# Three files at a time, on two cores too: much of a job's time is spent waiting. In the order of `testpaths`.
exec .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
