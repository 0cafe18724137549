"""`mosel bench policies`: the policies side by side, on real services."""
