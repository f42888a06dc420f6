"""A corpus into an index that Pyserini opens, by way of a store from which a stopped job continues.

What comes in are documents and an encoder; what goes out is the folder of an index: ``index``, ``docid``,
``effir.json``. Open ``build.py`` first; ``encode.py`` fills the store of a job, ``store.py`` is that store on disk,
``resume.py`` says what a continued job must have in common with it, ``folder.py`` writes the folder of the index,
``index_record.py`` reads it, ``faiss_kinds.py`` knows the kinds of FAISS index, ``verify.py`` tells whether an index is
what it says it is.
"""
