"""The records of tenants: one for each tenant, and all of them as they were at one version."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from cluster.tenants.keys import KeyHash
from cluster.tenants.tenancy import Tenant


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant with the hashes of its keys. Times are seconds since the epoch."""

    tenant: Tenant
    keys: tuple[KeyHash, ...]  # the newest first
    created: float

    def to_json(self) -> str:
        """Encode the record as Redis keeps it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> TenantRecord:
        """Decode a record. Raises ValueError, TypeError or KeyError if it is damaged."""
        found = json.loads(text)
        terms = found["tenant"]
        return TenantRecord(
            tenant=Tenant(**{**terms, "models": tuple(terms["models"])}),
            keys=tuple(KeyHash(**key) for key in found["keys"]),
            created=float(found["created"]),
        )


@dataclass(frozen=True, slots=True)
class TenantSnapshot:
    """All tenants, as they were at one version.

    Attributes:
        lineage: Drawn when the first tenant is created; empty if none ever was.
        version: Grows by 1 with every change.
        mark: Drawn with every change: two changes made to the same version differ by it.
        records: The records by tenant.
    """

    lineage: str = ""
    version: int = 0
    mark: str = ""
    records: Mapping[str, TenantRecord] = field(default_factory=dict)

    @property
    def head(self) -> tuple[str, int, str]:
        """Lineage, version and mark; snapshots with equal heads have equal records."""
        return self.lineage, self.version, self.mark

    def is_ahead_of(self, other: TenantSnapshot) -> bool:
        """Return whether `other` has lost changes that this one has. One of another lineage never
        has: it is another cluster's.
        """
        if not other.lineage:
            return bool(self.lineage)
        return self.lineage == other.lineage and self.version > other.version

    def is_replaced_by(self, other: TenantSnapshot) -> bool:
        """Return whether this one has tenants and, as far as can be told, `other` was not made from
        it.
        """
        is_other_lineage = self.lineage != other.lineage
        is_other_change = self.version == other.version and self.mark != other.mark
        return bool(self.records) and (is_other_lineage or is_other_change)

    def changed(self, name: str, record: TenantRecord | None) -> TenantSnapshot:
        """Return the next version, with a tenant's record replaced, or removed for None."""
        records = {known: kept for known, kept in self.records.items() if known != name}
        if record is not None:
            records[name] = record
        return TenantSnapshot(
            lineage=self.lineage or secrets.token_hex(8),
            version=self.version + 1,
            mark=secrets.token_hex(8),
            records=records,
        )

    def to_json(self) -> str:
        """Encode the snapshot for the copy on disk; it has no keys, only their hashes."""
        records = {name: record.to_json() for name, record in self.records.items()}
        head = {"lineage": self.lineage, "version": self.version, "mark": self.mark}
        return json.dumps({**head, "records": records})

    @staticmethod
    def from_json(text: str) -> TenantSnapshot:
        """Decode a copy. Raises ValueError, TypeError or KeyError if it is damaged."""
        found = json.loads(text)
        return TenantSnapshot(
            lineage=str(found["lineage"]),
            version=int(found["version"]),
            mark=str(found.get("mark", "")),  # older copies have none
            records={
                name: TenantRecord.from_json(record) for name, record in found["records"].items()
            },
        )
