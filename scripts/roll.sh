#!/bin/sh
# Replaces the running stack's containers by those of this checkout, without a refused request or a lost job: new ones
# start, get healthy, and only then the old ones are told to end. `make roll`; for some services: scripts/roll.sh worker
# Broken off at any point, it leaves old ones or new ones at work; run it again.
set -eu
cd "$(dirname "$0")/.."
exec 9<. # this folder is the lock
flock --nonblock 9 || { echo "Another roll is at work in this folder." >&2 && exit 1; }
# Through EXIT, where what was begun is removed.
trap 'exit 130' HUP INT TERM

# Workers first: when the new API accepts a new kind, somebody knows it.
services=${*:-worker-maintenance worker beat api flower}

# How many each has. By the files and not by what runs, which is both kinds after a roll that was killed. Whose port is
# published can't be had twice; but for a few seconds nobody looks at Flower.
numbers=$(docker compose config --format json | python3 -c '
import json, sys
for name, service in json.load(sys.stdin)["services"].items():
    if name == "flower" or not service.get("ports"):
        print(name, service.get("scale", service.get("deploy", {}).get("replicas", 1)))')
number() { echo "$numbers" | sed -n "s/^$1 //p"; }
for service in $services; do
    [ "$(number "$service")" ] && continue
    echo "$service publishes a port, and so can't run twice for a moment: see docs/production.md, or make up." >&2
    exit 1
done

undo() {
    docker compose ps --all --quiet "$service" | grep -vxF "$old" | xargs --no-run-if-empty docker rm --force >/dev/null
}

docker compose build --quiet
# Old code works on the new schema (docs/migrations.md), so this comes before all.
docker compose run --rm --no-deps --no-TTY migrate

for service in $services; do
    # --no-recreate would start stopped ones again, with the code of then.
    docker compose rm --force "$service" >/dev/null
    old=$(docker compose ps --quiet "$service")
    case $service in flower) old= ;; esac
    if [ -z "$old" ]; then
        docker compose up --detach --no-deps --wait --wait-timeout 120 "$service"
        continue
    fi
    trap undo EXIT
    if ! docker compose up --detach --no-deps --no-recreate --wait --wait-timeout 120 \
        --scale "$service=$(($(echo "$old" | wc -l) + $(number "$service")))" "$service"; then
        docker compose logs --tail 20 "$service"
        echo "The new $service is not healthy; the last lines stand above. The old one goes on." >&2
        exit 1
    fi
    trap - EXIT
    # Within the service's stop_grace_period: requests in progress are answered, long jobs handed back.
    # shellcheck disable=SC2086 # one word a container
    docker stop $old >/dev/null
    # shellcheck disable=SC2086
    docker rm $old >/dev/null
    echo "$service: $(number "$service") replaced"
done

# What Caddyfile says now; connections stay.
if [ -n "$(docker compose ps --quiet caddy 2>/dev/null)" ]; then
    docker compose exec --no-TTY caddy caddy reload --config /etc/caddy/Caddyfile --adapter caddyfile
fi
