"""Composition root: the only place that creates components and knows how they fit."""

from app.container.ground import OnFatal, remote_options
from app.container.offline import fsck, recover
from app.container.service import Container, Gauges, Readiness, Services
from app.container.wiring import open_container

__all__ = [
    "Container",
    "Gauges",
    "OnFatal",
    "Readiness",
    "Services",
    "fsck",
    "open_container",
    "recover",
    "remote_options",
]
