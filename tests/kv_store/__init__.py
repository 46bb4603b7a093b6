"""The long-context store and what the engine keeps in it, against real Redis servers."""
