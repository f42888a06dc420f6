"""Many collections, many systems, one table.

What comes in are encoders and collections: BEIR folders, ids of ir_datasets; what goes out are runs, measures with
intervals, tables and a page. Open ``suite.py`` first, which is ``effir suite``; ``collections.py`` says what a
collection is, ``systems.py`` searches one, ``report.py`` makes the tables.
"""
