"""Training data, teachers, losses and the fine-tuning of dense retrievers."""
