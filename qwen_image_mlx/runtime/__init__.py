"""Policy: what is kept in memory, and in which order a request is worked through."""
