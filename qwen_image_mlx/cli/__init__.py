"""The command line: flags in, requests out; the only room that prints."""
