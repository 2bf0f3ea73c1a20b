"""The client side of SQLite and libSQL databases: follow a live file, restore one.

    source      one database file: locks, the committed log, images; all that blocks
    wal_index   the bytes of SQLite's `-wal` and `-shm` headers; pure
    plan        what to do next, from what was seen; pure
    follower    one database: sees, decides, sends
    fleet       many databases in one process
    notify      who wakes a follower: inotify
    targets     which files go to which databases; the configuration file
    restore     a database of the service as a file

It speaks to the service through `app.client` alone.
"""
