"""kvlink: one agent hands over what it has read.

    import kvlink

    sender, receiver = kvlink.Sender(), kvlink.Receiver()
    context = sender.read("Jand Faris was born in Nibo. …")
    message = kvlink.pack(sender, context, "Where was Jand Faris born?", "q2c+draft@0.25 int4")
    held = kvlink.unpack(receiver, message)
    print(receiver.answer(held, "Where was Jand Faris born?").text)

The public interface is what has a name here:

    in one process      Sender, Receiver, pack, unpack; Context, Transfer, Held, Answer; language_model
    over the network    SenderClient and ReceiverClient, asynchronous; SyncSenderClient and SyncReceiverClient, which are
                        not; their requests and answers: Delivery, Fetch, Ask; Published, Progress, Piece, PushStatus
    what is asked for   Recipe (or its text), Target, Turn
    what goes wrong     KvlinkError and its kinds

Whatever has a name here is loaded when it is first used: importing the package takes milliseconds, and
Ctrl-C in the first moment of a command finds the command, not the imports of the package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvlink._release import RELEASE as __version__

if TYPE_CHECKING:
    from kvlink.agent.context import Context
    from kvlink.agent.receiver import Held, Receiver
    from kvlink.agent.sender import Sender
    from kvlink.agent.transfer import OnProgress, Transfer
    from kvlink.errors import (
        AccessError,
        BusyError,
        CodecError,
        ConfigError,
        ContextError,
        CredentialsError,
        DataError,
        DeadlineError,
        IdentityError,
        InputError,
        IntegrityError,
        KvlinkError,
        LimitError,
        LocalProtocolError,
        ModelError,
        NotFoundError,
        PeerUnavailableError,
        ProtocolError,
        RecipeError,
        RemoteProtocolError,
        StoppingError,
        TransportError,
        TruncatedError,
        UnsupportedCacheError,
    )
    from kvlink.model.generate import Answer, Step
    from kvlink.model.language import LanguageModel
    from kvlink.model.loading import language_model
    from kvlink.payload import Turn
    from kvlink.receipt import Capabilities, Receipt
    from kvlink.recipe import Recipe, Target
    from kvlink.transport.api import Ask, Delivery, Fetch, Piece, Progress, Published, PushStatus
    from kvlink.transport.client import ReceiverClient, SenderClient
    from kvlink.transport.credentials import Credentials
    from kvlink.transport.sync import SyncReceiverClient, SyncSenderClient

__all__ = [
    "AccessError",
    "Answer",
    "Ask",
    "BusyError",
    "Capabilities",
    "CodecError",
    "ConfigError",
    "Context",
    "ContextError",
    "Credentials",
    "CredentialsError",
    "DataError",
    "DeadlineError",
    "Delivery",
    "Fetch",
    "Held",
    "IdentityError",
    "InputError",
    "IntegrityError",
    "KvlinkError",
    "LanguageModel",
    "LimitError",
    "LocalProtocolError",
    "ModelError",
    "NotFoundError",
    "OnProgress",
    "PeerUnavailableError",
    "Piece",
    "Progress",
    "ProtocolError",
    "Published",
    "PushStatus",
    "Receipt",
    "Receiver",
    "ReceiverClient",
    "Recipe",
    "RecipeError",
    "RemoteProtocolError",
    "Sender",
    "SenderClient",
    "Step",
    "StoppingError",
    "SyncReceiverClient",
    "SyncSenderClient",
    "Target",
    "Transfer",
    "TransportError",
    "TruncatedError",
    "Turn",
    "UnsupportedCacheError",
    "__version__",
    "language_model",
    "pack",
    "unpack",
]

_LAZY = {
    "kvlink.agent.receiver": "Held Receiver".split(),
    "kvlink.agent.context": "Context".split(),
    "kvlink.agent.sender": "Sender".split(),
    "kvlink.agent.transfer": "OnProgress Transfer".split(),
    "kvlink.errors": (
        "AccessError BusyError CodecError ConfigError ContextError CredentialsError DataError DeadlineError "
        "IdentityError InputError IntegrityError KvlinkError LimitError LocalProtocolError ModelError "
        "NotFoundError PeerUnavailableError ProtocolError RecipeError RemoteProtocolError StoppingError "
        "TransportError TruncatedError UnsupportedCacheError "
    ).split(),
    "kvlink.model.generate": "Answer Step".split(),
    "kvlink.model.language": "LanguageModel".split(),
    "kvlink.model.loading": "language_model".split(),
    "kvlink.payload": "Turn".split(),
    "kvlink.receipt": "Capabilities Receipt".split(),
    "kvlink.recipe": "Recipe Target".split(),
    "kvlink.transport.api": "Ask Delivery Fetch Piece Progress Published PushStatus".split(),
    "kvlink.transport.client": "ReceiverClient SenderClient".split(),
    "kvlink.transport.credentials": "Credentials".split(),
    "kvlink.transport.sync": "SyncReceiverClient SyncSenderClient".split(),
}
"""Names by the module that has them; the same as above, for those who run it."""
_MODULE_OF = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        from importlib import import_module

        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'kvlink' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


def pack(
    sender: Sender,
    context: Context,
    question: str,
    recipe: Recipe | str = "auto",
    target: Target | None = None,
    progress: OnProgress | None = None,
) -> bytes:
    """The bytes of a `.kvl` file: the context, reduced by `recipe` for `question`. Options as of `Sender.pack`.

    Raises RecipeError and ContextError.
    """
    from io import BytesIO

    out = BytesIO()
    sender.pack(context, question, recipe, target, progress=progress).write(out)
    return out.getvalue()


def unpack(receiver: Receiver, message: bytes) -> Held:
    """The context that `message` carries, ready for any number of answers.

    Raises IdentityError (another model), DataError (damaged or cut), ProtocolError, LimitError.
    """
    from io import BytesIO

    return receiver.read_file(BytesIO(message))
