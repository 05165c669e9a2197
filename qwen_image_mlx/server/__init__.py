"""Serves a warm model over HTTP, on loopback unless told otherwise; needs the extra [server]."""
