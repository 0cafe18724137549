"""What users would pick instead, side by side with this server on the same work: Triton, KServe, and the ceiling."""
