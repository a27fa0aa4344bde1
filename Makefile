# The four commands of a newcomer. Each is one line of shell that works without make.
.PHONY: demo test lint format

demo:            # two ranks quantize a small trained FLUX on the CPU
	sh scripts/demo.sh

test:            # style, types, all tests
	sh scripts/run_tests.sh

lint:            # style and types only
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/lint-imports --no-cache && .venv/bin/pyright --pythonpath .venv/bin/python

format:          # rewrite the files in the house style
	.venv/bin/ruff check --fix . && .venv/bin/ruff format .
