"""One modality's networks: chosen payload rows in, embeddings out."""
