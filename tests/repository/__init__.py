"""Tests of the checkout itself: structure, set-up."""
