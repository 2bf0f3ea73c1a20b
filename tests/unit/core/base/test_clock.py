from app.core.base.clock import SeededRandomness, full_jitter


def test_full_jitter_doubles_up_to_its_cap_however_many_attempts_there_were() -> None:
    class Highest(SeededRandomness):
        def uniform(self, low: float, high: float) -> float:
            assert low == 0.0
            return high

    def longest(attempt: int) -> float:
        return full_jitter(Highest(1), attempt=attempt, base_seconds=0.5, cap_seconds=10.0)

    assert [longest(attempt) for attempt in range(1, 7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0]
    assert longest(1024) == longest(1025) == longest(1_000_000) == 10.0
