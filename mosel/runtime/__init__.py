"""What every service does the same way: listen, talk to others, answer health checks, stop."""
