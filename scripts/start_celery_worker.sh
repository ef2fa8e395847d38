#!/bin/sh
# A worker in this terminal, until Ctrl-C: for a look at what it logs, or for a night with too much to do.
#
#   scripts/start_celery_worker.sh                        the three job queues
#   scripts/start_celery_worker.sh maintenance            these queues
#   WORKER_CONCURRENCY=8 scripts/start_celery_worker.sh low_priority
set -eu

case "${1:-}" in
-h | --help)
  sed -n 's/^# \{0,1\}//p' "$0" | sed 1d
  exit 0
  ;;
esac

cd "$(dirname "$0")/.."
python=python3
test -x .venv/bin/python && python=.venv/bin/python
if [ $# -gt 0 ]; then
  WORKER_QUEUES=$(echo "$*" | tr ' ' ',')
  export WORKER_QUEUES
fi
# Its own sign of life: the stack's worker must not look alive because this one is.
JOBSTACK_RUN_DIR=${TMPDIR:-/tmp}/jobstack-by-hand
mkdir -p "$JOBSTACK_RUN_DIR"
export JOBSTACK_RUN_DIR
# Loads what the environment does not say from .run/env and .env. `exec`, so that SIGTERM reaches the worker.
exec "$python" -c '
import os, sys
sys.path.insert(0, os.getcwd())
from scripts.helper import load_environment, settings_or_exit
load_environment()
environment = {**os.environ, "PYTHONPATH": os.getcwd()}
settings_or_exit()  # what is missing or wrong, such as a queue, is one sentence and exit code 2
os.execve(sys.executable, [sys.executable, "-m", "worker"], environment)'
