"""The service `briolette.v1.Inference`."""

from __future__ import annotations

import grpc

from deployments.gateway.calls.inference import Inference
from deployments.gateway.services.rpc import Methods
from protos.briolette.v1 import inference_pb2
from protos.briolette.v1.inference_pb2 import (
    ChatRequest,
    CompleteRequest,
    ListModelsRequest,
    TokenizeRequest,
)

NAME: str = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


def inference_handler(inference: Inference, methods: Methods) -> grpc.GenericRpcHandler:
    """Return what a gRPC server calls."""
    generated, unary = methods.generated, methods.unary
    by_name = {
        "Chat": generated("Chat", inference.generate, ChatRequest),
        "ChatOnce": unary("ChatOnce", inference.generate_once, ChatRequest),
        "Complete": generated("Complete", inference.generate, CompleteRequest),
        "CompleteOnce": unary("CompleteOnce", inference.generate_once, CompleteRequest),
        "Tokenize": unary("Tokenize", inference.tokenize, TokenizeRequest),
        "ListModels": unary("ListModels", inference.list_models, ListModelsRequest),
    }
    return grpc.method_handlers_generic_handler(NAME, by_name)
