"""The brain: admits, plans, batches across jobs, directs chosen payload rows to encoders and embeddings to fusion."""
