"""HTTP server that keeps models loaded. Listens on loopback by default. Needs the extra [server]."""
