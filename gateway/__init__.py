"""The public edge: validates, bounds, stores payloads, forwards the description of the job. Never decides."""
