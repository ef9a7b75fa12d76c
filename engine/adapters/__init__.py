"""Outside systems, one file each. Only the file of a system imports its client library, and only when it is used."""
