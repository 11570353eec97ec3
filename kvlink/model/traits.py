"""What a model's self-test found: the sizes of its cache, how its keys turn, what may be done with it.

Plain values, so that they can be remembered. Does not know: how they were found. Place on the path: before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from kvlink.model.rotary import Arrangement

Use = Literal["selection", "scope=head", "when=during", "attention", "transform"]
"""What a recipe may ask of a model beyond a whole cache: fewer positions, chosen for each head, read alone,
chosen by attention; keys without their rotation."""


@dataclass(frozen=True, slots=True)
class Traits:
    """`padded`: a cache of fewer positions is restored at its full length, with the others masked, because
    the model counts keys instead of knowing their positions. `arrangements`: one a layer, none where the
    rotation is not understood. `refused`: uses that the self-test did not pass, and why.
    """

    kv_heads: int = 0
    head_size: int = 0
    padded: bool = False
    arrangements: tuple[Arrangement, ...] = ()
    refused: Mapping[Use, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Traits | None:
        """What `to_json` gave; None for anything else."""
        try:
            arrangements = tuple(Arrangement(**item) for item in data["arrangements"])
            refused = {str(use): str(why) for use, why in data["refused"].items()}
            if not set(refused) <= set(get_args(Use)):
                return None
            sizes = {name: int(data[name]) for name in ("kv_heads", "head_size")}
            return cls(**sizes, padded=bool(data["padded"]), arrangements=arrangements, refused=refused)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, AttributeError):
            return None
