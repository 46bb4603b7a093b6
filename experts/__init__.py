"""The other side of dispatch: expert hosts and the router that reaches them."""
