"""Python's standard library as a collection: a document for each module, class, routine and property."""

import json
import subprocess
import sys
from pathlib import Path

from effir_search.text.corpus import Document

COLLECTOR = Path(__file__).with_name("collect_docstrings.py")
# Collecting takes a second or two; modules on a network drive that are not compiled yet take longer.
TIMEOUT = 300.0  # seconds


def standard_library_documents() -> list[Document]:
    """Return the documentation of the running Python's standard library, sorted by id.

    Ids and titles are names as a user writes them, such as ``str.split`` or ``itertools.chain.from_iterable``; texts
    are signature and docstring. Modules that this Python was built without are left out.

    Raises:
        OSError: The process that imports the modules fails, or does not end within ``TIMEOUT``.
    """
    # Isolated from the environment, and without site-packages, so that nothing but the standard library is imported.
    command = [sys.executable, "-I", "-S", "-W", "ignore", str(COLLECTOR)]
    try:
        collector = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError(f"{sys.executable}: no list of docstrings after {TIMEOUT:g} seconds") from error
    if collector.returncode != 0:
        complaint = collector.stderr.strip().splitlines() or ["no message"]
        raise OSError(
            f"{sys.executable}: cannot collect docstrings (exit status {collector.returncode}): {complaint[-1]}"
        )
    return [Document(name, text, title=name) for name, text in map(json.loads, collector.stdout.splitlines())]
