"""What is kept of tenants: a record of each, and all of them as they were at one version."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from cluster.tenants.keys import KeyHash
from cluster.tenants.tenancy import Tenant


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept of a tenant. Times are seconds since the epoch."""

    tenant: Tenant
    keys: tuple[KeyHash, ...]  # the newest first
    created: float

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> Record:
        """Raises ValueError, TypeError or KeyError for what is no record."""
        found = json.loads(text)
        terms = found["tenant"]
        return Record(
            tenant=Tenant(**{**terms, "models": tuple(terms["models"])}),
            keys=tuple(KeyHash(**key) for key in found["keys"]),
            created=float(found["created"]),
        )


@dataclass(frozen=True, slots=True)
class Directory:
    """All tenants, as they were at one version."""

    lineage: str = ""  # empty: nobody has ever made a tenant
    version: int = 0
    mark: str = ""  # of the last change: two that are lost and made anew have one version
    records: Mapping[str, Record] = field(default_factory=dict)

    @property
    def head(self) -> tuple[str, int, str]:
        """Equal heads have equal records."""
        return self.lineage, self.version, self.mark

    def is_ahead_of(self, other: Directory) -> bool:
        """Whether the other one has lost what this one knows. Of another lineage it never has: that
        is another cluster's.
        """
        if not other.lineage:
            return bool(self.lineage)
        return self.lineage == other.lineage and self.version > other.version

    def is_replaced_by(self, other: Directory) -> bool:
        """Whether there are tenants here that the other one was not made from, as far as can be
        told.
        """
        is_other = self.lineage != other.lineage
        is_other |= self.version == other.version and self.mark != other.mark
        return is_other and bool(self.records)

    def changed(self, name: str, record: Record | None) -> Directory:
        """With another record of a tenant; None is no record."""
        records = {known: kept for known, kept in self.records.items() if known != name}
        if record is not None:
            records[name] = record
        lineage = self.lineage or secrets.token_hex(8)
        return Directory(lineage, self.version + 1, secrets.token_hex(8), records)

    def to_json(self) -> str:
        """For a copy on disk; it has no key, only hashes."""
        records = {name: record.to_json() for name, record in self.records.items()}
        head = {"lineage": self.lineage, "version": self.version, "mark": self.mark}
        return json.dumps({**head, "records": records})

    @staticmethod
    def from_json(text: str) -> Directory:
        """Raises ValueError, TypeError or KeyError for what is no copy."""
        found = json.loads(text)
        records = {name: Record.from_json(record) for name, record in found["records"].items()}
        mark = str(found.get("mark", ""))  # copies of before have none
        return Directory(str(found["lineage"]), int(found["version"]), mark, records)
