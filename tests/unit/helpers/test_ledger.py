"""The ack ledger sees every way in which a service can break its word."""

import pytest

from tests.helpers.ledger import AckLedger, Append, FinalRecord, LedgerMismatch


def placed(append: Append, first_lsn: int) -> list[FinalRecord]:
    return list(enumerate(append.payloads, start=first_lsn))


def acknowledged(ledger: AckLedger, count: int, first_lsn: int) -> Append:
    append = ledger.begin(count)
    append.ok(first_lsn, first_lsn + count - 1)
    return append


def test_what_was_acknowledged_and_whole_unknowns_are_right() -> None:
    ledger = AckLedger()
    first, second = acknowledged(ledger, 2, 1), ledger.begin(3)
    second.unknown()
    third = acknowledged(ledger, 1, 6)
    ledger.check([*placed(first, 1), *placed(second, 3), *placed(third, 6)])


def test_an_unknown_may_be_absent() -> None:
    ledger = AckLedger()
    first = acknowledged(ledger, 2, 1)
    ledger.begin(3).unknown()
    ledger.check(placed(first, 1))


def test_an_unknown_retried_to_success_is_there_once() -> None:
    ledger = AckLedger()
    append = ledger.begin(2)
    append.unknown()
    append.ok(1, 2)
    ledger.check(placed(append, 1))
    with pytest.raises(LedgerMismatch, match="twice"):
        ledger.check([*placed(append, 1), *placed(append, 3)])


def test_lost() -> None:
    ledger = AckLedger()
    first, _ = acknowledged(ledger, 1, 1), acknowledged(ledger, 1, 2)
    with pytest.raises(LedgerMismatch, match="acknowledged append 1"):
        ledger.check(placed(first, 1))


def test_moved() -> None:
    ledger = AckLedger()
    first = acknowledged(ledger, 1, 1)
    with pytest.raises(LedgerMismatch, match="belongs at LSNs 1"):
        ledger.check(placed(first, 2))


def test_invented() -> None:
    with pytest.raises(LedgerMismatch, match="nobody sent"):
        AckLedger().check([(1, b"who wrote this")])


def test_torn() -> None:
    ledger = AckLedger()
    append = ledger.begin(3)
    append.unknown()
    with pytest.raises(LedgerMismatch, match="part of append"):
        ledger.check(placed(append, 1)[:2])


def test_refused_but_kept() -> None:
    ledger = AckLedger()
    append = ledger.begin(1)
    append.failed()
    with pytest.raises(LedgerMismatch, match="refused append"):
        ledger.check(placed(append, 1))


def test_a_hole_in_the_lsns() -> None:
    ledger = AckLedger()
    first, second = acknowledged(ledger, 1, 1), acknowledged(ledger, 1, 3)
    final = [*placed(first, 1), *placed(second, 3)]
    with pytest.raises(LedgerMismatch, match="LSN 3 follows 1"):
        ledger.check(final)
    ledger.check(final, gaps=True)


def test_out_of_order() -> None:
    ledger = AckLedger()
    first = ledger.begin(1)
    first.ok(2, 2)
    second = ledger.begin(1)
    second.ok(1, 1)
    with pytest.raises(LedgerMismatch, match="lower LSN"):
        ledger.check([*placed(second, 1), *placed(first, 2)])


def test_two_different_acknowledgements_of_one_append() -> None:
    append = acknowledged(AckLedger(), 1, 1)
    with pytest.raises(LedgerMismatch, match="then again"):
        append.ok(2, 2)
