"""Which parts of a model matter least, and models without them.

What comes in are a model and texts to measure on; what goes out are importance, an order of dropping, and model folders
without attentions, MLPs, blocks or units of MLPs. Open ``importance.py`` first, then ``prune.py``; ``units.py`` and
``gates.py`` are about the width of MLPs, ``convert.py`` takes what others have pruned.
"""
