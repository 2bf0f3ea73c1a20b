"""What every op of a manifest batch is."""

import msgspec


class Op(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One change. Tagged with its class name, so that the change log can be read back."""
