"""Wires what lets go of things: retention, deletion, collection."""

from collections.abc import Callable
from dataclasses import dataclass

from app.container.ground import Ground
from app.core.base.events import Events
from app.core.reads.read_point import GenerationPins
from app.core.retention.collector import BlobCollector
from app.core.retention.expiry import Expiry
from app.core.retention.orphans import OrphanSweep
from app.core.retention.policy_pass import RetentionPass
from app.core.retention.removal import DatabaseRemoval
from app.core.stores.local.hot_cache import HotCache
from app.core.stores.remote.protocol import RemoteStore
from app.core.stores.wal.store import WalStore
from app.core.workers.collector import Collector
from app.settings import Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectionParts:
    removal: DatabaseRemoval
    collector: Collector


def collection_parts(
    settings: Settings,
    ground: Ground,
    *,
    wal: WalStore,
    pins: GenerationPins,
    hot_cache: HotCache,
    remote: Callable[[], RemoteStore],
    events: Events,
) -> CollectionParts:
    manifest, clock = ground.manifest, ground.clock
    grace_us = settings.gc_grace_seconds * 1_000_000
    expiry = Expiry(manifest, pins, events=events)
    removal = DatabaseRemoval(manifest, wal, expiry, clock=clock)
    collector = Collector(
        manifest,
        retention=RetentionPass(manifest, expiry, removal),
        blobs=BlobCollector(
            manifest,
            remote,
            ground.ownership,
            local=hot_cache,
            events=events,
            grace_us=grace_us,
        ),
        orphans=OrphanSweep(manifest, remote),
        clock=clock,
        events=events,
        interval_seconds=settings.gc_interval_seconds,
        grace_us=grace_us,
        orphan_age_seconds=settings.gc_orphan_age_seconds,
    )
    return CollectionParts(removal=removal, collector=collector)
