"""An expert host process: a Serve replica that holds groups of experts."""
