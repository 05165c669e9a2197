"""The only room that knows PIL and (width, height)."""
