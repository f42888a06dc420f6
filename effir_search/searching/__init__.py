"""Topics into runs, through Pyserini.

What comes in are an index folder and topics; what goes out are hits, best first, or a TREC run. Open ``searcher.py``
first; ``search_topics.py`` is what ``effir search`` does with it, ``info.py`` what ``effir info`` does, and
``pyserini_bridge.py`` is the one file that imports Pyserini and starts Java.
"""
