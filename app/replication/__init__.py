"""The client side of SQLite and libSQL databases: follow a live file, restore one.

    source      one database file: locks, the committed log; all that blocks
    image       its pages as of one commit, from file and log
    wal_index   the bytes of SQLite's `-wal` and `-shm` headers; pure
    plan        what to do next, from what was seen; pure
    replica     the database as the service has it: what is sent, what refusals mean
    bell        what a follower sleeps by
    pace        when a sqlite_checkpoint may be tried, who waits for the log; pure
    follower    one database: sees, decides, sends
    fleet       many databases in one process
    shares      what they share: memory, connections
    notify      who wakes a follower: inotify
    targets     which files go to which databases; the configuration file
    restore     a database of the service as a file
    download    its bytes, in parts side by side

It speaks to the service through `app.client` alone.
"""
