"""The wire: protobuf definitions and their committed stubs (regenerate with scripts/protos)."""
