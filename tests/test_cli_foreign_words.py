"""What hostile peers and files say on a user's terminal: nothing is obeyed, made up or without end."""

from __future__ import annotations

import json
from dataclasses import replace

import grpc
import pytest
from google.rpc import code_pb2, status_pb2

from kvlink.errors import AccessError
from kvlink.model.loading import embedded_folder
from kvlink.profile import Profile
from kvlink.transport.status import to_status
from kvlink.v1 import common_pb2, receiver_pb2, sender_pb2
from tests.command import CONTEXT, QUESTION, kvlink
from tests.hostile import obeyed
from tests.liar import capabilities, lying

EVIL = "\x1b]0;TAKEN\x07\x1b[2J\x9b31m\u202eevil\u2066 [bold red]x[/] \x7f\b\nkvlink: all is well\r\n2nd \u2028line"
MOST = 8_000
"""Characters that a command says of one answer of a peer."""


def refuse_plainly(_, context):
    context.abort(grpc.StatusCode.PERMISSION_DENIED, EVIL + "y" * 6000)


def refuse_richly(_, context):
    context.abort_with_status(to_status(AccessError("no " + EVIL)))


def refuse_with_a_forged_status(_, context):
    status = to_status(AccessError("no"))
    proto = status_pb2.Status(code=code_pb2.PERMISSION_DENIED, message=EVIL * 10)
    context.abort_with_status(
        status._replace(details=EVIL * 10, trailing_metadata=_rich(proto.SerializeToString()))
    )


def refuse_with_another_status(_, context):
    """The details speak of another code and another message than the call."""
    proto = status_pb2.Status(code=code_pb2.INTERNAL, message=EVIL)
    status = to_status(AccessError("no"))
    context.abort_with_status(status._replace(trailing_metadata=_rich(proto.SerializeToString())))


def refuse_with_bytes_that_are_no_status(_, context):
    context.abort_with_status(to_status(AccessError("no"))._replace(trailing_metadata=_rich(b"\xff\xff\xff")))


def _rich(data):
    return (("grpc-status-details-bin", data),)


def deliver(_, __):
    told = common_pb2.Receipt(context_tokens=10, kept_tokens=5, recipe="int8", element_count=1000)
    told.stage_s.update({"prefill": 0.1, "decode": 0.1})
    told.bytes.update({"codes": 50})
    yield sender_pb2.DeliverCacheResponse(
        sent_bytes=50, total_bytes=50, done=True, cache_id="x", sender_answer="no" + EVIL, receipt=told
    )


def deliver_odd_receipts(_, __):
    told = common_pb2.Receipt(context_tokens=10, kept_tokens=5, recipe="int8" + EVIL, transfer_id=EVIL)
    told.stage_s.update({"prefill": float("nan"), EVIL: float("inf")})
    told.bytes.update({"codes": 2**63, EVIL: 10})
    yield sender_pb2.DeliverCacheResponse(
        sent_bytes=50, total_bytes=50, done=True, cache_id="x", sender_answer=EVIL, receipt=told
    )


def generate(_, __):
    yield receiver_pb2.GenerateResponse(text="cello\n" + EVIL[:9], token_ids=[1])
    yield receiver_pb2.GenerateResponse(text=EVIL[9:], token_ids=[2])
    yield receiver_pb2.GenerateResponse(done=True, receipt=common_pb2.Receipt(stage_s={"first_token": 0.1}))


def generate_nothing(_, __):
    yield receiver_pb2.GenerateResponse(done=True)


def say_nothing(_, __):
    return
    yield


def forget(_, __):
    return receiver_pb2.DeleteCacheResponse()


def described(**changed):
    return lambda _, __: capabilities(**changed)


