"""What the program says on standard error: one format for the command and for the workers it starts."""

import logging

# Libraries whose progress is nobody's concern.
NOISY = (
    "httpx",
    "httpcore",
    "httpx2",
    "httpcore2",
    "urllib3",
    "faiss",
    "filelock",
    "matplotlib",
    "ir_datasets",
    "uvicorn",
    "mcp",
)


def show_messages(level: int) -> None:
    """Print log messages from this level on; of noisy libraries only warnings."""
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    for name in NOISY:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
