"""Where the parts are wired together on Ray Serve."""
