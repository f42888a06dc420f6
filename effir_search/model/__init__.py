"""Model folders: what is in them, loading them strictly."""
