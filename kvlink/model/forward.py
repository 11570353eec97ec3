"""One forward pass, for every family: whatever a model does not take is not given to it.

Does not know: prompts, codecs, why something is read. Place on the path: wherever the model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def forward(
    model: Any,
    ids: Sequence[int],
    cache: Any,
    positions: Tensor,
    mask: Tensor,
    *,
    last_only: bool = False,
    weights: bool = False,
) -> Tensor:
    """Logits `[len(ids), V]`, as the model gives them; fills `cache`.

    `positions` `[len(ids)]` int64. `mask` `[S]`: which of the logical positions so far and of these tokens
    may be attended to. `last_only`: logits of the last token alone, where the model can leave out the others.
    `weights`: its layers are to give their attention weights, where the model has to be asked.
    """
    given = {
        "input_ids": torch.tensor([list(ids)], device=model.device),
        "attention_mask": mask[None].to(model.device, torch.long),
        "past_key_values": cache,
        "use_cache": True,
        "position_ids": positions[None].to(model.device),
    }
    if last_only:
        given["logits_to_keep"] = 1
    if weights:
        given["output_attentions"] = True
    taken = parameters(model)
    found: Tensor = model(**{name: value for name, value in given.items() if name in taken}).logits[0]
    return found


def parameters(model: Any) -> frozenset[str]:
    """The parameters that a model's forward names."""
    return frozenset(inspect.signature(type(model).forward).parameters)
