"""What a tokenizer adds to a text: the EOS token at its end, lower case."""

import json
import logging
from pathlib import Path

from tokenizers import Tokenizer, normalizers
from transformers import PreTrainedTokenizerBase

from effir_search.errors import UserError
from effir_search.files.reading import read_json

logger = logging.getLogger(__name__)


def append_eos_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer end every text with its EOS token, truncated ones too, besides what it adds already.

    The token goes into the post-processor, which ``save_pretrained`` keeps; transformers 5 drops the
    ``add_eos_token`` flag of a ``tokenizer_config.json`` on loading.

    Raises:
        ValueError: The tokenizer has no EOS token, or a post-processor of a kind that cannot be extended.
    """
    if tokenizer.eos_token_id is None:
        raise UserError("--append-eos: the tokenizer has no EOS token")
    if tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        return
    # Two templates in a row lose the second one's token (tokenizers 0.23), so an existing template is extended.
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    present = state["post_processor"]
    steps = present["processors"] if present and present["type"] == "Sequence" else [present] if present else []
    template = next((step for step in reversed(steps) if step["type"] == "TemplateProcessing"), None)
    if template is None:
        template = {"type": "TemplateProcessing", "special_tokens": {}}
        template |= {"single": [_piece("A")], "pair": [_piece("A"), _piece("B")]}
        steps.append(template)
    eos = str(tokenizer.eos_token)
    for kind in ("single", "pair"):
        template[kind].append({"SpecialToken": {"id": eos, "type_id": 0}})
    template["special_tokens"][eos] = {"id": eos, "ids": [tokenizer.eos_token_id], "tokens": [eos]}
    state["post_processor"] = {"type": "Sequence", "processors": steps}
    backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor
    if tokenizer("")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise UserError(
            f"--append-eos: the tokenizer's post-processor ({present['type']}) cannot be given an EOS token"
        )


def _piece(name: str) -> dict:
    return {"Sequence": {"id": name, "type_id": 0}}


def warn_of_lost_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Warn of a tokenizer whose files ask for an EOS token that transformers 5 does not add."""
    path = Path(tokenizer.name_or_path) / "tokenizer_config.json"
    adds_eos = path.is_file() and read_json(path).get("add_eos_token")
    if adds_eos and tokenizer("")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        logger.warning(
            "%s asks for add_eos_token, which transformers 5 ignores, and tokenizer.json adds no EOS: "
            "if the model was trained with one, give --append-eos",
            path,
        )


def lower_case(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let a tokenizer make all letters small first."""
    backend = tokenizer.backend_tokenizer
    present = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *present])
