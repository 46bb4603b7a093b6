"""What the benchmarks share: models, peers, timing, cards."""
