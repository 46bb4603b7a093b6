"""Tests of the experts, their hosts and the router."""
