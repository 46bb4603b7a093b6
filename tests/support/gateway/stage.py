"""A model that says its lines, keys, and what a test does on the page."""

from __future__ import annotations

import torch
from selenium.webdriver.common.keys import Keys
from torch import Tensor

from cluster.errors import PermissionDenied, Unauthenticated
from cluster.tenants.admission import Lease, OpenAdmission, OpenLease
from cluster.tenants.tenancy import Tenant
from deployments.gateway.gateway import Gateway
from engine.batch import Batch
from engine.text.tokenizer import Tokenizer
from protos.briolette.v1.admin_pb2 import ClusterStatus, ExpertHost, GroupLoad, Part
from tests.support.browser import Browser
from tests.support.gateway.fake_decoder import CountingRunner, Decoder

END = 0  # the token that ends an answer
KEY, BOBS_KEY = "brio_right", "brio_bobs"


class Actor(CountingRunner):
    """Says its lines, whatever it is asked; one answer at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.line = b""
        self._said = 0

    def say(self, text: str, step_s: float = 0.0) -> None:
        self.line, self._said, self.step_s = text.encode(), 0, step_s

    def execute(self, batch: Batch) -> Tensor:
        super().execute(batch)
        token = self.line[self._said] if self._said < len(self.line) else END
        self._said += len(batch.logits_indices)
        return torch.nn.functional.one_hot(torch.tensor([token]), 256).float() * 50


class Stage(Decoder):
    """A decoder whose model is an actor, with two expert hosts that only the status knows."""

    takes_images = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.actor = Actor()
        super().__init__(tokenizer, runner=self.actor, eos_ids=(END,))

    def _fill_status(self, status: ClusterStatus) -> None:
        super()._fill_status(status)
        status.decoder.CopyFrom(Part(pid=4711, device="cpu", kernels="native"))
        for host_id, groups, link in (("host0", [0, 2], "shm"), ("host1", [1, 3], "")):
            part = Part(pid=5000, device="cuda:0")
            host = ExpertHost(host_id=host_id, part=part, group_ids=groups, link=link)
            status.expert_hosts.append(host)
        for group_id in range(4):
            choices = (group_id + 1) * self.engine.stats().num_decode_tokens
            status.group_load.append(GroupLoad(group_id=group_id, choices=choices))
        status.takes_images = self.takes_images


class FewKeys(OpenAdmission):
    """Admits tenants by their keys; a disabled tenant is refused."""

    is_open = False

    def __init__(self) -> None:
        self.owners = {KEY: "ann", BOBS_KEY: "bob"}
        self.disabled: set[str] = set()

    def admit(self, key: str | None) -> Lease:
        tenant = self.owners.get(key or "")
        if tenant is None:
            raise Unauthenticated("This cluster asks for a key.")
        if tenant in self.disabled:
            raise PermissionDenied("The tenant is disabled.")
        return OpenLease(Tenant(tenant, is_admin=False))


def url(gateway: Gateway, path: str = "/") -> str:
    return f"http://127.0.0.1:{gateway.http_port}{path}"


def ask(page: Browser, question: str) -> None:
    page.wait_for("#question")
    page.all("#question")[0].send_keys(question, Keys.ENTER)


def answer(page: Browser) -> str:
    return page.text("#messages .assistant .prose")


NOTE_REQUESTS = """
const send = window.fetch;
window.fetch = (path, options) => {
  if (options?.body) window.sent = JSON.parse(options.body);
  return send(path, options);
};
"""
