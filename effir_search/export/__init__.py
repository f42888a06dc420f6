"""Models and indexes written for other programs.

What comes in is a model, pruned or not; what goes out is a folder with an ONNX or OpenVINO graph, in int8 on request,
or a GGUF file for llama.cpp. Open ``export.py`` first, then ``int8.py``; ``gguf_writer.py``, then
``gguf_tokenizer.py``. ``flex_index.py`` is for an index: its vectors as PyTerrier keeps them.
"""
