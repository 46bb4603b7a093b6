"""What the demo model is taught: sums, facts, recall, conversations."""
