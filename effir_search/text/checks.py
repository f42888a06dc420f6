"""What an id and a text must be, wherever they come from."""

from effir_search.errors import UserError


def check_id(identifier: str, where: str) -> None:
    """Raise ValueError unless an id can stand in a run, a qrels and a docid file: not empty, no white space."""
    if not identifier:
        raise UserError(f"{where}: empty id")
    if identifier.split() != [identifier]:
        raise UserError(f"{where}: the id {identifier[:50]!r} holds white space, which a TREC run cannot")


def check_unicode(text: str, where: str) -> None:
    """Raise ValueError if a text holds a lone surrogate (from a JSON escape), which no UTF-8 file can."""
    if text.isascii():  # which costs nothing to ask
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: lone surrogate {text[error.start]!a}, not valid Unicode") from error
