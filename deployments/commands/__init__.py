"""What a person types: the command line's parts, and a client of `briolette.v1` for them."""
