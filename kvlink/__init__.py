"""kvlink: one agent hands over what it has read.

    import kvlink

    sender, receiver = kvlink.Sender(), kvlink.Receiver()
    context = sender.read("Jand Faris was born in Nibo. …")
    message = kvlink.pack(sender, context, "Where was Jand Faris born?", "q2c+draft@0.25 int4")
    held = kvlink.unpack(receiver, message)
    print(receiver.answer(held, "Where was Jand Faris born?").text)

Whatever has a name here is loaded when it is first used: importing the package takes milliseconds, and
Ctrl-C in the first moment of a command finds the command, not the imports of the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvlink._release import RELEASE as __version__

if TYPE_CHECKING:
    from kvlink.agent.receiver import Held, Receiver
    from kvlink.agent.sender import Context, Sender, Transfer
    from kvlink.errors import KvlinkError
    from kvlink.receipt import Receipt
    from kvlink.recipe import Recipe

__all__ = [
    "Context",
    "Held",
    "KvlinkError",
    "Receipt",
    "Receiver",
    "Recipe",
    "Sender",
    "Transfer",
    "__version__",
    "pack",
    "unpack",
]

_LAZY = {
    "Sender": "kvlink.agent.sender",
    "Context": "kvlink.agent.sender",
    "Transfer": "kvlink.agent.sender",
    "KvlinkError": "kvlink.errors",
    "Receipt": "kvlink.receipt",
    "Recipe": "kvlink.recipe",
    "Receiver": "kvlink.agent.receiver",
    "Held": "kvlink.agent.receiver",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'kvlink' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def pack(sender: Sender, context: Context, question: str, recipe: Recipe | str = "auto") -> bytes:
    """The bytes of a `.kvl` file: the context, reduced by `recipe` for `question`.

    Raises RecipeError and ContextError.
    """
    from io import BytesIO

    out = BytesIO()
    sender.pack(context, question, recipe).write(out)
    return out.getvalue()


def unpack(receiver: Receiver, message: bytes) -> Held:
    """The context that `message` carries, ready for any number of answers.

    Raises IdentityError (another model), DataError (damaged or cut), ProtocolError, LimitError.
    """
    from io import BytesIO

    return receiver.read_file(BytesIO(message))
