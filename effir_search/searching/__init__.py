"""Topics into runs, through Pyserini.

What comes in are an index folder and topics; what goes out are hits, best first, or a TREC run. Open ``search.py``
first; ``pyserini_bridge.py`` is the one file that imports Pyserini and starts Java.
"""
