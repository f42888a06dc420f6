"""Runs into measures, and measures into comparisons.

What comes in are runs and qrels; what goes out are means, values of each query, tests, tables and figures. Open
``measures.py`` first, then ``compare.py``; ``benchmark.py`` sets two models side by side. The first two need no model.
"""
