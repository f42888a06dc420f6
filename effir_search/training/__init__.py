"""Fine-tuning for retrieval: data, hard negatives, losses, the job.

What comes in are examples with labels, or texts with a teacher, and a model; what goes out is a model folder. Open
``finetune.py`` first; ``retrieval_objective.py`` and ``imitation_objective.py`` make a loss of a batch, ``data.py``
prepares what is learned from, ``mine.py`` finds hard negatives in a run.
"""
