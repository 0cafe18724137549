"""Networks of model packages, and the threads that run them. Imports torch."""
