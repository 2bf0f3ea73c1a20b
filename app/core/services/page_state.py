"""Where a libsql database stands: from the WAL where that has its newest request, else from what
was published of it, which has the rest (the WAL goes once it is published). Reads only.
"""

from dataclasses import dataclass

from app.core.formats.frame_run import FrameFooter, parse_footer
from app.core.stores.manifest.records import DatabaseRecord
from app.core.stores.manifest.view import ManifestView
from app.core.stores.wal.log import WalLog


@dataclass(frozen=True, slots=True, kw_only=True)
class PageState:
    last_lsn: int  # of the newest frame stored; 0: none ever was
    footer: FrameFooter

    @property
    def page_count(self) -> int:
        return self.footer.page_count


def content_tag(db_id: int, lsn: int) -> str:
    """Names a database's content: LSNs are never reused, nor are databases' ids."""
    return f"{db_id}-{lsn}"


def page_state(view: ManifestView, record: DatabaseRecord, log: WalLog) -> PageState:
    """`record` is the row as it is now. Raises Damage where the row holds no position."""
    generation = view.generation(record.db_id, record.generation)
    published_lsn = generation.last_lsn if generation is not None else 0
    last = log.frames.last
    if last is not None and last.last_lsn >= published_lsn:
        return PageState(last_lsn=last.last_lsn, footer=last.footer)
    footer = FrameFooter(page_count=record.page_count)
    if record.wal_position:
        footer = parse_footer(record.wal_position, page_size=record.page_size)
    return PageState(last_lsn=published_lsn, footer=footer)
