"""Dense retrieval with Pyserini and encoders pruned by EffiR: index a corpus, search it, evaluate the run.

The package itself imports nothing heavy; ask its modules for what they are named after, as in
``from effir_search.encoder import Encoder``.
"""

__version__ = "0.1.0"
