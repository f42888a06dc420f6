"""Which parts of a model matter least, and models without them.

What comes in are a model and texts to measure on; what goes out are importance, an order of dropping, and model folders
without attentions, MLPs, blocks or units of MLPs. Open ``dropping_order.py`` first, by ``importance.py`` or by
``drift.py``, then ``prune.py``. The width of MLPs: ``unit_scores.py`` (EffiR's own in ``gates.py``), then
``choose_units.py``. ``convert.py`` takes what others have pruned.
"""
