"""`mosel demo`: the whole idea on real recordings."""


def demo() -> None:
    """Start everything, send real test items at several floors and deadlines, and print what was run."""
