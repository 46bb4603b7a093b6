"""Who a gateway lets in, as the configuration wants it."""

from __future__ import annotations

import time

from cluster.admission import KeyAdmission
from cluster.config import Config
from cluster.files import write_private
from cluster.keys import new_key
from cluster.tenancy import Admission, OpenAdmission
from cluster.tenants import Tenants
from deployments.kv.store import store_address
from deployments.local_access import local_key_file, prepare_folder


def open_admission(config: Config) -> Admission:
    """Who is let in; with keys, the operator's own is left in the state directory. Asks Redis."""
    prepare_folder(config.state_dir)
    address = store_address(config)
    if config.gateway.auth == "open" or address is None:
        return OpenAdmission()
    key, kept = new_key(time.time())
    write_private(local_key_file(config.state_dir), key)
    return KeyAdmission(Tenants(address), config.state_dir / "tenants.json", kept)
