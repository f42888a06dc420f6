"""A request that is refused: an HTTP status, and one sentence that says why."""


class Refusal(Exception):
    """What is wrong with a request.

    Attributes:
        status: Of HTTP, 4xx; 503 where the server is at its limit.
        message: One sentence, for whoever sent it.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message
