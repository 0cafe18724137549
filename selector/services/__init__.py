"""The services that compute: their health, models, latencies and tensor paths."""
