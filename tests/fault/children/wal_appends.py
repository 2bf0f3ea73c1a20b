"""Appends alone, together, keyed, and over several segments; notes each try and each answer.

The first argument names the protection to take away.
"""

import asyncio
import sys

from app.core.stores.wal.log import WalLog
from tests.fault.children.notes import ROOT, note
from tests.fault.children.protections import take_away
from tests.fault.children.wal_stack import request_of, wal_stack
from tests.helpers.ledger import AckLedger


async def append(log: WalLog, ledger: AckLedger, count: int, pad_bytes: int, keyed: bool) -> None:
    new = ledger.begin(count, pad_bytes=pad_bytes)
    note(trying=count, pad_bytes=pad_bytes, keyed=keyed)
    done = await log.append(request_of(new, keyed=keyed))
    note(acknowledged=new.ordinal, first_lsn=done.first_lsn, last_lsn=done.last_lsn)


async def main() -> None:
    ledger = AckLedger()
    async with wal_stack(ROOT / "data") as stack:
        note(creating=True)
        log = await stack.create_database()
        note(created=True)
        for number in range(6):
            await append(log, ledger, 2, 700, keyed=number % 2 == 0)
        await append(log, ledger, 30, 5000, keyed=True)
        for _ in range(3):
            async with asyncio.TaskGroup() as tasks:
                for number in range(6):
                    tasks.create_task(append(log, ledger, 6, 900, keyed=number == 3))
            await log.seal()
        await append(log, ledger, 2, 10, keyed=False)


take_away(sys.argv[1])
asyncio.run(main())
