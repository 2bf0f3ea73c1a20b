"""Spans to an OpenTelemetry collector, where one is named. FastAPI makes them; this sends them.

Its libraries are loaded only then: a service without a collector starts without them.
"""

from typing import TYPE_CHECKING

from app.core.base.errors import StartRefused

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

FLUSH_MILLISECONDS = 2000
EXPORT_TIMEOUT_SECONDS = 5


class Tracing:
    """Use `open`. What was not sent when the process ends is tried for a moment, then dropped."""

    def __init__(self, provider: "TracerProvider") -> None:
        self.provider = provider

    @classmethod
    def open(cls, endpoint: str, *, ratio: float, version: str) -> "Tracing":
        """OTLP over HTTP to `endpoint`; headers, such as a token, come by the SDK's own variables.
        `ratio` of the traces that begin here; one that the caller samples is sampled. Raises
        StartRefused where the libraries are missing.
        """
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
                OTLPSpanExporter,
            )
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.sdk.trace.sampling import (  # noqa: PLC0415 - see the module
                ParentBased,
                TraceIdRatioBased,
            )
        except ImportError as error:
            raise StartRefused(
                f"BOP_OTLP_ENDPOINT needs the extra 'otlp' to be installed: {error}"
            ) from error
        provider = TracerProvider(
            resource=Resource.create(
                {"service.name": "bop-checkpoint", "service.version": version}
            ),
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(
            endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_SECONDS
        )
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return cls(provider)

    def close_blocking(self) -> None:
        self.provider.force_flush(FLUSH_MILLISECONDS)
        self.provider.shutdown()
