"""One call: its attempts, limits, and stream. Nothing in here knows an endpoint."""
