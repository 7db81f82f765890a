#!/bin/sh
# Makes the database when its folder is empty, and serves it to the other services.
set -e
bin=/usr/lib/postgresql/17/bin
data=/var/lib/data/main
# Debian's start-up scripts make it where there are any.
install -d -o postgres /run/postgresql
if [ ! -e "$data/PG_VERSION" ]; then
    mkdir -p "$data"
    chown postgres "$data"
    chmod 0700 "$data"
    su postgres -c "$bin/initdb --no-sync --auth=trust -D $data"
    echo "host all all all trust" >>"$data/pg_hba.conf"
fi
exec su postgres -c "exec $bin/postgres -D $data -c listen_addresses='*'"
