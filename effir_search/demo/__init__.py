"""The demo: a real collection that every machine has, the documentation of Python itself.

What comes in is the installed Python; what goes out are a BEIR folder, indexes, runs and a compressed model. Open
``demo.py`` first.
"""
