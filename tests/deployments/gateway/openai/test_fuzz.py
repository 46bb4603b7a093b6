"""Both dialects against whatever may come: no internal error, no hang, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import grpc
import pytest
import schemathesis
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS

from deployments.gateway.gateway import Gateway
from protos.briolette.v1 import admin_pb2, inference_pb2, sessions_pb2
from tests.support.gateway.fake_decoder import Decoder, make_tokenizer
from tests.support.gateway.running import running_gateway, serving
from tests.support.waiting import wait_for

LONGEST_S = 10.0  # for one call
KEPT = [
    "not_a_server_error",
    "content_type_conformance",
    "response_schema_conformance",
    "status_code_conformance",
]
OUR_FAULT = {"INTERNAL", "UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "UNAVAILABLE"}
METHODS = [
    method
    for module in (inference_pb2, sessions_pb2, admin_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
bounded = settings(
    max_examples=50,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    tokenizer = make_tokenizer()
    decoder = Decoder(tokenizer, max_queue=512, max_num_seqs=16, num_blocks=1000)
    with running_gateway(tokenizer, decoder.find) as gateway:
        wait_for(lambda: serving(gateway))
        yield gateway
        wait_for(lambda: not decoder.engine.has_work)
        decoder.engine.check_integrity()
        assert serving(gateway)
    decoder.close()


# OpenAI's dialect, from what it publishes of itself


@pytest.mark.parametrize(
    ("path", "mode"),
    [
        *product(["/v1/chat/completions", "/v1/completions"], GenerationMode),
        ("/v1/models", GenerationMode.POSITIVE),
        ("/v1/models/{model_id}", GenerationMode.POSITIVE),
    ],
)
def test_http(gateway: Gateway, path: str, mode: GenerationMode) -> None:
    url = f"http://127.0.0.1:{gateway.http_port}/openapi.json"
    operation = next(iter(schemathesis.openapi.from_url(url)[path].values()))

    @settings(bounded, max_examples=25)  # making one takes long
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body["max_tokens"] = 4  # beside whatever else: the answers stay short
        case.call_and_validate(checks=CHECKS.get_by_names(KEPT), timeout=LONGEST_S)

    ask()


# gRPC, from the descriptors


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_grpc(gateway: Gateway, method: MethodDescriptor) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{gateway.port}") as channel:

        @bounded
        @given(data=st.binary(max_size=200) | messages(method.input_type).map(to_bytes))
        def ask(data: bytes) -> None:
            assert status_of(channel, method, data) not in OUR_FAULT

        ask()


def status_of(channel: grpc.Channel, method: MethodDescriptor, data: bytes) -> str:
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if method.server_streaming:
            stream: Any = channel.unary_stream(path)
            list(stream(data, timeout=LONGEST_S))
        else:
            call: Any = channel.unary_unary(path)
            call(data, timeout=LONGEST_S)
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def to_bytes(message: Message) -> bytes:
    return message.SerializeToString()


def messages(descriptor: Descriptor) -> st.SearchStrategy[Message]:
    """Any valid message of a type."""
    kind = GetMessageClass(descriptor)
    fields = {field.name: values(field) for field in descriptor.fields}
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: kind(**given))


def values(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if (descriptor := field.message_type) is not None:
        one: st.SearchStrategy[Any] = st.deferred(lambda: messages(descriptor))
    else:
        one = SCALARS[field.cpp_type]
    return st.lists(one, max_size=3) if field.is_repeated else one


U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
I32, I64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
SMALL = st.integers(0, 5)
SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.CPPTYPE_STRING: (
        st.text(max_size=20) | st.sampled_from(["user", "counter"]) | st.dates().map(str)
    ),
    FieldDescriptor.CPPTYPE_BOOL: st.booleans(),
    FieldDescriptor.CPPTYPE_DOUBLE: st.floats() | st.floats(0, 1),
    FieldDescriptor.CPPTYPE_UINT32: U32 | SMALL,
    FieldDescriptor.CPPTYPE_UINT64: U64 | SMALL,
    FieldDescriptor.CPPTYPE_INT32: I32,
    FieldDescriptor.CPPTYPE_INT64: I64,
    FieldDescriptor.CPPTYPE_ENUM: I32 | SMALL,
}
