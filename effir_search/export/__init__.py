"""A model into the format of another program.

What comes in is an encoder; what goes out is one file that the other program reads. Open ``gguf_writer.py`` first,
which writes a model for llama.cpp; ``gguf_tokenizer.py`` says its tokenizer in that format's words.
"""
