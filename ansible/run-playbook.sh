#!/bin/sh
# Runs a playbook of this folder on the hosts of ansible/inventory.yaml (made from inventory.example.yaml).
#
#   ansible/run-playbook.sh doctor.yaml
#   ansible/run-playbook.sh purge_celery_queue.yaml -e queues=low_priority --check
#   ansible/run-playbook.sh purge_celery_duplicates.yaml --limit jobs1.example.com
#
# Takes the ansible-playbook on PATH, else installs it into ansible/.venv, as locked.
set -eu

case "${1:-}" in
"" | -h | --help)
  sed -n 's/^# \{0,1\}//p' "$0" | sed 1d
  exit 0
  ;;
esac

here=$(cd "$(dirname "$0")" && pwd)
playbook=$1
shift
test -f "$playbook" || playbook=$here/$playbook
if [ ! -f "$playbook" ]; then
  echo "There is no playbook $(basename "$playbook"); there are: $(cd "$here" && echo [dp]*.yaml)." >&2
  exit 2
fi

if [ "$(uname)" = Darwin ]; then
  # Ansible forks for each host. On macOS a forked process dies when it touches Objective-C, and Python does that for WinRM
  # when it asks the system for proxies.
  OBJC_DISABLE_INITIALIZE_FORK_SAFETY=YES
  no_proxy='*'
  export OBJC_DISABLE_INITIALIZE_FORK_SAFETY no_proxy
fi

if ! command -v ansible-playbook >/dev/null; then
  lock=$here/../requirements/ansible.txt
  if ! cmp -s "$lock" "$here/.venv/installed.txt"; then
    echo "Installing Ansible into ansible/.venv ..." >&2
    "${PYTHON:-python3}" -m venv --clear "$here/.venv"
    "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --require-hashes -r "$lock"
    cp "$lock" "$here/.venv/installed.txt"
  fi
  PATH=$here/.venv/bin:$PATH
fi
ANSIBLE_CONFIG=${ANSIBLE_CONFIG:-$here/ansible.cfg}
export ANSIBLE_CONFIG PATH

# Ansible calls it a success when there is no host to work on: who automates this would read "healthy", or "purged".
code=0
hosts=$(ansible-playbook "$playbook" "$@" --list-hosts 2>&1) || code=$?
case $hosts in
*"hosts ("[1-9]*) ;;
*"hosts (0)"* | *"No inventory was parsed"*)
  echo "No host matches: the hosts of the group jobstack stand in ansible/inventory.yaml, made from inventory.example.yaml." >&2
  exit 2
  ;;
esac
if [ "$code" != 0 ]; then
  echo "$hosts" >&2
  exit "$code"
fi
exec ansible-playbook "$playbook" "$@"
