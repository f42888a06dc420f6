"""Whose vectors an encoder's may be compared with, besides its own: the teachers' whose embeddings it learned to give.

That is written down where the model was trained, as ``same_space_as`` in its training.json, and is true of those
weights alone: of a model that was pruned or trained again nothing is known. Of an exported one it is in the record of
the export, whose own model comes first.
"""

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from effir_search.encoding.config import EncoderConfig, own_config
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.model.checkpoint import lasting_name
from effir_search.model.graph_model import EXPORT_FILE
from effir_search.model.save import SPACES_FIELD, TRAINING_FILE, WEIGHTS_FIELD

logger = logging.getLogger(__name__)

# What may differ between the teacher as it was imitated and as it encoded an index: the length does not change what a
# component means, and how many of these were learned is known.
FREE = ("max_length", "dimension")


@dataclass(frozen=True)
class Space:
    """The vectors of a teacher that a student has learned to give.

    Attributes:
        model: Name of the teacher.
        model_sha256: See ``model.checkpoint.weights_sha256``.
        encoder: How the teacher read texts.
        dimension: Leading components that were learned.
    """

    model: str
    model_sha256: str
    encoder: EncoderConfig
    dimension: int


def read_spaces(folder: Path, weights_sha256: str | None = None) -> list[Space]:
    """Return what a model folder's training.json says it shares the space of; nothing where there is no such file.

    Args:
        folder: The model's.
        weights_sha256: Of the weights that lie in it: of others than it was written for, it says nothing; None = they
            are not looked at.

    Raises:
        ValueError: The file is damaged or of another version.
    """
    path = next((folder / name for name in (EXPORT_FILE, TRAINING_FILE) if (folder / name).is_file()), None)
    record = read_json(path) if path is not None else {}
    entries = record.get(SPACES_FIELD, [])
    if entries and weights_sha256 not in (None, record.get(WEIGHTS_FIELD)):
        logger.warning("%s: is of other weights than those beside it, so its %s does not count", path, SPACES_FIELD)
        return []
    try:
        return [Space(**{**entry, "encoder": EncoderConfig(**entry["encoder"])}) for entry in entries]
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: {SPACES_FIELD} is not of this version of effir_search ({error})") from error


def spaces_of(encoder: Encoder) -> list[Space]:
    """Return the spaces that an encoder shares; see ``read_spaces``."""
    return read_spaces(encoder.files.folder, encoder.weights_sha256)


def learned_spaces(teacher: Encoder, dimension: int) -> list[Space]:
    """Return what a student shares that learned to give a teacher's vectors: the teacher's space, and what that shares.

    Args:
        teacher: As it was imitated.
        dimension: Leading components that were learned.
    """
    own = Space(lasting_name(teacher.name), teacher.weights_sha256, teacher.config, dimension)
    further = spaces_of(teacher) if changed_reading(teacher) in (None, *FREE) else []
    return [own, *(replace(space, dimension=min(dimension, space.dimension)) for space in further)]


def changed_reading(encoder: Encoder) -> str | None:
    """Return the setting by which an encoder makes other vectors than its own files say; those in ``FREE`` come last.

    What a student learned holds for its vectors by its own files.
    """
    own, now = asdict(own_config(encoder.files, encoder.model, encoder.tokenizer)), asdict(encoder.config)
    changed = [name for name in own if own[name] != now[name]]
    return min(changed, key=lambda name: name in FREE, default=None)


def scaled_alike(first: EncoderConfig, second: EncoderConfig) -> bool:
    """Return whether vectors of two configs have the same lengths in an index and in a search, if they are alike."""
    return first.similarity == second.similarity and (
        first.similarity == "cosine" or first.normalize == second.normalize
    )
