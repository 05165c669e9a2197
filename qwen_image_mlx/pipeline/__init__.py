"""Components, conditioning and the two core calls."""
