"""The decoder's side: the step loop, its link to gateways, its expert hosts."""
