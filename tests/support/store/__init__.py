"""Redis servers, and engines that keep their blocks there."""
