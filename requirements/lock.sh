#!/bin/sh
# Writes the locks: `make lock`, or `make lock UPGRADE=--upgrade` to take newer releases where the .in files allow them.
#
# dev.txt is resolved first and holds everything; the images' files are cut from it, so that a test can't pass with
# other versions than the ones that ship. --universal: one file for Python 3.11 to 3.14, Linux and macOS.
set -eu
cd "$(dirname "$0")"

compile() {
    "${UV:-uv}" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-header --no-emit-index-url "$@"
}

compile dev.in --output-file dev.txt "$@"
for image in api worker beat flower native elsewhere; do
    compile "$image.in" --constraints dev.txt --output-file "$image.txt"
done

# Only a program is taken from it: see redis-server.in.
compile redis-server.in --no-deps --output-file redis-server.txt "$@"

# Of no process: for whoever runs the playbooks.
compile ansible.in --output-file ansible.txt "$@"
# Apart from the others, which it must not hold back: see bench.in.
compile bench.in --output-file bench.txt "$@"
