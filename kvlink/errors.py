"""Every error that kvlink raises, in one tree.

    KvlinkError
    ├── InputError            the caller gave something that cannot be used
    │   ├── RecipeError       a recipe's text, JSON or values
    │   ├── ContextError      the context, the question or a data file
    │   └── ConfigError       flags, environment, addresses
    ├── ModelError            the model cannot be loaded or is not understood
    │   └── UnsupportedCacheError
    ├── IdentityError         the two ends do not hold the same model, tokenizer or prompt
    ├── DataError             bytes that are not what they say
    │   ├── IntegrityError    a checksum or digest that does not match
    │   ├── TruncatedError    the bytes end too early
    │   └── CodecError        a coded tensor that cannot be encoded or decoded
    ├── ProtocolError
    │   ├── LocalProtocolError   this side tried something that the session does not allow
    │   └── RemoteProtocolError  the peer did
    ├── LimitError            larger than a limit that was set: it will never pass
    │   └── BusyError         no room now: it can pass later
    ├── NotFoundError         an unknown handle, context or transfer
    ├── AccessError           a peer or address that is not allowed
    │   └── CredentialsError  who a peer is was not proven
    └── TransportError        the link or the peer failed
        ├── PeerUnavailableError
        │   └── StoppingError     the agent is about to end
        └── DeadlineError

Messages say what was expected, what was found, and where. They are one line of bounded length that any
terminal and log may show: whatever a peer or a file had in it is quoted and cut (`kvlink.quoting`).
`retryable` says whether the same call can work later without a change, `retry_after_s` when to try it.

Does not know: gRPC (the table that maps this tree to status codes is in `transport.status`).
"""

from __future__ import annotations

from kvlink.quoting import LINE, shown


class KvlinkError(Exception):
    """Base of all errors of the package. `reported`: a peer said so itself, the link to it is fine.

    `retry_after_s`: seconds after which to try again, 0 where nobody said.
    """

    retryable = False
    reported = False
    retry_after_s = 0.0

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message, LINE))


class InputError(KvlinkError):
    """The caller gave something that cannot be used."""


class RecipeError(InputError):
    """A recipe that cannot be read or whose values are out of range."""


class ContextError(InputError):
    """A context, question or data file that cannot be used."""


class ConfigError(InputError):
    """A flag, environment variable or address that cannot be used."""


class ModelError(KvlinkError):
    """The model cannot be loaded or is not understood."""


class UnsupportedCacheError(ModelError):
    """The model keeps its context in a cache class that kvlink does not know."""


class IdentityError(KvlinkError):
    """The two ends do not hold the same model, tokenizer or prompt template."""


class DataError(KvlinkError):
    """Bytes that are not what they say they are."""


class IntegrityError(DataError):
    """A checksum or digest does not match the bytes."""


class TruncatedError(DataError):
    """The bytes end before the transfer does."""


class CodecError(DataError):
    """A tensor that cannot be encoded or a coded tensor that cannot be decoded."""


class ProtocolError(KvlinkError):
    """Something happened that the session's transition table does not allow."""


class LocalProtocolError(ProtocolError):
    """This side tried it."""


class RemoteProtocolError(ProtocolError):
    """The peer did it."""


class LimitError(KvlinkError):
    """Larger than a limit that was set; refused before anything was allocated."""


class BusyError(LimitError):
    """No room at this moment."""

    retryable = True

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NotFoundError(KvlinkError):
    """An unknown or expired handle, context or transfer."""


class AccessError(KvlinkError):
    """A peer or address that the configuration does not allow."""


class CredentialsError(AccessError):
    """Who a peer is was not proven: no certificate, an expired one, a wrong token."""


class TransportError(KvlinkError):
    """The link or the peer failed."""

    retryable = True


class PeerUnavailableError(TransportError):
    """No connection, or the peer went away in mid-call."""


class StoppingError(PeerUnavailableError):
    """The agent is about to end: the call may go through in its next life, or elsewhere."""

    def __init__(self, message: str = "the agent is stopping; try again", retry_after_s: float = 2.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineError(TransportError):
    """The deadline passed first."""
