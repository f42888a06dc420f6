"""Encoders and indexes in the interfaces of other programs: mteb, PyTerrier and pyterrier-dr.

What comes in are model and index folders; what goes out are the objects that those programs take. Open ``mteb.py`` or
``pyterrier.py`` first. Each file imports the program that it is for, which an extra of the same name installs.
"""
