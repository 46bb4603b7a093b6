"""Package briolette of the wire."""
