"""EffiR from end to end: analyse, drop, narrow, fine-tune, evaluate.

What comes in is a recipe; what goes out is a model folder of half the size, with what was measured beside it. Open
``stages.py`` first, the table of what is done; ``compress.py`` goes through it, ``recipe.py`` reads and checks the TOML
file, ``recipe_options.py`` says where options stand in it, ``slim.py`` narrows MLPs by a retrieval loss,
``native.py`` keeps to shapes that stock models have.
"""
