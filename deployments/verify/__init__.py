"""`briolette verify`: proof that warm answers equal cold ones."""
