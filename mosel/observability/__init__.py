"""What is seen of a process from outside: logs, metrics, traces."""
