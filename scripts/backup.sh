#!/bin/sh
# Copies PostgreSQL and the files of the running stack into a folder, by default backups/TIME. Nothing is stopped.
# `make backup`; back again with scripts/restore.sh. Redis is not in it: its queues are rebuilt from PostgreSQL.
set -eu
umask 077 # payloads, results and uploads
from=$PWD # what is named is named from here
cd "$(dirname "$0")/.."
to=${1:-$PWD/backups/$(date -u +%Y-%m-%dT%H%M%SZ)}
case $to in /*) ;; *) to=$from/$to ;; esac
[ ! -e "$to" ] || { echo "$to is there already." >&2 && exit 1; }
mkdir -p "$(dirname "$to")"
mkdir "$to.partial" # renamed when it is whole: half a backup never looks like one
trap 'rm -rf "$to.partial"' EXIT
trap 'exit 130' HUP INT TERM

# The database first. A file without a row is found and removed by the house-keeping; a row without its file is a loss.
docker compose exec --no-TTY postgres pg_dump --username=jobstack --format=custom jobstack >"$to.partial/database.dump"
# Read again, and not another server's: with DATABASE_URL set, compose's own PostgreSQL has no tables.
docker compose exec --no-TTY postgres pg_restore --list <"$to.partial/database.dump" |
    grep "TABLE DATA public jobs " >/dev/null || {
    echo "There are no jobs in compose's own PostgreSQL. If DATABASE_URL names another, back that one up." >&2
    exit 1
}

# Without what uploads are just writing (#), and without the mark that says whose files these are: restored, the database
# is another one, and would not be allowed to clean up. 1 is tar's word for a file that was deleted meanwhile.
# shellcheck disable=SC2016 # the container's variable
docker compose run --rm --no-deps --no-TTY api sh -c '
    case $STORAGE_URL in
    file://*) cd "${STORAGE_URL#file://}" || exit 2
        tar --create --exclude="*#*" --exclude=jobstack-owner . || [ $? -eq 1 ] ;;
    *) echo "Not copied: the files in $STORAGE_URL; docs/production.md says how." >&2 ;;
    esac' >"$to.partial/files.tar"

mv "$to.partial" "$to"
du -sh "$to"
