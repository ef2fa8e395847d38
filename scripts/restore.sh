#!/bin/sh
# Puts a backup into a stack that has no data yet: scripts/restore.sh backups/TIME, or make restore FROM=backups/TIME.
# Then start it as ever. Jobs that were waiting then run; those that were running run again from their last recorded
# step; those that had succeeded by then don't.
set -eu
cd "$(dirname "$0")/.."
from=${1:?which backup? scripts/restore.sh backups/TIME}
[ -s "$from/database.dump" ] || { echo "$from holds no backup." >&2 && exit 1; }

docker compose up --detach --wait postgres
psql="docker compose exec --no-TTY postgres psql --username=jobstack --no-align --tuples-only --set=ON_ERROR_STOP=1"
if [ "$($psql --command="SELECT to_regclass('public.jobs') IS NOT NULL")" != f ]; then
    echo "This stack has a database already, which a restore would mix with. make clean deletes it, files and all." >&2
    exit 1
fi

# The files first: as long as the database has no tables, this can be begun again.
if [ -s "$from/files.tar" ]; then
    # shellcheck disable=SC2016 # the container's variable
    docker compose run --rm --no-deps --no-TTY api \
        sh -c 'mkdir -p "${STORAGE_URL#file://}" && cd "${STORAGE_URL#file://}" && tar --extract --touch' <"$from/files.tar"
fi
docker compose exec --no-TTY postgres pg_restore --username=jobstack --dbname=jobstack --no-owner \
    --exit-on-error --single-transaction <"$from/database.dump"
$psql --quiet --command=ANALYZE
echo "Restored $from. Now start the stack: make up, or make production"
