"""Ready configurations for ghz (docs/load-testing.md), and the payloads that they send."""
