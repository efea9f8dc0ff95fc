"""Metrics of a student on held-out data, and the responses that it generates."""
