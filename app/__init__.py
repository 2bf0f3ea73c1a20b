"""The service, its command line, its client."""

__version__ = "0.1.0"
