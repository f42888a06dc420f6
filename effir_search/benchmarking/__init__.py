"""Several encoders side by side: speed, latency, memory, work, energy, quality.

What comes in are models and a corpus, topics and qrels if there are any; what goes out are raw figures as JSON, tables,
a picture and a page. Open ``benchmark.py`` first, which measures one thing after the other. ``record.py`` is what is
measured, and how medians and ratios are made of it; ``memory.py`` measures in a process of its own, ``machine.py``
what the machine can do and takes; ``report.py`` shows it all.
"""
