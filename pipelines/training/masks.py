"""The tokens of a tokenizer that stand for hidden text."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from configs.errors import ContractError

_NUMBERED = re.compile(r"<(?:extra_id_|\|mask_)(\d+)\|?>")
"""T5's names, and those of the tokenizers made here."""


def mask_ids(folder: Path) -> tuple[int, ...]:
    """Ids of the mask token, if the tokenizer in `folder` names one, and of numbered ones in their order.

    Raises:
        ContractError: it has none.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    path = folder / "tokenizer_config.json"
    named = (json.loads(path.read_bytes()) if path.is_file() else {}).get("mask_token")
    name = named["content"] if isinstance(named, dict) else named
    first = None if name is None else tokenizer.token_to_id(name)
    numbered = {
        int(match[1]): token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if (match := _NUMBERED.fullmatch(token.content))
    }
    ids = (*(() if first is None else (first,)), *(numbered[number] for number in sorted(numbered)))
    if not ids:
        raise ContractError(
            f"the tokenizer in {folder} has no token that stands for hidden text",
            allowed="a tokenizer with mask tokens",
            next_step="set masks of the recipe's tokenizer stage: 1 for an encoder or BART, 100 for T5",
        )
    return ids
