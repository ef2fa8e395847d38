#!/bin/sh
# Replaces the running stack's containers by those of this checkout, without a refused request or a lost job: new ones
# start, get healthy, and only then the old ones are told to end. `make roll`; for some services: scripts/roll.sh worker
set -eu
cd "$(dirname "$0")/.."

# Workers first: when the new API accepts a new kind, somebody knows it.
services=${*:-worker-maintenance worker beat api flower}

docker compose build --quiet
# Old code works on the new schema (docs/migrations.md), so this comes before all.
docker compose run --rm --no-deps --no-TTY migrate

for service in $services; do
    old=$(docker compose ps --quiet "$service")
    case $service in flower) old= ;; esac # its port can't be had twice; for a few seconds nobody looks at the workers
    if [ -z "$old" ]; then
        docker compose up --detach --no-deps --wait --wait-timeout 120 "$service"
        continue
    fi
    count=$(echo "$old" | wc -l)
    if ! docker compose up --detach --no-deps --no-recreate --wait --wait-timeout 120 \
        --scale "$service=$((2 * count))" "$service"; then
        new=$(docker compose ps --all --quiet "$service" | grep -vxF "$old") || new=
        # shellcheck disable=SC2086 # one word a container
        docker logs --tail 20 ${new%%
*} && docker rm --force $new >/dev/null
        echo "The new $service is not healthy; its last lines stand above. The old one goes on." >&2
        exit 1
    fi
    # Within the service's stop_grace_period: requests in progress are answered, long jobs handed back.
    # shellcheck disable=SC2086
    docker stop $old >/dev/null && docker rm $old >/dev/null
    echo "$service: $count replaced"
done

# What Caddyfile says now; connections stay.
if [ -n "$(docker compose ps --quiet caddy 2>/dev/null)" ]; then
    docker compose exec --no-TTY caddy caddy reload --config /etc/caddy/Caddyfile --adapter caddyfile
fi
