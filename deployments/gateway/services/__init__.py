"""`briolette.v1` over gRPC: a service for each file, and the border around all."""
