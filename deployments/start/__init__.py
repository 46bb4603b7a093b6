"""From `briolette up` to `down`: what is checked, started, watched and stopped on this machine."""
