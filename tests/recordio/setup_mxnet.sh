#!/usr/bin/env bash
# Make .venv-mxnet, the small environment with the real MXNet, once; a later call finds it ready.
#   tests/recordio/setup_mxnet.sh
# Exit 0: ready;  3: no Python 3.10 or 3.11 with venv here;  other: pip's failure
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
env=$root/.venv-mxnet
requirements=$root/requirements/mxnet.txt

# the stamp holds the requirements installed: an interrupted or outdated environment is made afresh
if cmp -s "$requirements" "$env/installed.txt"; then
    exit 0
fi

suits='import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 11))'
candidates=(python3.11 python3.10 python3 "${PYTHON:-python3}")
candidates+=(/usr/bin/python3.11 /usr/bin/python3.10)
for python in "${candidates[@]}"; do
    # run it: a pyenv shim exists for versions that are not selected
    if "$python" -c "$suits" 2>/dev/null; then
        rm -rf "$env"
        "$python" -m venv "$env"
        "$env/bin/python" -m pip install --quiet --disable-pip-version-check -r "$requirements"
        "$env/bin/python" -c 'import mxnet, cv2'
        cp "$requirements" "$env/installed.txt"
        exit 0
    fi
done
echo "MXNet 1.9.1 needs Python 3.10 or 3.11 with venv;" \
    "none found (python3.11, python3.10, python3, \$PYTHON)" >&2
exit 3
