"""Who may call, and how much.

`tenants`, `buckets` and `guard` are the logic; `interceptor` puts it in front of gRPC, `middleware` in front of HTTP,
and `handshakes` tells of callers whom TLS refused.
"""
