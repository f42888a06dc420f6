"""The built-in demo collection: Python's standard library as documents, with queries and qrels."""
