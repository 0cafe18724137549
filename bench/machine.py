"""One line on what a benchmark ran on."""

import os
import platform
import time

from mosel.profiles.files import Profile


def machine_line() -> str:
    """Date, cores, load average and Python."""
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores ({platform.machine()}), load average {load}, "
        f"Python {platform.python_version()}"
    )


def profile_line(profile: Profile, description: str = "") -> str:
    """Which profile was used, and where its accuracies come from; with what the model says of itself."""
    kind = "quick profile" if profile.quick else "profile"
    model = f"model {profile.model}" + (f" ({description})" if description else "")
    return (
        f"{model}; {kind} of {profile.measured_on} on {profile.hardware.device}; accuracies: {profile.accuracy_source}"
    )