HONEST = {
    "GetCapabilities": described(),
    "DeliverCache": deliver,
    "Generate": generate,
    "DeleteCache": forget,
}
ASK = ["ask", "--context", "CONTEXT", "--question", QUESTION, "--sender", "AT", "--receiver", "AT"]
PUBLISH = ["publish", "--context", "CONTEXT", "--sender", "AT"]
HEALTH = ["health", "AT"]
LIES = {
    "an answer": (HONEST, ASK, None),
    "an answer as data": (HONEST, [*ASK, "--json"], None),
    "receipts": ({**HONEST, "DeliverCache": deliver_odd_receipts}, ASK, None),
    "receipts as data": ({**HONEST, "DeliverCache": deliver_odd_receipts}, [*ASK, "--json"], None),
    "an empty answer": ({**HONEST, "Generate": generate_nothing}, ASK, None),
    "no answer": ({**HONEST, "Generate": say_nothing}, ASK, 1),
    "no delivery": ({**HONEST, "DeliverCache": say_nothing}, ASK, 1),
    "a refusal": ({**HONEST, "DeliverCache": refuse_plainly}, ASK, 1),
    "a refusal of our own kind": ({**HONEST, "DeliverCache": refuse_richly}, ASK, 1),
    "a forged refusal": ({**HONEST, "DeliverCache": refuse_with_a_forged_status}, ASK, 1),
    "a refusal of two kinds": ({**HONEST, "DeliverCache": refuse_with_another_status}, ASK, 1),
    "a refusal of no kind": ({**HONEST, "DeliverCache": refuse_with_bytes_that_are_no_status}, ASK, 1),
    "a handle": (
        {
            "PublishContext": lambda *_: sender_pb2.PublishContextResponse(
                context_id="id" + EVIL, context_tokens=1
            )
        },
        PUBLISH,
        1,
    ),
    "a refused publication": ({"PublishContext": refuse_plainly}, PUBLISH, 1),
    "a name": ({"GetCapabilities": described(model_name="x" + EVIL, release=EVIL)}, HEALTH, 1),
    "a name as data": (
        {"GetCapabilities": described(model_name="x" + EVIL, dtype=EVIL)},
        [*HEALTH, "--json"],
        None,
    ),
}


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    path = tmp_path_factory.mktemp("foreign") / "context.txt"
    path.write_text(CONTEXT)
    return str(path)


@pytest.mark.parametrize(("methods", "command", "lines"), LIES.values(), ids=LIES)
def test_what_a_peer_says_is_shown_and_not_obeyed(context, methods, command, lines):
    with lying(**methods) as at:
        done = kvlink(*[{"CONTEXT": context, "AT": at}.get(word, word) for word in command])
    told = (done.stdout + done.stderr).decode()
    assert "Traceback" not in told
    assert obeyed(told) == ""
    assert told, "the command says how it went"
    assert len(told) < MOST
    if lines is not None:
        assert told.count("\n") == lines
    if "--json" in command and done.returncode == 0:
        json.loads(done.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    if "ask" not in command:
        assert "\nkvlink: all is well" not in told


@pytest.mark.parametrize("as_json", [False, True])
def test_what_a_profile_says_of_itself_is_shown_and_not_obeyed(tmp_path, as_json):
    profile = Profile.from_bytes((embedded_folder() / "kvlink.profile").read_bytes())
    file = tmp_path / "x.profile"
    file.write_bytes(replace(profile, about={"model": EVIL, EVIL: "x" * 100_000}).to_bytes())
    done = kvlink("profile", "show", str(file), *(["--json"] if as_json else []))
    told = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, told
    assert obeyed(told) == ""
    if as_json:
        assert json.loads(done.stdout)["model"] == EVIL
    else:
        assert len(told) < MOST
        assert len(told.splitlines()) == len({line.split()[0] for line in told.splitlines()})


def test_a_name_of_a_file_or_a_model_is_shown_and_not_obeyed(tmp_path):
    name = f"x{EVIL}".replace("/", "")
    for command in (["inspect", name], ["pack", "--context", name, "-o", "x"], ["profile", "show", name],
                    ["health", name], ["certs", "show", name], ["models", "path", name], ["models", "get", name],
                    ["ask", "--context", name, "--question", name, "--recipe", name], [name], ["inspect", f"--{name}"],
                    ["ask", "--handle", name, "--question", "?"], ["eval", name], ["--config", name, "models", "list"],
                    ["demo", "--data", name]):  # fmt: skip
        done = kvlink(*command, KVLINK_CACHE_DIR=str(tmp_path))
        told = (done.stdout + done.stderr).decode()
        assert done.returncode in (2, 3, 6), told
        assert obeyed(told) == "", command
        assert told.count("\n") == 1, told
