"""From files to arrays: snapshots, the weights map, loading."""
