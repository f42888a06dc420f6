"""Which parts of a model matter least, and models without them: importance, plans, reports."""
