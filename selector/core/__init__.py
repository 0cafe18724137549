"""The scheduler core, sans-IO: no sockets, no threads, no clock; time is an argument."""
