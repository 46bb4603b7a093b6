"""The gateway process: gRPC and HTTP on one side, a link to the decoder on the other."""
