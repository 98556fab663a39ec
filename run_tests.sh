#!/usr/bin/env bash
# Run the whole test suite; sets up .venv (and .venv-mxnet for the interoperability tests) first
# where needed.
#   ./run_tests.sh                     everything
#   ./run_tests.sh -k recordio -x      arguments go to pytest; -n 0: one test at a time
#   ./run_tests.sh -m "not processes"  without the tests that start real processes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch/environment.sh"
set_up test.txt "$test_packages"
# small networks: one thread each is as fast
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$root"
# two tests at a time, mostly of different files, for what is prepared once a file is prepared by
# each process
exec "$PYTHON" -m pytest tests -n 2 --dist worksteal "$@"
