"""What every process of a cluster does: progress reports, priority, local access."""
