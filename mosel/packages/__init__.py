"""Model packages: read, checked, and their Python modules imported."""
