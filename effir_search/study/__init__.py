"""Which parts of an encoder are redundant, at what size and speed: many models of it, made alike and compared.

What comes in is a recipe of a compression with a section ``[study]``; what goes out are a folder for each model with
its runs and its record, and tables, figures and a page of all of them. Open ``plan.py`` first, which says what is
compared, then ``run.py`` and ``cells.py``, which make it. ``speed.py`` measures shapes, ``results.py`` makes figures
with intervals of the records, ``tables.py``, ``figures.py`` and ``page.py`` show them, ``commands.py`` says how a model
is made by hand. ``target.py`` finds the best of several plans for ``effir compress --target``.
"""
