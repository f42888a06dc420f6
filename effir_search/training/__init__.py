"""Fine-tuning for retrieval: data, hard negatives, losses, the job."""
