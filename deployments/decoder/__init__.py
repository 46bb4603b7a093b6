"""The decoder process: the step loop, its gateways and its expert hosts."""
