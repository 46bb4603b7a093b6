"""The admission that the configuration asks for."""

from __future__ import annotations

import time

from cluster.config import Config
from cluster.files import write_private
from cluster.tenants.admission import Admission, KeyAdmission, OpenAdmission
from cluster.tenants.keys import new_key
from deployments.process.local_access import local_key_file, prepare_folder
from deployments.redis_store import store_address


def open_admission(config: Config) -> Admission:
    """Build the admission; with keys, write the operator's to the state directory. Asks Redis."""
    prepare_folder(config.state_dir)
    address = store_address(config)
    if config.gateway.auth == "open" or address is None:
        return OpenAdmission()
    key, kept = new_key(time.time())
    write_private(local_key_file(config.state_dir), key)
    return KeyAdmission(address, config.state_dir / "tenants.json", kept)
