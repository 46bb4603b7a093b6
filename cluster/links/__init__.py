"""Links between processes: whole messages over shared memory or sockets."""
