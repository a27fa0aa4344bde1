#!/bin/sh
# setup.sh [EXTRA]: make .venv in the repository and install the product into it (with an extra, such as dev).
# Needs python3 and pip, nothing else: the environment borrows the outer pip, so no ensurepip package is required.
set -eu
cd "$(dirname "$0")/.."
extra=${1:+[$1]}
stamp=.venv/.installed${1:+-$1}
if [ "$stamp" -nt pyproject.toml ]; then exit 0; fi
[ -x .venv/bin/python ] || python3 -m venv --without-pip .venv
# torch first and pinned: a resolver that may choose would take the newest. One that is there was chosen, and stays.
.venv/bin/python -c 'from importlib.metadata import version; version("torch")' 2>/dev/null ||
    python3 -m pip --python .venv/bin/python install --quiet torch==2.13.0
python3 -m pip --python .venv/bin/python install --quiet --editable ".$extra"
touch "$stamp"
