#!/bin/sh
# Puts a backup into a stack that has no data yet: scripts/restore.sh backups/TIME, or make restore FROM=backups/TIME.
# Then start it as ever. Jobs that were waiting then run; those that were running run again from their last recorded
# step; those that had succeeded by then don't.
set -eu
from=${1:?which backup? scripts/restore.sh backups/TIME}
case $from in /*) ;; *) from=$PWD/$from ;; esac
cd "$(dirname "$0")/.."
[ -s "$from/database.dump" ] || { echo "$from holds no backup." >&2 && exit 1; }
config=$(docker compose config) || { echo "Put the .env of then into this folder first." >&2 && exit 1; }
echo "$config" | grep "DATABASE_URL: .*@postgres:5432/jobstack" >/dev/null || {
    echo "DATABASE_URL leads elsewhere. This fills compose's own PostgreSQL; there, use pg_restore." >&2
    exit 1
}

docker compose up --detach --wait postgres
psql="docker compose exec --no-TTY postgres psql --username=jobstack --no-align --tuples-only --set=ON_ERROR_STOP=1"
has=$($psql --command="SELECT to_regclass('public.jobs') IS NOT NULL")
if [ "$has" != f ]; then
    echo "This stack has a database already, which a restore would mix with. Use a clone of its own." >&2
    exit 1
fi

# The files first: as long as the database has no tables, this can be begun again. A volume that was not lost may hold
# the lost database's mark, by which the new one would never clean up.
extract=true # with a bucket there is nothing in it
[ ! -s "$from/files.tar" ] || extract="tar --extract --touch"
# shellcheck disable=SC2016 # the container's variable
docker compose run --rm --no-deps --no-TTY api sh -euc '
    case $STORAGE_URL in file://*) ;; *) exit 0 ;; esac
    mkdir -p "${STORAGE_URL#file://}"
    cd "${STORAGE_URL#file://}"
    rm -f jobstack-owner
    '"$extract" <"$from/files.tar"
docker compose exec --no-TTY postgres pg_restore --username=jobstack --dbname=jobstack --no-owner \
    --exit-on-error --single-transaction <"$from/database.dump"
$psql --quiet --command=ANALYZE
echo "Restored $from. Now start the stack: make production (or make up, where nobody else comes in)"
