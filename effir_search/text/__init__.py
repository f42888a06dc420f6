"""Files of texts: corpora, topics, qrels, runs, training records.

What comes in are the formats that ``docs/formats.md`` lists; what goes out are ``Document``, ``Query``, ir-measures
``Qrel`` and ``ScoredDoc``, and ``Record``, each checked, in file order. Open ``corpus.py`` first, then ``trec.py``;
``layouts.py`` knows JSON lines, arrays, TSV and CSV, ``training_records.py`` the formats of training data. No
model is needed here.
"""
