"""HTTP beside gRPC: connections, requests, errors, events, the web page."""
