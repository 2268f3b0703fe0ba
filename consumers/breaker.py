"""When dead letters are an outage and not noise. Sans-IO."""

from collections import deque
from collections.abc import Sequence

from schemas.errors import DeadLetterFlood

RATIO_RECORDS = 1_000


class DeadLetterBreaker:
    """Watches the ends of one lane's records, in their order, and stops a flood of dead letters.

    Args:
        max_ratio: of the last 1,000 records, as soon as there are so many; 1 allows all.
        max_consecutive: dead letters in a row.
    """

    def __init__(self, lane: str, *, max_ratio: float, max_consecutive: int) -> None:
        self._lane = lane
        self._max_ratio = max_ratio
        self._max_consecutive = max_consecutive
        self._consecutive = 0
        self._batches: deque[tuple[int, int]] = deque()  # records, dead letters among them
        self._num_records = self._num_letters = 0

    def observe(self, are_letters: Sequence[bool]) -> None:
        """Takes the ends of some records, True for a dead letter.

        Raises DeadLetterFlood; the letters of this call should then not be published.
        """
        some_are = any(are_letters)
        if are_letters and not some_are:
            self._consecutive = 0
        for is_letter in are_letters if some_are else ():
            self._consecutive = self._consecutive + 1 if is_letter else 0
            if self._consecutive > self._max_consecutive:
                raise DeadLetterFlood(
                    f"lane {self._lane}: more than {self._max_consecutive} dead letters in a row; "
                    f"{self._mend('dlq_max_consecutive')}"
                )
        self._slide(len(are_letters), sum(are_letters))
        ratio = self._num_letters / max(1, self._num_records)
        if self._num_records >= RATIO_RECORDS and ratio > self._max_ratio:
            raise DeadLetterFlood(
                f"lane {self._lane}: {ratio:.0%} of the last {self._num_records:,} records are "
                f"dead letters, more than {self._max_ratio:.0%}; {self._mend('dlq_max_ratio')}"
            )

    def _slide(self, num_records: int, num_letters: int) -> None:
        self._batches.append((num_records, num_letters))
        self._num_records += num_records
        self._num_letters += num_letters
        while self._num_records - self._batches[0][0] >= RATIO_RECORDS:
            records, letters = self._batches.popleft()
            self._num_records -= records
            self._num_letters -= letters

    def _mend(self, setting: str) -> str:
        return (
            f"see their reasons with `tapeline dlq ls --lane {self._lane}` and in the log, mend "
            f"the producer or the model, or raise worker.{setting} to let them pass"
        )
