"""The demo model: its generated data, its training, its scores and its card."""
