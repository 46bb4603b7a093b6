"""A client in a process of its own that takes a stream: `python -m
tests.support.gateway.streaming_client`.
"""

from __future__ import annotations

import sys

import grpc
import httpx2 as httpx

from protos.briolette.v1.inference_pb2 import CompleteRequest, Sampling
from protos.briolette.v1.inference_pb2_grpc import InferenceStub

NUM_TOKENS = 400


def over_grpc(address: str) -> None:
    sampling = Sampling(temperature=0.0, max_tokens=NUM_TOKENS)
    with grpc.insecure_channel(address) as channel:
        for _ in InferenceStub(channel).Complete(CompleteRequest(text="a", sampling=sampling)):
            print("a piece", flush=True)


def over_http(address: str, *, stream: bool) -> None:
    body = {"prompt": "a", "max_tokens": NUM_TOKENS, "temperature": 0, "stream": stream}
    url = f"http://{address}/v1/completions"
    print("asked", flush=True)
    own_name = {"host": "localhost"}  # others are refused where there are no keys
    with httpx.stream("POST", url, json=body, headers=own_name, timeout=60) as answer:
        for _ in answer.iter_bytes():
            print("a piece", flush=True)


if __name__ == "__main__":
    dialect, server = sys.argv[1:]
    if dialect == "grpc":
        over_grpc(server)
    else:
        over_http(server, stream=dialect == "http stream")
