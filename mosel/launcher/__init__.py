"""Starts all services of one machine as child processes, starts those again that end, and stops them."""

from mosel.launcher.launcher import Child, Launcher

__all__ = ["Child", "Launcher"]
