"""Runs into measures, and measures into comparisons.

What comes in are runs and qrels; what goes out are means, values of each query, tests, tables and figures. Open
``measures.py`` first, then ``compare.py`` with its tests in ``significance.py``, and ``comparison_tables.py`` and
``comparison_figure.py``, which show what it found. ``bootstrap.py`` gives means their intervals. ``benchmark.py`` sets
a compressed model beside the full one, ``turns.py`` times encoders, ``tune.py`` chooses the weight of a hybrid search;
these three alone need any. ``pages.py`` makes tables and figures a page.
"""
