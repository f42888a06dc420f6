"""A corpus into an index that Pyserini opens, by way of a store from which a stopped job continues.

What comes in are documents and an encoder; what goes out is the folder of an index: ``index``, ``docid``,
``effir.json``. Open ``build.py`` first; ``store.py`` holds the vectors of a job on disk, ``faiss_kinds.py`` knows the
kinds of FAISS index, ``verify.py`` tells whether an index is what it says it is.
"""
