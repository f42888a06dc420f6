"""An iterator that works in a thread of its own, a few items ahead of whoever takes them."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_END = object()


def read_ahead(items: Iterable[Item], size: int = 2) -> Iterator[Item]:
    """Yield the items of an iterable that a thread runs up to ``size`` items ahead.

    What the iterable raises is raised here, in its place. When this iterator is closed, it waits for the thread, which
    ends with the item that it is at.
    """
    waiting: queue.Queue = queue.Queue(maxsize=size)
    closed = threading.Event()

    def put(item: object) -> bool:
        while not closed.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
        except BaseException as error:  # noqa: B036, whatever it is, it is raised again below
            put((_END, error))
        else:
            put((_END, None))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        closed.set()
        thread.join()
