"""A call in the gateway, whoever brought it: let in, answered by the decoder, charged, logged."""
