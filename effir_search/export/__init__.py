"""Models written for other programs: an ONNX or OpenVINO graph in a folder, in int8 on request; a GGUF file."""
