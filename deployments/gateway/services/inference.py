"""The service `briolette.v1.Inference`."""

from __future__ import annotations

import grpc

from deployments.gateway.calls.answers import Answers
from deployments.gateway.services.rpc import Methods
from protos.briolette.v1 import inference_pb2
from protos.briolette.v1.inference_pb2 import (
    ChatRequest,
    CompleteRequest,
    ListModelsRequest,
    TokenizeRequest,
)

NAME: str = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


class Inference:
    """The methods by their names."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers

    def handler(self, methods: Methods) -> grpc.GenericRpcHandler:
        """What a gRPC server calls."""
        streamed, unary, answers = methods.streamed, methods.unary, self._answers
        by_name = {
            "Chat": streamed("Chat", answers.generate, ChatRequest),
            "ChatOnce": unary("ChatOnce", answers.whole, ChatRequest),
            "Complete": streamed("Complete", answers.generate, CompleteRequest),
            "CompleteOnce": unary("CompleteOnce", answers.whole, CompleteRequest),
            "Tokenize": unary("Tokenize", answers.tokenize, TokenizeRequest),
            "ListModels": unary("ListModels", answers.list_models, ListModelsRequest),
        }
        return grpc.method_handlers_generic_handler(NAME, by_name)
