"""Topics into runs, through Pyserini.

What comes in are an index folder and topics; what goes out are hits, best first, or a TREC run. Open ``searcher.py``
first, then ``bm25.py``, its counterpart for words, and ``hybrid.py``, which asks both; ``fuse.py`` makes one list of
several, also of runs of other programs, and ``feedback.py`` moves a query towards its hits. ``search_topics.py`` is
what ``effir search`` does with them, ``info.py`` what ``effir info`` does, and ``pyserini_bridge.py`` is the one file
that imports Pyserini and starts Java.
"""
