"""Makes the fixtures of tests/support/store known to the tests of this folder."""

from tests.support.store.fixtures import address, deploy, metrics, registry, stores, subjects

__all__ = ["address", "deploy", "metrics", "registry", "stores", "subjects"]
