"""Bytes on a disk: read by line, written whole or not at all.

What comes in are paths; what goes out are lines, JSON, hashes, and files and folders that stand under their name only
once they are complete. Open ``whole.py`` first; ``reading.py`` reads, ``job.py`` holds the folder of a job that can be
stopped, ``lines.py`` is a JSONL file as a sequence.
"""
